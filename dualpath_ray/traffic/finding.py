"""What a check of a fabric's configuration found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was compared. `found` is None where it could not be read."""

    what: str
    wanted: str
    found: str | None

    @property
    def ok(self) -> bool:
        return self.found == self.wanted

    def __str__(self) -> str:
        if self.ok:
            return f"ok    {self.what}: {self.wanted}"
        return f"wrong {self.what}: {self.found if self.found is not None else 'not set'}, should be {self.wanted}"


@dataclass(frozen=True, slots=True)
class Source:
    """A command whose output tells what is set, and how to compare it. Its output may also come from a file."""

    name: str
    command: tuple[str, ...]
    compare: Callable[[str], list[Finding]]


Files = Mapping[str, str]  # rendered text by file name
