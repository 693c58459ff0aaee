"""`dualpath demo`, with a model that is made on the spot: the same script, the same kills, the same comparison."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dualpath_ray.models.tiny import make_tiny_model
from tests.cluster.conftest import DUALPATH


def start(directory: Path, **options: Any) -> subprocess.Popen[str]:
    """In a process of its own: it starts a Ray of its own. Its output goes to files beside the model."""
    model = make_tiny_model("llama", directory / "model", max_context=8192)  # its tokens are bytes, so the script takes more than 4,096
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"TMPDIR": str(directory)}
    command = [*DUALPATH, "demo", "--json"]
    for setting in (f"model.spec={model}", "model.threads=1", "model.max_context=8192"):
        command += ["--set", setting]
    with (directory / "out").open("w") as out, (directory / "err").open("w") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, text=True, env=environment, **options)


@pytest.mark.timeout(280)
def test_the_demo_plays_to_its_end(short_tmp: Path) -> None:
    process = start(short_tmp)
    assert process.wait(260) == 0, (short_tmp / "err").read_text()[-2000:]
    document = json.loads((short_tmp / "out").read_text())
    assert len(document["turns"]) >= 4
    assert all(turn["identical_to_reference"] for turn in document["turns"])
    assert document["leaked_slots"] == 0
    assert document["object_store_bytes"] == 0
    assert any(turn["cached_tokens"] for turn in document["turns"])


@pytest.mark.live
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.timeout(280)
def test_a_signal_to_its_whole_group_leaves_nothing(short_tmp: Path, number: signal.Signals) -> None:
    """SIGINT, as from a terminal, is ignored by Ray's processes, SIGTERM ends them."""
    process = start(short_tmp, start_new_session=True)
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 200
        while not any(path.is_file() for path in short_tmp.glob("dualpath-demo-*/**/*")):
            assert process.poll() is None and time.monotonic() < deadline, (short_tmp / "err").read_text()
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, number)
        assert process.wait(60) == 130
        assert "stopped" in (short_tmp / "err").read_text().splitlines()[-1]
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive, [" ".join(one.cmdline())[:80] for one in alive]
        assert not list(short_tmp.glob("dualpath-demo-*"))
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        for one in family:
            if one.is_running():
                one.kill()
