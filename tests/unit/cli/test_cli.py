from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from dualpath_ray import cli
from dualpath_ray.config import Settings
from dualpath_ray.errors import TransferError


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[metadata.EntryPoint]:
    """The entry points that the command sees; tests add theirs."""
    found = list(metadata.entry_points(group=cli.ENTRY_POINTS))
    monkeypatch.setattr(cli.metadata, "entry_points", lambda group: found)
    return found


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.main, arguments)
    return result.exit_code, result.stdout, result.stderr


@click.command()
def failing() -> None:
    """A command that fails."""
    raise TransferError("the peer died;\ntry again")


@click.command()
def fine() -> None:
    """A command that works."""
    click.echo("fine")


def test_help_imports_neither_torch_nor_ray_nor_any_subcommand() -> None:
    code = (
        "import sys\nfrom dualpath_ray.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'pydantic', 'dualpath_ray.commands.config'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "Check, show or describe the configuration." in result.stdout


def test_version() -> None:
    assert run("--version")[1] == f"dualpath, version {metadata.version('dualpath-ray')}\n"


def test_our_errors_are_one_line_and_exit_code_two(entries: list[metadata.EntryPoint]) -> None:
    entries.append(metadata.EntryPoint("failing", f"{__name__}:failing", cli.ENTRY_POINTS))
    assert run("failing") == (2, "", "Error: the peer died; try again\n")
    result = CliRunner().invoke(cli.main, ["--debug", "failing"])
    assert isinstance(result.exception, TransferError)


def test_a_dot_makes_a_group(entries: list[metadata.EntryPoint]) -> None:
    entries.append(metadata.EntryPoint("outer.inner.fine", f"{__name__}:fine", cli.ENTRY_POINTS))
    assert run("outer", "inner", "fine") == (0, "fine\n", "")
    assert "inner.fine" in run("--help")[1]
    assert "A command that works." in run("outer", "inner", "--help")[1]


def test_a_missing_module_breaks_only_its_own_command(entries: list[metadata.EntryPoint]) -> None:
    entries.append(metadata.EntryPoint("broken", "no_such_package.module:command", cli.ENTRY_POINTS))
    entries.append(metadata.EntryPoint("odd", "json:dumps", cli.ENTRY_POINTS))
    assert run("broken") == (2, "", "Error: 'dualpath broken' is not available here: No module named 'no_such_package'\n")
    assert run("odd") == (2, "", "Error: entry point odd = json:dumps is not a click command\n")
    code, out, _ = run("--help")
    assert code == 0 and "broken" in out and "(not available here)" in out
    assert run("config", "check")[0] == 0


@pytest.mark.parametrize(
    ("wrong", "message"), [("nonsense", "No such command 'nonsense'."), ("--nonsense", "No such option '--nonsense'.")]
)
def test_an_unknown_command_or_option_is_one_line(wrong: str, message: str) -> None:
    assert run(wrong) == (2, "", f"Error: {message} (see main --help)\n")


def test_config_check_names_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {dtype: int4}\n")
    assert run("config", "check", "--config", str(file)) == (
        2,
        "",
        f"Error: model.dtype = 'int4' (from {file}): Input should be 'float32', 'bfloat16' or 'float16'\n",
    )
    code, out, _ = run("config", "check", "--set", "cluster.decode_nodes=3")
    assert code == 0 and out == "valid: smollm2-135m-instruct on 1 prefill and 3 decode nodes\n"


def test_config_show_prints_a_configuration_that_loads(tmp_path: Path) -> None:
    code, out, _ = run("config", "show", "--set", "prefill.window_layers=5")
    assert code == 0
    (tmp_path / "c.yaml").write_text(out)
    assert Settings.load(tmp_path / "c.yaml", (), {}) == Settings.load(None, ["prefill.window_layers=5"], {})


def test_config_comes_from_the_environment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.yaml").write_text("serving: {port: 1}\n")
    monkeypatch.setenv("DUALPATH_CONFIG", str(tmp_path / "c.yaml"))
    monkeypatch.setenv("DUALPATH__SERVING__HOST", "example")
    shown = yaml.safe_load(run("config", "show")[1])
    assert (shown["serving"]["port"], shown["serving"]["host"]) == (1, "example")


def test_config_schema_describes_every_section() -> None:
    assert json.loads(run("config", "schema")[1])["properties"].keys() == Settings.model_fields.keys()


def test_model_fetch_prints_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALPATH_CACHE", str(tmp_path))
    code, out, _ = run("model", "fetch", "tiny-llama")
    assert code == 0 and (Path(out.strip()) / "model.safetensors").is_file()
    assert run("model", "fetch", "nothing")[0] == 2
