"""`dualpath serve` as a child process, for load generators that are given no server."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_S = 240.0
STOP_S = 60.0


@contextlib.contextmanager
def own_server(folder: Path, spec: str) -> Iterator[str]:
    """`dualpath serve` with a small model, on a free port, for as long as the context lasts; its URL. Raises RuntimeError."""
    from deploy.running_service import free_port  # here, because it loads Ray Serve

    port = free_port("127.0.0.1")
    settings = [f"model.spec={spec}", f"storage.path={folder / 'blocks'}", "model.threads=1"]
    command = [str(Path(sys.executable).with_name("dualpath")), "serve", "--port", str(port)]
    command += [part for setting in settings for part in ("--set", setting)]
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _until_ready(url, process, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"dualpath serve did not become ready: {log.read_text(errors='replace')[-800:]}")
        time.sleep(0.5)


def served_name(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        return str(json.load(answer)["data"][0]["id"])
