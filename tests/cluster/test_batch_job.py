"""`python -m deploy.batch` as a job of its own beside a running cluster: killed, and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from actors.client import ClusterClient
from tests.cluster.conftest import RunningCluster


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "interrupted"])
async def test_a_job_goes_on(client: ClusterClient, shared: RunningCluster, tmp_path: Path, killed: bool) -> None:
    name = (await client.describe()).served_name
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": name, "prompt": "Every block", "max_tokens": 30, "ignore_eos": True}
    rollout = {"model": name, "max_tokens": 4, "turns": [[{"role": "user", "content": text}] for text in ("one", "two")]}
    lines = [{"custom_id": f"c{index}", "method": "POST", "url": "/v1/completions", "body": body} for index in range(60)]
    lines.append({"custom_id": "r", "method": "POST", "url": "/v1/rollouts", "body": rollout})
    lines.append({"custom_id": "bad", "method": "POST", "url": "/v1/completions", "body": {**body, "max_tokens": -1}})
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "deploy.batch", str(source), str(results), "--concurrency", "2"]
    command += [
        "--set",
        f"cluster.address={ray.get_runtime_context().gcs_address}",
        "--set",
        f"cluster.namespace={shared.cluster.namespace}",
    ]

    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 90
    while not results.exists() or results.read_text().count("\n") < 4:
        assert job.poll() is None and time.monotonic() < deadline, job.communicate(timeout=5)[0]
        time.sleep(0.02)
    (job.kill if killed else job.terminate)()
    said, _ = job.communicate(timeout=60)
    if not killed:
        assert (job.returncode, said.splitlines()) == (130, ["stopped; with --resume the job goes on where it was"])
    before = results.read_text()
    complete = before[: before.rfind("\n") + 1]
    assert complete.count("\n") < len(lines)

    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    after = results.read_text()
    assert after.startswith(complete)
    answers = {result["custom_id"]: result for result in map(json.loads, after.splitlines())}
    assert len(answers) == after.count("\n") == len(lines)  # each line once
    assert [answer["custom_id"] for answer in answers.values() if answer["response"]["status_code"] != 200] == ["bad"]
    assert len(answers["r"]["response"]["body"]["turns"]) == 2
