"""Commands in README.md and docs/, and what their own programs say about their arguments without running them."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from dualpath_ray.cli import main as dualpath
from dualpath_ray.config import Settings

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

# Programs whose arguments are not checked, each with the reason. Files of ours that they name must exist all the same.
UNCHECKED = {
    "cat": "of the system",
    "chmod": "of the system",
    "curl": "its requests are what tests/unit/deploy sends",
    "echo": "of the shell",
    "docker": "not there where the tests run; hadolint checks the container file",
    "export": "of the shell; the names of its variables are checked",
    "helm": "not there where the tests run",
    "kubectl": "not there where the tests run; deploy.check validates the manifests",
    "openssl": "has no way to check arguments without acting on them",
    "promtool": "runs in a test where it is installed",
}
CHECKED = ("dualpath", "make", "python", "ray", "serve")
VARIABLES = ("RAY_", "DUALPATH__")
PLACEHOLDERS = {"N": "256", "S": "1", "M": "1", "NAME": "gain", "TRACES...": "traces.jsonl", "...": None}  # None: nothing

_BLOCK = re.compile(r"(?:<!-- (?P<mark>needs|live): [^\n]+ -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)```\n", re.DOTALL)
_INDENTED = re.compile(r"(?:^ {4}\S.*\n)+", re.MULTILINE)
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_SUBSTITUTION = re.compile(r"\$\([^)]*\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_INPUT = re.compile(r"[\w-]+\.(?:jsonl|yaml)")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True, slots=True)
class Command:
    """`runs`: it stands in a console block, and this is what the comment before the block says of it: nothing, so that it is run always;
    `live: why`, run by `make test-live` alone; or `needs: what`, never. Those that do not always run are parsed. `named`: in the text,
    where a program and its subcommand may stand without their arguments.
    """

    page: str
    line: str
    runs: Literal["always", "live", "never"] = "never"
    named: bool = False
    section: str = ""

    def __str__(self) -> str:
        return f"{self.page}: {self.line[:70]}"


def commands_of(page: Path) -> list[Command]:
    """In console blocks, in indented blocks, and in the text between backticks if it has arguments."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in _BLOCK.finditer(text):
        lines = _lines(block["text"])
        if block["kind"] == "console":
            runs: Literal["always", "live", "never"] = {None: "always", "live": "live", "needs": "never"}[block["mark"]]
            section = _HEADING.findall(text, 0, block.start())[-1]
            found += [Command(page.stem, line.removeprefix("$ "), runs, section=section) for line in lines if line.startswith("$ ")]
    rest = _BLOCK.sub("\n", text)
    for indented in _INDENTED.findall(rest):
        found += [Command(page.stem, line) for line in _lines(indented) if _program(line) in (*CHECKED, *UNCHECKED)]
    found += [Command(page.stem, line, named=True) for line in _INLINE.findall(rest) if " " in line and _program(line) in CHECKED]
    return found


def check(command: Command, directory: Path) -> None:
    """Raise click.UsageError, ConfigError or AssertionError for a command that its program would not take.

    The current directory must be `directory`, a scratch one: files that the command reads are made there if the project has none.
    """
    for words in _simple_commands(command.line):
        for file in (word for word in words if word.startswith(("deploy/", "docs/", "load_tests/"))):
            assert (ROOT / file).exists(), f"{command}: there is no {file}"
        program, arguments = words[0].rpartition("/")[2], words[1:]
        assert program in (*CHECKED, *UNCHECKED), f"{command}: what is {program}?"
        if program == "export":
            assert all(word.startswith(VARIABLES) for word in arguments), command
        elif program == "make":
            targets = [word for word in arguments if "=" not in word]
            subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)
        elif program in CHECKED:
            if arguments[0].endswith(".py"):
                assert (ROOT / arguments[0]).exists(), command
                continue
            for word in arguments:
                if _INPUT.fullmatch(word):
                    (directory / word).touch()
            parser, arguments = _parser(program, arguments)
            _parse(parser, arguments, named=command.named)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.replace("\\\n", " ").splitlines()]


def _program(line: str) -> str:
    first = next((word for word in line.split() if not _ASSIGNMENT.match(word)), "")
    return first.removeprefix(".venv/bin/")


def _simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command in a line of shell."""
    words = shlex.split(_SUBSTITUTION.sub("X", line), comments=True)
    part: list[str] = []
    for word in [*words, "&&"]:
        if word in ("&&", "|"):
            yield _plain(part)
            part = []
        else:
            part.append(word)


def _plain(words: Sequence[str]) -> list[str]:
    """Without redirection, without variables before the program. Of alternatives in a synopsis (`a|b`) the first, and optional parts."""
    words = words[: words.index(">")] if ">" in words else words
    while words and _ASSIGNMENT.match(words[0]):
        words = words[1:]
    bare = [word.strip("[]") if "{" not in word else word for word in words]
    bare = [word.partition("|")[0] for word in bare]
    return [chosen for word in bare if (chosen := PLACEHOLDERS.get(word, word)) is not None]


def _parser(program: str, arguments: Sequence[str]) -> tuple[click.Command, list[str]]:
    if program == "dualpath":
        return dualpath, list(arguments)
    if program == "ray":
        return importlib.import_module("ray.scripts.scripts").cli, list(arguments)
    if program == "serve":
        return importlib.import_module("ray.serve.scripts").cli, list(arguments)
    assert arguments[0] == "-m", "only modules are run"
    name = arguments[1]
    if (ROOT / Path(*name.split(".")) / "__main__.py").exists():
        name += ".__main__"
    module = importlib.import_module(name)
    return getattr(module, "command", None) or module.main, list(arguments[2:])


def _parse(command: click.Command, arguments: Sequence[str], *, named: bool) -> None:
    """Down to the subcommand; settings that are given are checked too."""
    context = click.Context(command)
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"there is no command {name}", context)
        command = found
        context = click.Context(command, parent=context)
    if arguments == ["--help"] or (not arguments and (named or isinstance(command, click.Group))):
        return
    parsed = command.make_context(command.name, list(arguments))
    if overrides := parsed.params.get("overrides"):
        Settings.load(None, overrides, environ=dict(os.environ))
