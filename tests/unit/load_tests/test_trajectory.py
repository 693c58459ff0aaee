from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from load_tests.replay.paper_workload import PAPER_CONTEXTS, PAPER_TRACES, paper_trajectories, session_middles
from load_tests.replay.trace_files import read_trajectories
from load_tests.replay.trajectory import Trajectory, Turn, made_up_tokens, statistics


def test_contexts_are_all_tokens_before_a_turn() -> None:
    session = Trajectory((Turn(10, 2), Turn(5, 3), Turn(1, 1)))
    assert session.contexts() == [0, 12, 20]
    assert session.total_tokens == 22


def test_only_whole_blocks_with_kv_are_hits() -> None:
    # The 16th token of the first turn is generated last: its KV does not exist when the second turn begins.
    assert Trajectory((Turn(10, 6), Turn(1, 1))).hit_tokens(16) == 0
    assert Trajectory((Turn(10, 7), Turn(1, 1))).hit_tokens(16) == 16


def test_a_cut_session_keeps_leading_turns() -> None:
    session = Trajectory((Turn(10, 2), Turn(5, 3), Turn(1, 1)))
    assert session.cut(20).turns == session.turns[:2]
    assert session.cut(100, 1).turns == session.turns[:1]


@pytest.mark.parametrize("trace", sorted(PAPER_TRACES))
def test_whole_sessions_have_the_papers_totals(trace: str) -> None:
    paper = PAPER_TRACES[trace]
    found = statistics(paper_trajectories(20, trace))
    assert found.turns == paper.turns
    assert found.total == pytest.approx(paper.total, rel=0.05)


@pytest.mark.parametrize("trace", sorted(PAPER_TRACES))
def test_session_middles_keep_the_papers_proportions(trace: str) -> None:
    sessions = session_middles(50, trace, context=4096, turns=8)
    scale = 4096 / PAPER_CONTEXTS[trace]
    measured = [turn for session in sessions for turn in session.turns[1:]]
    contexts = [context for session in sessions for context in session.contexts()[1:]]
    assert np.mean(contexts) == pytest.approx(4096, rel=0.05)
    assert np.mean([turn.append for turn in measured]) == pytest.approx(PAPER_TRACES[trace].append * scale, rel=0.05)
    assert np.mean([turn.generate for turn in measured]) == pytest.approx(PAPER_TRACES[trace].generate * scale, rel=0.05)


def test_equal_seeds_make_equal_workloads() -> None:
    assert session_middles(3, seed=4) == session_middles(3, seed=4) != session_middles(3, seed=5)
    np.testing.assert_array_equal(made_up_tokens(1, 50, 512), made_up_tokens(1, 50, 512))


def test_both_layouts_of_trace_files(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    named = {"cols": ["ctx_before", "append", "gen", "tool_s_est"], "turns": [[0, 100, 10, 1.5], [110, 7, 3, 2.0]]}
    path.write_text(json.dumps({"turns": [[5, 2], [1, 1]]}) + "\n\n" + json.dumps(named) + "\n")
    plain, with_columns = read_trajectories(path, with_pauses=True)
    assert plain.turns == (Turn(5, 2), Turn(1, 1))
    assert with_columns.turns == (Turn(100, 10, 1.5), Turn(7, 3, 2.0))
    assert read_trajectories(path, 1) == [plain]


def test_a_line_that_is_no_session_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"turns": [[5, 2]]}\n{"cols": ["a"], "turns": [[1]]}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_trajectories(path)
