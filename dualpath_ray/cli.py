"""The `dualpath` command.

Subcommands are entry points of the group `dualpath.commands`, found by name and imported only when they run: this module depends on
none of them, `dualpath --help` imports neither torch nor ray, and a command whose module is missing breaks no other. A dot in
an entry point's name makes a group: `bench.store` is `dualpath bench store`.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from dualpath_ray.errors import DualPathError

ENTRY_POINTS = "dualpath.commands"


class EntryPointGroup(click.Group):
    """A group of the commands whose entry-point names start with `prefix`."""

    def __init__(self, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prefix = prefix

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({entry.name.removeprefix(self.prefix).split(".")[0] for entry in self._entries()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for entry in self._entries():
            rest = entry.name.removeprefix(self.prefix)
            if rest == cmd_name:
                return _load(entry)
            if rest.startswith(f"{cmd_name}."):
                return EntryPointGroup(cmd_name, prefix=f"{self.prefix}{cmd_name}.", help=f"Commands of {self.prefix}{cmd_name}.")
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, self._summary(name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _entries(self) -> list[metadata.EntryPoint]:
        return [entry for entry in metadata.entry_points(group=ENTRY_POINTS) if entry.name.startswith(self.prefix)]

    def _summary(self, name: str) -> str:
        entries = {entry.name.removeprefix(self.prefix): entry for entry in self._entries()}
        if name in entries:
            return _docstring(entries[name])
        return ", ".join(sorted(key.removeprefix(f"{name}.") for key in entries if key.startswith(f"{name}.")))


class Failure(click.ClickException):
    """What the user can change; shown as one line on standard error."""

    exit_code = 2


class Main(EntryPointGroup):
    """Turns wrong options and the package's own errors into one line and exit status 2; with --debug they keep their stack trace."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _one_line(ctx):
                return super().invoke(ctx)
        except DualPathError as error:
            if ctx.params["debug"]:
                raise
            raise Failure(" ".join(str(error).split())) from error


@contextmanager
def _one_line(ctx: click.Context) -> Iterator[None]:
    """Show wrong usage in one line, and where to read more."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else ctx.command_path
        raise Failure(f"{' '.join(error.format_message().split())} (see {path} --help)") from error


@click.command(cls=Main)
@click.option("--debug", is_flag=True, help="Show the stack trace of errors.")
@click.version_option(package_name="dualpath-ray", prog_name="dualpath")
def main(debug: bool) -> None:
    """DualPath on Ray: LLM serving that loads KV-Cache through every storage NIC of the cluster."""


def _load(entry: metadata.EntryPoint) -> click.Command:
    try:
        command = entry.load()
    except (ImportError, AttributeError) as error:
        raise DualPathError(f"'dualpath {entry.name.replace('.', ' ')}' is not available here: {error}") from error
    if not isinstance(command, click.Command):
        raise DualPathError(f"entry point {entry.name} = {entry.value} is not a click command")
    return command


def _docstring(entry: metadata.EntryPoint) -> str:
    """First line of the command's docstring, read from the source file so that nothing heavy is imported."""
    try:
        spec = importlib.util.find_spec(entry.module)
        if spec is None or spec.origin is None:
            return "(not available here)"
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (ImportError, OSError, SyntaxError):
        return "(not available here)"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return (ast.get_docstring(tree) or "").partition("\n")[0]
