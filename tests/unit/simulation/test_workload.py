"""Synthetic sets against the published statistics, and trace files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dualpath_ray.errors import ConfigError
from dualpath_ray.simulation.trace_files import load_trajectories
from dualpath_ray.simulation.workload import PAPER_SETS, Trajectory, agents, paper_set


@pytest.mark.parametrize("name", list(PAPER_SETS))
def test_paper_sets_match_the_published_means(name: str) -> None:
    target, made = PAPER_SETS[name], paper_set(name)
    count = len(made)
    contexts: list[int] = []
    for trajectory in made:
        context = 0
        for append, generation in trajectory.turns:
            contexts.append(context + append)
            context += append + generation
        assert context <= target.max_tokens * 1.001
    assert count == 500
    assert sum(len(t.turns) for t in made) / count == pytest.approx(target.turns, rel=0.03)
    assert sum(sum(a for a, _ in t.turns) / len(t.turns) for t in made) / count == pytest.approx(target.append, rel=0.03)
    assert sum(sum(g for _, g in t.turns) / len(t.turns) for t in made) / count == pytest.approx(target.generation, rel=0.03)
    assert sum(sum(a + g for a, g in t.turns) for t in made) / count == pytest.approx(target.total, rel=0.03)
    assert sum(contexts) / len(contexts) == pytest.approx(target.context, rel=0.03)


def test_same_seed_same_set() -> None:
    assert paper_set("32K", 20, seed=3) == paper_set("32K", 20, seed=3)
    assert paper_set("32K", 20, seed=3) != paper_set("32K", 20, seed=4)


def test_copies_get_a_first_turn_of_their_own() -> None:
    base = [Trajectory(((100, 5), (10, 5)), (1.0, 1.0))]
    first, second, third = agents(base, 3)
    assert first is base[0]
    assert second.turns[1:] == base[0].turns and second.turns[0][1] == 1
    assert second.turns[0] != third.turns[0]
    assert len(second.delays) == len(second.turns)


def test_session_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        json.dumps({"cols": ["ctx_before", "append", "gen", "gen_kept", "tool_s_est"], "turns": [[0, 50, 9, 7, 1.5], [57, 3, 2, 2, 0.5]]})
    )
    assert load_trajectories(file) == [Trajectory(((50, 7), (3, 2)), (1.5, 0.5))]
    file.write_text('{"context": 70, "turns": [[5, 1]]}\n')
    assert load_trajectories(file) == [Trajectory(((5, 1),), context=70)]


def test_requests_are_chained_by_session_or_by_shared_blocks(tmp_path: Path) -> None:
    def row(at: int, length: int, blocks: list[int], session: str | None) -> str:
        fields = {"timestamp": at, "input_length": length, "output_length": 10, "hash_ids": blocks}
        return json.dumps({**fields, "session_id": session} if session else fields)

    file = tmp_path / "b.jsonl"
    file.write_text("\n".join([row(0, 100, [1, 2], "x"), row(2000, 150, [1, 2, 3], "x"), row(5, 90, [9], "y")]))
    chained = load_trajectories(file)
    assert chained == [Trajectory(((100, 10), (40, 10)), (2.0,)), Trajectory(((90, 10),))]
    file.write_text("\n".join([row(0, 100, [1, 2], None), row(2000, 150, [1, 2, 3], None), row(5, 90, [1, 9], None)]))
    assert [len(t.turns) for t in load_trajectories(file)] == [2, 1]


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        load_trajectories(tmp_path / "none")
    for text, message in (("{", "not one JSON"), ("", "is empty"), ('{"a": 1}', "neither")):
        file = tmp_path / "c.jsonl"
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_trajectories(file)
