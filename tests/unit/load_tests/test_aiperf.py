"""What needs no aiperf: its input, its arguments, and how its answers are read."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from load_tests.replay import aiperf
from load_tests.replay.aiperf_tool import (
    HUB_NAME,
    AiperfError,
    Endpoint,
    common_arguments,
    figures,
    hub_cache,
    run_aiperf,
    schedule_arguments,
    session_rows,
)
from load_tests.replay.trajectory import Trajectory, Turn


def test_later_rows_of_a_session_hold_new_tokens_and_the_pause_before_them() -> None:
    rows = session_rows([Trajectory((Turn(100, 10, 1.5), Turn(50, 20)))])
    assert rows == [
        {"session_id": "session-0", "input_length": 100, "output_length": 10},
        {"session_id": "session-0", "input_length": 50, "output_length": 20, "delay": 1500},
    ]


def test_arguments_of_a_fixed_schedule(tmp_path: Path) -> None:
    arguments = common_arguments(Endpoint("http://h:1", "m"), tmp_path / "rows", tmp_path) + schedule_arguments(64, "time_to_first_token:9")
    assert arguments[0] == "profile"
    pairs = dict(itertools.pairwise(arguments))
    assert (pairs["--custom-dataset-type"], pairs["--goodput"], pairs["--tokenizer"]) == (
        "mooncake_trace",
        "time_to_first_token:9",
        HUB_NAME,
    )
    assert "--fixed-schedule" in arguments


def test_a_tokenizer_is_found_as_in_the_hubs_cache(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path / "hf", tiny_llama)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(HUB_NAME, "tokenizer.json", cache_dir=tmp_path / "hf" / "hub")
    assert isinstance(found, str) and Path(found).read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()


EXPORT: dict[str, Any] = {
    "request_count": {"avg": 4.0},
    "time_to_first_token": {"avg": 30.0, "p99": 50.0},
    "goodput": {"avg": 2.5},
}


def test_figures_of_an_export() -> None:
    assert figures(EXPORT, 4) == {"requests": 4.0, "goodput_per_s": 2.5, "ttft_ms": 30.0, "ttft_ms_p99": 50.0}


@pytest.mark.parametrize("export", [{}, {**EXPORT, "request_count": {"avg": 3.0}}, {**EXPORT, "error_request_count": {"avg": 1.0}}])
def test_unanswered_requests_are_an_error(export: dict[str, Any]) -> None:
    with pytest.raises(AiperfError, match="4 requests were sent"):
        figures(export, 4)


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return path


def test_the_programs_export_is_read_and_its_failure_reported(tmp_path: Path) -> None:
    writes = script(
        tmp_path / "good", "import sys, pathlib; pathlib.Path(sys.argv[1], 'profile_export_aiperf.json').write_text('{\"a\": 1}')"
    )
    assert run_aiperf(writes, tmp_path, [str(tmp_path)], tmp_path) == {"a": 1}
    with pytest.raises(AiperfError, match="status 2: no such model"):
        run_aiperf(
            script(tmp_path / "bad", "import sys; print('no such model', file=sys.stderr); sys.exit(2)"), tmp_path, [], tmp_path / "none"
        )


def test_without_the_program_the_command_says_how_to_get_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(aiperf.main, ["--venv", str(tmp_path)])
    assert result.exit_code == 2
    assert "--make-venv" in result.output


def test_a_trace_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(json.dumps({"timestamp": 0, "input_length": 90_000, "output_length": 5, "hash_ids": [1]}))
    with pytest.raises(ValueError, match="--max-tokens"):
        aiperf._trace(path, 512, 5, 1.0, 2, 1024)
