"""Checks of everything that `deploy/` ships for other programs to read: `make check-deploy`, or `python -m deploy.check`."""
