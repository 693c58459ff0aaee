"""Benchmarks of the live system: `dualpath bench transfer|ttft|overhead`. Each compares within one run and reports ratios."""
