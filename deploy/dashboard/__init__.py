"""The live status page at /dashboard: one file without any outside source, so that it works where there is no internet."""

from __future__ import annotations

from functools import cache
from importlib import resources


@cache
def page() -> str:
    """The page's HTML. It asks /status for what it shows."""
    return resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
