"""The command: real probes of this machine, the exit status, and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dualpath_ray.cli import main


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def doctor(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    result = CliRunner().invoke(main, ["doctor", "--json", *arguments])
    document = json.loads(result.stdout)
    assert document["ok"] == (result.exit_code == 0)
    return result.exit_code, {check["name"]: check for check in document["checks"]}


def test_a_machine_without_rdma_is_fit_and_measured(tmp_path: Path, no_ray: None) -> None:
    code, checks = doctor("--set", f"storage.path={tmp_path / 'store'}")
    assert code == 0
    assert "pushes on this machine: " in checks["ucx transport"]["text"] and "unknown" not in checks["ucx transport"]["text"]
    assert "UCX" in checks["nixl"]["text"]
    assert "MB/s" in checks[f"store {tmp_path / 'store'}"]["text"]
    assert not list((tmp_path / "store").rglob("*.kv*"))  # its blocks are gone
    assert checks["ray"]["status"] == "skipped"


def test_what_is_wrong_fails_with_a_remedy(tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """RDMA is asked for on a machine that has none, and the store cannot be used."""
    monkeypatch.delenv("UCX_TLS", raising=False)
    file = tmp_path / "file"
    file.touch()
    code, checks = doctor("--set", "transfer.fabric=rdma", "--set", f"storage.path={file / 'store'}")
    assert code == 1
    for name in ("rdma", "ucx transport", f"store {file / 'store'}"):
        assert checks[name]["status"] == "failed" and checks[name]["remedy"]


def test_a_check_that_breaks_ends_no_other(tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> list[object]:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("deploy.doctor.check_transfers", broken)
    code, checks = doctor("--set", f"storage.path={tmp_path / 'store'}")
    assert code == 1
    assert checks["nixl"]["text"] == "ZeroDivisionError: oops"
    assert checks[f"store {tmp_path / 'store'}"]["status"] == "ok"
