"""Text of the whole engine against transformers' own generate(), and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dualpath_ray.requests import SamplingParams

from .conftest import SMALL, Pair, load_pair, make_model
from .driver import Turn, complete, random_prompt, turn

NEW = 12


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize("budget", [1 << 20, 64], ids=["whole", "chunked"])
def test_a_batch_of_cold_prompts_equals_generate(pair: Pair, budget: int, block_tokens: int) -> None:
    prompts = {str(length): random_prompt(length, length) for length in (1, 17, 64, 150, 333)}
    text = complete(
        pair.model, [turn(pair.model, name, prompt) for name, prompt in prompts.items()], NEW, budget=budget, block_tokens=block_tokens
    )
    assert text == {name: pair.generate(prompt, NEW) for name, prompt in prompts.items()}


@pytest.mark.parametrize("cached", [16, 160, 304, 314], ids=lambda n: f"cached{n}")
def test_hit_kv_streamed_in_equals_generate(pair: Pair, cached: int) -> None:
    prompt = random_prompt(7, 315)
    expected = pair.generate(prompt, NEW)
    cold = turn(pair.model, "cold", prompt)
    assert complete(pair.model, [cold], NEW)["cold"] == expected
    other = turn(pair.model, "other", random_prompt(8, 40))
    warm = Turn("warm", prompt, cold.kv[:, :cached].clone())
    assert complete(pair.model, [other, warm], NEW, budget=100)["warm"] == expected


@pytest.mark.parametrize(
    "kind, more",
    [
        ("mistral", {"sliding_window": None, "num_key_value_heads": 2}),
        ("mixtral", {"num_local_experts": 4}),
        ("granite", {"logits_scaling": 3.0, "attention_multiplier": 0.5}),
    ],
)
def test_other_families_equal_generate(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    """No model code is ours: experts, scaled logits and a scaled attention come with the library."""
    pair = load_pair(make_model(kind, tmp_path, **(SMALL | more)))
    prompt = random_prompt(9, 70)
    assert complete(pair.model, [turn(pair.model, "x", prompt)], NEW, budget=48)["x"] == pair.generate(prompt, NEW)


def test_turns_of_a_conversation_equal_generate(pair: Pair) -> None:
    """KV that decode wrote serves the next turn as well as KV that prefill wrote."""
    history, kv = random_prompt(1, 50), turn(pair.model, "", []).kv
    for round_ in range(4):
        item = Turn(str(round_), history, kv)
        text = complete(pair.model, [item], NEW)[item.name]
        assert text == pair.generate(history, NEW)
        kv = item.kv[:, : item.cached // 16 * 16].clone()
        history = history + text + random_prompt(100 + round_, 20)


def test_sampled_text_does_not_depend_on_batch_chunks_or_hits(pair: Pair) -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=1234)
    prompt = random_prompt(3, 200)
    alone = turn(pair.model, "x", prompt, sampling=sampling)
    expected = complete(pair.model, [alone], NEW)["x"]
    assert expected != pair.generate(prompt, NEW)
    warm = Turn("x", prompt, alone.kv[:, :128].clone(), sampling)
    others = [turn(pair.model, str(n), random_prompt(n, 10 * n), sampling=SamplingParams(temperature=n % 2, seed=n)) for n in range(1, 5)]
    assert complete(pair.model, [*others, warm], NEW, budget=48)["x"] == expected
    reseeded = turn(pair.model, "x", prompt, sampling=SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=1235))
    assert complete(pair.model, [reseeded], NEW)["x"] != expected


def test_sampled_text_goes_on_where_it_was_cut(pair: Pair) -> None:
    """A retry on another engine takes the text so far as its prompt: prefill and decode draw the same token at a position."""
    sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=77)
    prompt = random_prompt(4, 60)
    text = complete(pair.model, [turn(pair.model, "x", prompt, sampling=sampling)], NEW)["x"]
    for cut in (1, 5):
        again = turn(pair.model, "x", prompt + text[:cut], sampling=sampling)
        assert complete(pair.model, [again], NEW - cut)["x"] == text[cut:]
