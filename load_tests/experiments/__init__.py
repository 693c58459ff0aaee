"""Measurements on the testbed: `python -m load_tests.experiments NAME` (docs/experiments.md)."""
