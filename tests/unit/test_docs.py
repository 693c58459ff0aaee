"""Commands in the docs are run, or at least what they give their programs is right; links lead somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest

from dualpath_ray.errors import ConfigError
from tests.docs_walk import Walk
from tests.unit.docs_commands import PAGES, Command, check, commands_of

COMMANDS = [command for page in PAGES for command in commands_of(page)]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For files that commands name."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_of_both_kinds_are_found() -> None:
    assert len([command for command in COMMANDS if command.runs == "always"]) >= 30
    assert len([command for command in COMMANDS if command.runs == "live"]) >= 10
    assert len([command for command in COMMANDS if command.runs == "never"]) >= 50


@pytest.mark.parametrize("page", sorted({command.page for command in COMMANDS if command.runs == "always"}))
def test_the_commands_of_a_page_run(page: str, tmp_path: Path) -> None:
    """One after the other, as a reader would. tests/cluster/test_docs_live.py runs those, too, that take longer."""
    walk = Walk(tmp_path)
    missing = []
    for command in COMMANDS:
        if command.page == page and command.runs == "always":
            if program := walk.missing(command.line):
                missing.append(program)
            else:
                walk.run(command.line)
    if missing:
        pytest.skip(f"the others ran; not installed: {', '.join(missing)}")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.runs != "always"], ids=str)
def test_a_command_s_arguments_are_right(command: Command, directory: Path) -> None:
    check(command, directory)


@pytest.mark.parametrize(
    "line",
    [
        "dualpath sirve",
        "dualpath serve --prot 8000",
        "dualpath serve --port eight",
        "dualpath serve --set serving.prot=1",
        "dualpath bench kw --json",
        "python -m deploy.batch in.jsonl",
        "python -m load_tests.experiments gian",
        "ray job sumbit -- x",
        "serve deploy deploy/settings/server.yaml",
        "export RAI_AUTH_MODE=token",
        "make dmeo",
        "kubectll apply",
        "RAY_AUTH_MODE=token serve deploi x.yaml",
    ],
)
def test_a_wrong_one_is_found(line: str, directory: Path) -> None:
    with pytest.raises((click.ClickException, ConfigError, AssertionError, subprocess.CalledProcessError)):
        check(Command("page", line), directory)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target) if target else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                f"{page.name}: #{anchor}"
            )
