from __future__ import annotations

import json
from pathlib import Path

import pytest

from load_tests.replay.agents import run_requests
from load_tests.replay.records import TurnRecord
from load_tests.replay.request_traces import TraceRequest, read_requests, requests_of
from load_tests.replay.trajectory import Trajectory, Turn

ROWS = [
    {"timestamp": 9000, "input_length": 1100, "output_length": 3, "hash_ids": [5, 6, 8]},
    {"timestamp": 8000, "input_length": 1030, "output_length": 10, "hash_ids": [5, 6, 7], "session_id": "s"},
]


def trace(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_equal_hashes_are_equal_prefixes(tmp_path: Path) -> None:
    first, second = read_requests(trace(tmp_path / "t", ROWS), 512)
    assert (first.at_s, second.at_s) == (0.0, 1.0)
    assert first.session == "s"
    one, other = first.prompt(512), second.prompt(512)
    assert (len(one), len(other)) == (1030, 1100)
    assert one[:1024] == other[:1024]
    assert one[1024:] != other[1024:1030]
    assert first.prompt(512) == one


def test_prompts_longer_than_their_hashes_end_in_tokens_of_their_own() -> None:
    request = TraceRequest(0.0, 100, 1, (1,), 64)
    assert len(request.prompt(512)) == 100
    assert request.prompt(512)[64:] != TraceRequest(0.0, 100, 1, (2,), 64).prompt(512)[64:]


def test_scaling_keeps_what_is_shared(tmp_path: Path) -> None:
    first, second = (request.scaled(16) for request in read_requests(trace(tmp_path / "t", ROWS), 512))
    assert (first.input_tokens, second.input_tokens) == (32, 34)
    assert first.prompt(512)[:32] == second.prompt(512)[:32]


@pytest.mark.parametrize("row", ["{}", "nonsense", '{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}'])
def test_a_wrong_line_is_named(tmp_path: Path, row: str) -> None:
    path = trace(tmp_path / "t", ROWS)
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(ValueError, match="line 3: not a request"):
        read_requests(path, 512)


def test_sessions_as_requests_share_their_own_past_and_one_first_block() -> None:
    requests = requests_of([Trajectory((Turn(100, 10), Turn(50, 10, 3.0), Turn(8, 2)))] * 2, 32, 1.0, 2.0)
    first = [request for request in requests if request.at_s in (0.0, 2.0, 7.0)]
    assert [request.input_tokens for request in first] == [100, 160, 178]
    assert first[1].prompt(512)[:96] == first[0].prompt(512)[:96]
    sizes: dict[int, set[int]] = {}
    for request in requests:
        for place, hash_id in enumerate(request.hash_ids):
            sizes.setdefault(hash_id, set()).add(min(32, request.input_tokens - 32 * place))
    assert all(len(found) == 1 for found in sizes.values())  # aiperf refuses a hash id of two sizes
    other = next(request for request in requests if request.at_s == 3.0)
    assert other.input_tokens == 160 and other.prompt(512)[:32] == first[0].prompt(512)[:32]
    assert other.prompt(512)[32:64] != first[0].prompt(512)[32:64]


async def test_requests_are_sent_in_time_and_in_order_of_their_session() -> None:
    sent: list[int] = []

    class Caller:
        async def turn(self, record: TurnRecord, tokens: tuple[int, ...]) -> list[int]:
            sent.append(len(tokens))
            record.finished = record.started
            return []

    requests = [TraceRequest(at, tokens, 1, (1,), 64, "s") for at, tokens in ((0.0, 10), (0.1, 11), (0.05, 12))]
    replay = await run_requests(Caller(), requests, 512, speed=10.0)
    assert sent == [10, 11, 12]
    assert [record.prompt for record in replay.records] == sent
