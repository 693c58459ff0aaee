"""`dualpath demo`, with a model that is made on the spot: the same script, the same kills, the same comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dualpath_ray.models.tiny import make_tiny_model


@pytest.mark.timeout(280)
def test_the_demo_plays_to_its_end(short_tmp: Path) -> None:
    """In a process of its own: it starts a Ray of its own."""
    model = make_tiny_model("llama", short_tmp / "model", max_context=8192)  # its tokens are bytes, so the script takes more than 4,096
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"TMPDIR": str(short_tmp)}
    command = [
        sys.executable,
        "-c",
        "from dualpath_ray.cli import main; main()",
        "demo",
        "--json",
        "--set",
        f"model.spec={model}",
        "--set",
        "model.threads=1",
        "--set",
        "model.max_context=8192",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=260, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout)
    assert len(document["turns"]) >= 4
    assert all(turn["identical_to_reference"] for turn in document["turns"])
    assert document["leaked_slots"] == 0
    assert document["object_store_bytes"] == 0
    assert any(turn["cached_tokens"] for turn in document["turns"])
