from __future__ import annotations

import numpy as np
import pytest
import torch

from dualpath_ray.engine.decode import DecodeRunner, DecodeSequence, StepOutput
from dualpath_ray.engine.finish import FinishRule
from dualpath_ray.engine.pool import PagedPool
from dualpath_ray.errors import InvalidRequestError, OverloadedError
from dualpath_ray.requests import SamplingParams

from .conftest import Pair
from .driver import Turn, join, prefill, random_prompt, turn

BLOCK = 16


class Batch:
    """A decode batch over a pool full of NaN, and prompts prefilled for it."""

    def __init__(self, pair: Pair, blocks: int = 64, max_batch: int = 8) -> None:
        self.pair = pair
        self.pool = PagedPool(pair.model.geometry(BLOCK), blocks)
        self.pool.tensor.fill_(float("nan"))
        self.runner = DecodeRunner(pair.model, self.pool, max_batch)
        self.text: dict[str, list[int]] = {}

    def start(self, name: str, prompt: list[int], finish: FinishRule, blocks: list[int] | None = None) -> Turn:
        item = turn(self.pair.model, name, prompt)
        first = prefill(self.pair.model, [item])[name]
        join(self.runner, self.pool, item, first, finish, blocks)
        self.text[name] = [first]
        return item

    def step(self) -> list[StepOutput]:
        outputs = self.runner.step()
        for output in outputs:
            self.text[output.request_id].append(output.token)
        return outputs

    def drain(self) -> None:
        while len(self.runner):
            self.step()


@pytest.mark.parametrize("blocks", [[9, 10, 11, 12], [3, 60, 7, 31], [8, 7, 6, 5], [20, 21, 30, 31]], ids=str)
def test_text_does_not_depend_on_where_the_blocks_lie(pair: Pair, blocks: list[int]) -> None:
    batch = Batch(pair)
    prompt = random_prompt(5, 30)
    batch.start("a", prompt, FinishRule(30), blocks)
    batch.drain()
    assert batch.text["a"] == pair.generate(prompt, 30)


def test_sequences_join_and_leave_between_steps(pair: Pair) -> None:
    batch = Batch(pair)
    prompts = {name: random_prompt(seed, 20 + 13 * seed) for seed, name in enumerate("abcd")}
    batch.start("a", prompts["a"], FinishRule(20))
    batch.step()
    batch.start("b", prompts["b"], FinishRule(9))
    batch.start("c", prompts["c"], FinishRule(20))
    for _ in range(4):
        batch.step()
    assert batch.runner.remove("c")
    assert not batch.runner.remove("c")
    batch.start("d", prompts["d"], FinishRule(12))
    batch.drain()
    assert batch.text["c"] == pair.generate(prompts["c"], 5)
    for name, length in (("a", 20), ("b", 9), ("d", 12)):
        assert batch.text[name] == pair.generate(prompts[name], length)
    assert batch.runner.step() == []


def test_kv_tokens_counts_what_is_in_the_pool(llama: Pair) -> None:
    """The caller persists blocks by this number: the rows below it are written, the next one is not."""
    batch = Batch(llama)
    batch.start("a", random_prompt(1, 30), FinishRule(10), [5, 40, 41])
    rows = torch.cat([batch.pool.tensor[:, block] for block in (5, 40, 41)], dim=1)
    assert not rows[:, :30].isnan().any()
    for expected in range(31, 35):
        (output,) = batch.step()
        assert output.kv_tokens == expected
        rows = torch.cat([batch.pool.tensor[:, block] for block in (5, 40, 41)], dim=1)
        assert not rows[:, :expected].isnan().any()
        assert rows[:, expected:].isnan().all()


def test_a_stop_token_ends_a_sequence_but_not_before_min_new_tokens(llama: Pair) -> None:
    prompt = random_prompt(2, 40)
    free = llama.generate(prompt, 20)
    stop = next(token for index, token in enumerate(free) if index >= 4 and token not in free[:index])
    at = free.index(stop) + 1

    batch = Batch(llama)
    batch.start("stops", prompt, FinishRule(20, 0, (stop,)))
    batch.start("at_min", prompt, FinishRule(20, at - 1, (stop,)))
    batch.start("masked", prompt, FinishRule(20, at, (stop,)))
    reasons = {}
    while len(batch.runner):
        reasons |= {output.request_id: output.finish_reason for output in batch.step()}
    assert batch.text["stops"] == batch.text["at_min"] == free[:at]
    assert reasons == {"stops": "stop", "at_min": "stop", "masked": reasons["masked"]}
    assert batch.text["masked"][: at - 1] == free[: at - 1]
    assert batch.text["masked"][at - 1] != stop


def test_max_new_tokens_ends_with_length(llama: Pair) -> None:
    batch = Batch(llama)
    batch.start("a", random_prompt(2, 20), FinishRule(2))
    assert [(output.finish_reason, output.kv_tokens) for output in batch.step()] == [("length", 21)]
    assert len(batch.runner) == 0


def test_a_full_batch_pushes_back(llama: Pair) -> None:
    batch = Batch(llama, max_batch=1)
    batch.start("a", random_prompt(1, 20), FinishRule(5))
    assert not batch.runner.can_admit()
    with pytest.raises(OverloadedError, match="max_batch"):
        batch.start("b", random_prompt(1, 20), FinishRule(5))
    batch.runner.remove("a")
    assert batch.runner.can_admit()


def sequence(name: str = "x", prompt_len: int = 20, blocks: int = 2, finish: FinishRule | None = None) -> DecodeSequence:
    return DecodeSequence(name, prompt_len, 5, np.arange(blocks, dtype=np.int32), SamplingParams(), finish or FinishRule(8))


@pytest.mark.parametrize(
    "bad, message",
    [
        (sequence(blocks=1), "1 KV blocks given, 2 needed"),
        (sequence(prompt_len=4090, blocks=256, finish=FinishRule(7)), "context"),
        (sequence(finish=FinishRule(1)), "ended"),
        (sequence(finish=FinishRule(8, 0, (5,))), "ended"),
        (sequence(name="running"), "already"),
    ],
)
def test_sequences_that_cannot_run_are_refused(llama: Pair, bad: DecodeSequence, message: str) -> None:
    batch = Batch(llama, blocks=256)
    batch.runner.admit(sequence("running"))
    with pytest.raises(InvalidRequestError, match=message):
        batch.runner.admit(bad)
    assert len(batch.runner) == 1


def test_a_pool_of_another_shape_is_refused(llama: Pair) -> None:
    geometry = llama.model.geometry(BLOCK)
    other = type(geometry)(geometry.layers, geometry.kv_heads * 2, geometry.head_dim, geometry.dtype, BLOCK)
    with pytest.raises(ValueError, match="does not fit"):
        DecodeRunner(llama.model, PagedPool(other, 4), 1)
