"""Commands in the docs are run, or say what they need that is not here; links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DUALPATH = [sys.executable, "-c", "from dualpath_ray.cli import main; main()"]
PAGES = ("quickstart", "ray", "kubernetes", "operations")
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[^\n]+) -->\n)?```console\n(?P<text>.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)")


@dataclass(frozen=True, slots=True)
class Command:
    page: str
    line: str
    needs: str

    def __str__(self) -> str:
        return f"{self.page}: {self.line[:60]}"


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        for block in BLOCK.finditer((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")):
            lines = block["text"].replace("\\\n", " ").splitlines()
            found += [Command(page, line.removeprefix("$ "), block["needs"] or "") for line in lines if line.startswith("$ ")]
    return found


def test_there_are_commands_of_both_kinds() -> None:
    assert len([command for command in commands() if not command.needs]) >= 8
    assert len([command for command in commands() if command.needs]) >= 10


@pytest.mark.parametrize("command", [command for command in commands() if not command.needs], ids=str)
def test_a_command_of_the_docs_runs(command: Command) -> None:
    words = shlex.split(command.line)
    programs = {"python": [sys.executable], "dualpath": DUALPATH}
    words = [*programs.get(words[0], [words[0]]), *words[1:]]
    try:
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    except FileNotFoundError:
        pytest.skip(f"{words[0]} is not installed")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("command", [command for command in commands() if command.needs], ids=str)
def test_a_command_that_needs_more_is_one_of_programs_that_exist(command: Command) -> None:
    """At least its options must be right, where the program is ours."""
    words = [word for word in shlex.split(command.line) if word != "&&"]
    assert words[0].rpartition("/")[2] in {"dualpath", "python", "make", "curl", "docker", "ray", "serve", "helm", "kubectl"}
    if words[0] in ("dualpath", ".venv/bin/dualpath"):
        run = [*DUALPATH, words[1], "--help"]
        shown = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
        for option in (word for word in words if word.startswith("--")):
            assert option in shown
    for file in (word for word in words if word.startswith("deploy/")):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target) if target else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                f"{page.name}: #{anchor}"
            )
