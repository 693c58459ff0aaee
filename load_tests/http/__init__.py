"""Load on the HTTP service: `python -m load_tests.http`."""
