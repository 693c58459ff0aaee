"""Eviction policies against sequences worked out by hand, traces as uses of blocks, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from load_tests.eviction.__main__ import SIZES, main
from load_tests.eviction.policies import POLICIES
from load_tests.eviction.replay import hits_of, optimum
from load_tests.eviction.uses import Uses, read_uses, uses_of_requests, uses_of_sessions
from load_tests.replay.request_traces import TraceRequest
from load_tests.replay.trajectory import Trajectory, Turn


@pytest.mark.parametrize(
    ("policy", "capacity", "sequence", "hits", "left"),
    [
        # d pushes out a, the oldest, although a has just been used; so a misses and pushes out b.
        ("fifo", 3, "abcada", [3], "acd"),
        # d pushes out b, the least recently used.
        ("lru", 3, "abcada", [3, 5], "acd"),
        # e pushes a out of the queue of new keys; a comes back while it is remembered, and outlives the scan f to j.
        ("2q", 4, "abcdeafghija", [11], "ahij"),
        # b and c leave as keys used once, and only c is still remembered when it comes back: once more of them may stay, d leaves.
        ("arc", 4, "abacdefca", [2, 8], "acef"),
        # e finds a used: it moves on to the main queue, b leaves and is remembered, so it joins a there when it comes back.
        ("s3-fifo", 4, "abacdefba", [2, 8], "abef"),
    ],
)
def test_a_sequence_worked_out_by_hand(policy: str, capacity: int, sequence: str, hits: list[int], left: str) -> None:
    cache, found = POLICIES[policy](capacity), []
    for place, letter in enumerate(sequence):
        key = letter.encode()
        if key in cache:
            found.append(place)
            cache.touch(key)
        else:
            cache.insert(key)
        assert len(cache) <= capacity
    assert found == hits
    assert {letter for letter in sequence if letter.encode() in cache} == set(left)


@pytest.mark.parametrize(("capacity", "hits"), [(1, 1), (2, 2), (3, 3)])
def test_the_optimum_keeps_what_is_needed_first(capacity: int, hits: int) -> None:
    requests = [Uses((), (b"a", b"b", b"c")), Uses((b"a",), ()), Uses((b"c",), ()), Uses((b"b",), ())]
    assert optimum(capacity, requests) == hits


LETTERS = st.lists(st.sampled_from([bytes([number]) for number in range(12)]), max_size=4, unique=True)


@given(st.lists(LETTERS, max_size=40), st.integers(1, 8))
def test_no_policy_beats_the_optimum_or_holds_too_much(asked: list[list[bytes]], capacity: int) -> None:
    made: set[bytes] = set()
    requests = []
    for keys in asked:
        requests.append(Uses(tuple(key for key in keys if key in made), tuple(key for key in keys if key not in made)))
        made.update(keys)
    best = optimum(capacity, requests)
    for policy in POLICIES.values():
        cache = policy(capacity)
        assert hits_of(cache, requests) <= best
        assert len(cache) == min(capacity, len(made))


def test_a_load_is_a_whole_block_behind_whole_blocks_that_exist() -> None:
    def request(tokens: int, *ids: int) -> TraceRequest:
        return TraceRequest(0.0, tokens, 1, ids, 1)

    requests = [request(35, 1, 2, 3), request(48, 1, 2, 4), request(48, 1, 9, 4), request(32, 1, 2)]
    found = [([key[-1] for key in uses.loads], [key[-1] for key in uses.makes]) for uses in uses_of_requests(requests)]
    # Blocks of 16: the third one of the first request is a partial one.
    assert found == [([], [1, 2]), ([1, 2], [4]), ([1], [9]), ([1, 2], [])]


def test_a_session_loads_what_its_turns_before_have_made() -> None:
    sessions = [Trajectory((Turn(10, 7), Turn(1, 14), Turn(1, 1))), Trajectory(()), Trajectory((Turn(40, 1),))]
    found = list(uses_of_sessions(sessions, 16, agents=1, turn_s=1.0))
    assert [(len(uses.loads), len(uses.makes)) for uses in found] == [(0, 1), (1, 0), (1, 1), (0, 2)]
    assert found[2].loads == found[0].makes
    assert not set(found[3].makes) & {*found[0].makes, *found[2].makes}


def test_sessions_take_turns_and_pauses_hold_them_up() -> None:
    quick, slow = (Trajectory(tuple(Turn(16, 16, pause) for _ in range(4))) for pause in (0.0, 1e6))
    order = [uses.makes[0][:4] for uses in uses_of_sessions([slow, quick, quick], 16, agents=2, turn_s=1.0)]
    first, second, third = (number.to_bytes(4, "big") for number in range(3))
    assert [name for name in order if name != first] == [second] * 4 + [third] * 4
    assert order[-3:] == [first] * 3


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.output


def test_the_command_without_files(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--count", "8", "--agents", "4", "--json", "--plots", str(tmp_path)])
    assert result.exit_code == 0
    found = json.loads(result.stdout)["traces"]["made up"]
    assert set(found["ratios"]) == {"fifo", "lru", "2q", "arc", "s3-fifo", "optimum"}
    assert found["loads"] > found["blocks"] > 0
    for ratios in found["ratios"].values():
        assert len(ratios) == len(SIZES) and all(0 <= ratio <= best for ratio, best in zip(ratios, found["ratios"]["optimum"], strict=True))
    assert (tmp_path / "eviction.png").stat().st_size > 10_000


def test_the_command_reads_both_kinds_of_trace(tmp_path: Path) -> None:
    requests, sessions = tmp_path / "requests.jsonl", tmp_path / "sessions.jsonl"
    rows = [{"timestamp": at, "input_length": 40, "output_length": 2, "hash_ids": [0, 1, 10 + at % 3]} for at in range(30)]
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sessions.write_text(json.dumps({"turns": [[600, 30], [50, 20], [50, 20]]}) + "\n")
    status, output = run(str(requests), str(sessions))
    assert status == 0 and "requests" in output and "sessions" in output
    assert len(read_uses(sessions, 64, 1, 1.0)) == 3


@pytest.mark.parametrize("line", ["not json", '{"hash_ids": [1]}', '{"cols": ["a"], "turns": [[1]]}'])
def test_a_file_that_is_no_trace_is_refused_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line + "\n")
    status, output = run(str(path))
    assert status == 2 and "line 1" in output and "Traceback" not in output
