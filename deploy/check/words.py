"""Spelling. The formats' own checks know keys and values; names, paths, label values and text they leave open.

`words.txt` has every word of the shipped files. One that is not there is a slip of the pen, or new: `python -m deploy.check --learn`
takes it in, and the change of that file is looked at with the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

KNOWN = Path(__file__).with_name("words.txt")
_WORD = re.compile(r"[A-Za-z]{3,}")


def new_words(path: Path) -> list[str]:
    return sorted(_words(path) - _known())


def learn(paths: Iterable[Path]) -> None:
    """Make the words of `paths`, and no others, the known ones."""
    words = sorted({word for path in paths for word in _words(path)})
    KNOWN.write_text("\n".join(words) + "\n", encoding="utf-8")
    _known.cache_clear()


@cache
def _known() -> frozenset[str]:
    return frozenset(KNOWN.read_text(encoding="utf-8").split())


def _words(path: Path) -> set[str]:
    return {word.lower() for word in _WORD.findall(path.read_text(encoding="utf-8"))}
