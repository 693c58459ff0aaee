"""Which lines of a batch have their result already, found out from the result files of a job that was interrupted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from pydantic_core import from_json

from dualpath_ray.errors import ConfigError


class FinishedLines:
    """A set of line names, as 16-byte digests: about 100 bytes of memory for each, whatever their length."""

    def __init__(self) -> None:
        self._names: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return _digest(name) in self._names

    def add(self, name: str) -> bool:
        """False if it was there already."""
        before = len(self._names)
        self._names.add(_digest(name))
        return len(self._names) > before

    def add_results(self, paths: Iterable[Path]) -> None:
        """Take in the lines that result files name, and cut off the last line of a file if it is incomplete: its writer was killed.

        Files that are missing have no results. Raises ConfigError for a file that holds anything else.
        """
        for path in paths:
            if path.exists():
                self._add_file(path)

    def _add_file(self, path: Path) -> None:
        complete = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.endswith(b"\n"):
                        break
                    self.add(_name_of(line, path, number))
                    complete += len(line)
            if complete < path.stat().st_size:
                os.truncate(path, complete)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read or repaired: {error.strerror}") from error


def _name_of(line: bytes, path: Path, number: int) -> str:
    try:
        result = from_json(line)
        name = result["custom_id"] or result["id"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"line {number} of {path} is no batch result; name another file") from error
    return str(name)


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
