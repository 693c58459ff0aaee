"""Benchmarks of the live system: `dualpath bench transfer|ttft|overhead|decode`. Each compares within one run and reports ratios."""
