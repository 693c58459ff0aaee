"""Turning repeated measurements into figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of some measurements."""
    return {"median": median(values), "min": min(values), "max": max(values), "count": len(values)}


def show(title: str, document: Mapping[str, Any], rows: Sequence[Sequence[str]], columns: Sequence[str], as_json: bool) -> None:
    """Print a benchmark's outcome: a table for people, or one JSON document on standard output."""
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
