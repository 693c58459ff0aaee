"""Options that several commands share."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dualpath_ray.config import Settings

Command = Callable[..., Any]


def with_settings(function: Command) -> Command:
    """Give a command `--config FILE` and `--set a.b=c`; it is called with `settings: Settings` instead. Raises ConfigError."""

    @click.option("--config", "file", type=click.Path(path_type=Path), envvar="DUALPATH_CONFIG", help="YAML file with settings.")
    @click.option("--set", "overrides", multiple=True, metavar="SECTION.FIELD=VALUE", help="Set one field; may be repeated.")
    @functools.wraps(function)
    def command(*args: Any, file: Path | None, overrides: tuple[str, ...], **kwargs: Any) -> Any:
        return function(*args, settings=Settings.load(file, overrides), **kwargs)

    return command


def positive(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """A click callback; FloatRange would let nan and infinity pass."""
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter(f"must be a positive number, not {value}", context, option)
    return value


def new_file(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """A click callback for a file that is written when the work is done: its directory must be there before it begins."""
    if value is not None and not os.access(Path(value).absolute().parent, os.W_OK | os.X_OK):
        raise click.BadParameter(f"{value} cannot be written: its directory is missing or not writable", context, option)
    return value
