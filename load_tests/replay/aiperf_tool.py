"""aiperf as a program: its environment, what it is given to read, its arguments, and what it measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load_tests.replay.trajectory import Trajectory

REQUIREMENT = "aiperf>=0.13,<0.14"
HUB_REVISION = "0" * 40
HUB_NAME = "local/served-model"
TIMEOUT_S = 900.0


class AiperfError(Exception):
    """A run failed or measured nothing; the message says which."""


def make_venv(folder: Path) -> None:
    """An environment with aiperf. Raises AiperfError with pip's last lines."""
    for command in ([sys.executable, "-m", "venv", str(folder)], [str(folder / "bin/pip"), "install", "--quiet", REQUIREMENT]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise AiperfError(f"{' '.join(command)} failed: {done.stderr[-800:]}")


def hub_cache(home: Path, tokenizer: Path) -> None:
    """Lay a tokenizer out as Hugging Face's cache does, so that aiperf finds it under HUB_NAME without a network."""
    repository = home / "hub" / f"models--{HUB_NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / HUB_REVISION
    snapshot.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, snapshot / name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(HUB_REVISION)


@dataclass(frozen=True, slots=True)
class Endpoint:
    url: str
    model: str


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def session_rows(trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """Sessions for aiperf: a turn's row holds the new tokens only, and the pause before it."""
    rows = []
    for number, trajectory in enumerate(trajectories):
        pause_s = 0.0
        for turn in trajectory.turns:
            delay = {"delay": round(pause_s * 1000)} if pause_s else {}
            rows.append({"session_id": f"session-{number}", "input_length": turn.append, "output_length": turn.generate, **delay})
            pause_s = turn.pause_s
    return rows


def common_arguments(endpoint: Endpoint, rows: Path, artifacts: Path) -> list[str]:
    named = {
        "-m": endpoint.model,
        "--url": endpoint.url,
        "--endpoint-type": "chat",
        "--ui": "none",
        "--tokenizer": HUB_NAME,
        "--input-file": str(rows),
        "--custom-dataset-type": "mooncake_trace",
        "--extra-inputs": "ignore_eos:true",
        "--artifact-dir": str(artifacts),
        "--random-seed": "1",
    }
    return ["profile", "--streaming", *(part for pair in named.items() for part in pair)]


def schedule_arguments(block_tokens: int, goodput: str) -> list[str]:
    return ["--fixed-schedule", "--isl-block-size", str(block_tokens), "--goodput", goodput]


def session_arguments(sessions: int, concurrency: int) -> list[str]:
    return ["--num-conversations", str(sessions), "--concurrency", str(concurrency)]


def run_aiperf(program: Path, home: Path, arguments: Sequence[str], artifacts: Path) -> dict[str, Any]:
    """Run it and return what it measured. Raises AiperfError."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        done = subprocess.run([str(program), *arguments], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise AiperfError(f"aiperf did not end within {TIMEOUT_S:.0f} s") from None
    export = artifacts / "profile_export_aiperf.json"
    if done.returncode or not export.exists():
        raise AiperfError(f"aiperf ended with status {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
    result: dict[str, Any] = json.loads(export.read_text())
    return result


FIGURES = {
    "requests": "request_count",
    "errors": "error_request_count",
    "goodput_per_s": "goodput",
    "ttft_ms": "time_to_first_token",
    "ttst_ms": "time_to_second_token",
    "itl_ms": "inter_token_latency",
    "output_tokens_per_s": "output_token_throughput",
    "input_tokens": "input_sequence_length",
    "cached_tokens": "usage_prompt_cache_read_tokens",
}


def figures(export: dict[str, Any], expected: int) -> dict[str, Any]:
    """The figures of one run by our names: averages, and p99 where there is one. Raises AiperfError if not all requests were answered."""
    found: dict[str, Any] = {}
    for name, theirs in FIGURES.items():
        metric = export.get(theirs)
        if isinstance(metric, dict) and metric.get("avg") is not None:
            found[name] = metric["avg"]
            if metric.get("p99") is not None:
                found[f"{name}_p99"] = metric["p99"]
    answered, errors = found.get("requests", 0), found.get("errors", 0)
    if answered != expected or errors:
        raise AiperfError(
            f"{expected} requests were sent, {answered:g} answered, {errors:g} failed: {export.get('error_summary') or 'no reason given'}"
        )
    return found
