"""`dualpath serve` as a process of its own, with a Ray of its own that asks for a token: it serves, and however it is ended nothing of it
stays.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from dualpath_ray.models.tiny import make_tiny_model
from tests.cluster.conftest import DUALPATH

pytestmark = pytest.mark.live


@dataclass(frozen=True, slots=True)
class Served:
    process: subprocess.Popen[str]
    address: str
    log: Path

    def end(self, timeout_s: float = 90) -> tuple[int, str]:
        """Exit status and last line, once it and all that it started have ended by themselves."""
        descendants = psutil.Process(self.process.pid).children(recursive=True)
        yielded = self.process.wait(timeout_s)
        _, alive = psutil.wait_procs(descendants, timeout=20)
        assert not alive, [" ".join(one.cmdline())[:80] for one in alive]
        return yielded, self.log.read_text().strip().splitlines()[-1]


@pytest.fixture
def served(short_tmp: Path) -> Iterator[Served]:
    model, log = make_tiny_model("llama", short_tmp / "model"), short_tmp / "log"
    command = [*DUALPATH, "serve", "--port", "0"]
    for setting in (f"model.spec={model}", "model.threads=1", f"storage.path={short_tmp / 'store'}"):
        command += ["--set", setting]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"TMPDIR": str(short_tmp)}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, env=environment, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while "serving " not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield Served(process, log.read_text().partition(" at ")[2].strip().removesuffix("/v1"), log)
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            for one in (process, *family):
                one.kill()


@pytest.mark.timeout(500)
def test_it_serves_until_it_is_told_to_stop(served: Served) -> None:
    """The answer that is under way then is finished."""
    top = subprocess.run([*DUALPATH, "top", "--count", "1", "--url", served.address], capture_output=True, text=True, timeout=60)
    assert top.returncode == 0 and "prefill-p0-0" in top.stdout, top.stderr
    again = [*DUALPATH, "serve", "--port", served.address.rpartition(":")[2]]
    taken = subprocess.run(again, capture_output=True, text=True, timeout=60)
    assert taken.returncode == 2 and "Address already in use" in taken.stderr.splitlines()[-1]

    body = {
        "model": "model",
        "prompt": "Every block",
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with httpx.stream("POST", f"{served.address}/v1/completions", json=body, timeout=90) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("data: "))
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        *_, usage, done = lines
    assert done == "data: [DONE]" and json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 200
    assert served.end() == (0, "stopped")


@pytest.mark.timeout(500)
def test_nobody_joins_its_ray_without_the_token(served: Served) -> None:
    heads = psutil.Process(served.process.pid).children()
    (address,) = {word.partition("=")[2] for head in heads for word in head.cmdline() if word.startswith("--gcs-address=")}
    join = [sys.executable, "-c", f"import ray; ray.init(address={address!r}, log_to_driver=False)"]
    for token in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        stranger = subprocess.run(join, env=os.environ | token, capture_output=True, text=True, timeout=100)
        assert stranger.returncode and "Failed to connect to Ray cluster" in stranger.stderr
    served.process.terminate()
    assert served.end() == (0, "stopped")


@pytest.mark.timeout(500)
def test_a_signal_to_its_whole_group_ends_it_at_once(served: Served) -> None:
    """Ray's processes get it too, and nothing can be asked of them any more."""
    os.killpg(served.process.pid, signal.SIGTERM)
    assert served.end(45) == (0, "stopped, as Ray was")


@pytest.mark.timeout(500)
def test_it_ends_if_ray_dies(served: Served) -> None:
    (raylet,) = [child for child in psutil.Process(served.process.pid).children() if child.name() == "raylet"]
    raylet.kill()
    status, last = served.end(45)
    assert status == 1 and last.startswith("Ray has died"), last
