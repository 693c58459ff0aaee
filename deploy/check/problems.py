"""What a check finds."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml


class Absent(Exception):
    """A tool or schema that a check needs is not here; says how to get it."""


class Unreadable(Exception):
    """The file is not what its name says."""


def load_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # definitions are large
    except yaml.YAMLError as error:
        raise Unreadable(" ".join(str(error).split())) from error


def run(command: list[str], hint: str) -> list[str]:
    """Lines that a program that fails prints; none if it succeeds."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise Absent(f"{command[0]} is not installed: {hint}") from None
    if result.returncode == 0:
        return []
    return [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
