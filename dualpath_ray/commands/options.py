"""Options that several commands share."""

from __future__ import annotations

import functools
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
