"""Subcommands of `dualpath` that need neither Ray nor torch."""
