"""The user's cache directory: things that can be made again, each built once and put in place atomically."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """`$DUALPATH_CACHE` if set, else the platform's user cache directory (`$XDG_CACHE_HOME/dualpath-ray` on Linux)."""
    override = os.environ.get("DUALPATH_CACHE")
    return Path(override) if override else platformdirs.user_cache_path("dualpath-ray")


def build_directory(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, filling it with `build(empty_directory)` first if it does not exist.

    Other processes see either no `target` or the complete one. When several build at once the first to finish wins and the
    others throw their equal work away. If `build` raises, nothing is left behind.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        scratch.chmod(0o755)
        build(scratch)
        _rename_unless_present(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _rename_unless_present(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:  # renaming onto a directory with content fails: someone else was first
        if not target.is_dir():
            raise
