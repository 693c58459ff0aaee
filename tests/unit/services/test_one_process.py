"""Outputs do not depend on where hit blocks are read, how much is a hit, or how prefill is chunked (architecture.md, invariant 4)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from dualpath_ray.engine.model import CausalModel, load_model
from dualpath_ray.engine.window import LayerWindow
from dualpath_ray.errors import ConfigError
from dualpath_ray.kv.geometry import QUANTISED_BYTES
from dualpath_ray.prefill_service import PrefillService, PrefillServiceSettings
from dualpath_ray.requests import SamplingParams
from tests.unit.services.harness import Side, read_bytes, running_system, shared_model

TURNS = 8


def reference(model: CausalModel, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy continuation, without any cache of ours."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    out = plain.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def agent_turns(seed: int, turns: int = TURNS) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, 500) for _ in range(generator.choice([5, 17, 40, 90]))] for _ in range(turns)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize("chunk_tokens", [64, 1024])
async def test_text_is_the_same_on_every_path(tiny_models, tmp_path: Path, family: str, block_tokens: int, chunk_tokens: int) -> None:
    model = shared_model(tiny_models[family])
    sides: list[Side] = ["prefill", "decode", "split"]
    history: list[int] = []
    async with running_system(model, tmp_path, block_tokens, chunk_tokens) as system:
        for turn, appended in enumerate(agent_turns(1)):
            history += appended
            expected = reference(model, history, 12)
            answers = [await system.ask(history, side) for side in (sides[turn % 3], sides[(turn + 1) % 3], "recompute")]
            partial = await system.ask(history, sides[turn % 3], max_hits=1)
            for answer in [*answers, partial]:
                assert answer.tokens == expected
            history += expected
            await system.settle()
        assert answers[0].usage.cached_tokens > 0.5 * len(history)


async def test_smollm2_gives_the_same_text_on_both_paths(smollm2_path: Path, tmp_path: Path) -> None:
    """The cut through the grid that a real model can afford on a CPU: cold, full and partial hits on either side, chunks."""
    model = shared_model(smollm2_path)
    history = [generator_token for turn in agent_turns(5, 3) for generator_token in turn][:150]
    async with running_system(model, tmp_path, block_tokens=64, chunk_tokens=64, slots=64) as system:
        for sides in (("prefill", "decode"), ("split", "recompute")):
            expected = reference(model, history, 8)
            for side in sides:
                assert (await system.ask(history, side, max_new=8)).tokens == expected
                await system.settle()
            assert (await system.ask(history, sides[0], max_new=8, max_hits=1)).tokens == expected
            history += expected + history[:20]


async def test_sampled_text_is_the_same_on_every_path(tiny_llama: Path, tmp_path: Path) -> None:
    model = shared_model(tiny_llama)
    sampling = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, seed=1234)
    history = [token for turn in agent_turns(2, 4) for token in turn]
    async with running_system(model, tmp_path) as system:
        first = await system.ask(history, "recompute", sampling=sampling, max_new=24)
        await system.settle()
        for side in ("prefill", "decode", "split"):
            assert (await system.ask(history, side, sampling=sampling, max_new=24)).tokens == first.tokens
        other = await system.ask(history, "decode", sampling=SamplingParams(0.8, 0.95, 50, seed=99), max_new=24)
    assert other.tokens != first.tokens


@pytest.mark.parametrize("side", ["prefill", "decode", "split"])
async def test_bytes_of_each_path_are_exact(tiny_llama: Path, tmp_path: Path, side: Side) -> None:
    """Must hold 2: per-path bytes equal geometry times blocks, and the decode path leaves the prefill node's staging alone."""
    prompt = [token for turn in agent_turns(3, 6) for token in turn]
    async with running_system(shared_model(tiny_llama), tmp_path) as system:
        await system.ask(prompt, "recompute")
        await system.settle()
        before = {node: gateway.stats.leases for node, gateway in system.gateways.items()}
        pushed = {node: dict(gateway.endpoint.stats.pushed_bytes) for node, gateway in system.gateways.items()}
        answer = await system.ask(prompt, side)
        hits = (len(prompt) - 1) // system.geometry.block_tokens
        full = system.geometry.full_block_bytes
        by_side = {"prefill": (hits, 0), "decode": (0, hits), "split": (hits // 2, hits - hits // 2)}[side]
        expected = {name: blocks * full for name, blocks in zip(("prefill_node", "decode_node"), by_side, strict=True) if blocks}
        assert read_bytes(answer.usage) == expected
        assert answer.usage.cached_tokens == hits * system.geometry.block_tokens

        def delta(node: str, kind: str) -> int:
            return system.gateways[node].endpoint.stats.pushed_bytes[kind] - pushed[node].get(kind, 0)

        assert delta("p0", "staging->window") == by_side[0] * full
        assert delta("p0", "staging->staging") == by_side[0] * full
        assert delta("d0", "staging->window") == by_side[1] * full
        assert delta("d0", "staging->pool") == system.geometry.blocks_for(len(prompt)) * full
        assert system.gateways["p0"].stats.leases - before["p0"] == (1 if by_side[0] else 0)


async def test_stored_blocks_that_are_computed_again_are_not_written_again(tiny_llama: Path, tmp_path: Path) -> None:
    prompt = [token for turn in agent_turns(3, 6) for token in turn]
    async with running_system(shared_model(tiny_llama), tmp_path) as system:
        first = await system.ask(prompt, "recompute", max_new=1)
        await system.settle()
        written = system.gateways["d0"].stats.persisted_blocks
        assert written == len(prompt) // system.geometry.block_tokens
        again = await system.ask(prompt, "decode", max_new=1, max_hits=2)
        await system.settle()
        assert again.tokens == first.tokens
        assert again.usage.cached_tokens == 2 * system.geometry.block_tokens
        assert system.gateways["d0"].stats.persisted_blocks == written


async def test_text_is_the_same_without_layerwise_prefill(tiny_llama: Path, tmp_path: Path) -> None:
    model = shared_model(tiny_llama)
    history: list[int] = []
    async with running_system(model, tmp_path, chunk_tokens=64, window_layers=model.geometry(16).layers, layerwise=False) as system:
        for appended in agent_turns(3, 3):
            history += appended
            expected = reference(model, history, 6)
            assert (await system.ask(history, "split", max_new=6)).tokens == expected
            history += expected
            await system.settle()
        assert system.prefill_service.stats.cached_tokens > 0


def test_without_layerwise_prefill_the_window_must_hold_all_layers(tiny_llama: Path) -> None:
    model = shared_model(tiny_llama)
    geometry = model.geometry(16)
    with pytest.raises(ConfigError, match="must hold all 4 layers"):
        PrefillService("prefill", model, geometry, LayerWindow(geometry, 2, 64), lambda _: [], PrefillServiceSettings(layerwise=False))


@pytest.mark.parametrize("kv_dtype", sorted(QUANTISED_BYTES))
async def test_quantised_text_is_the_same_on_every_path(tiny_models, tmp_path: Path, kv_dtype: str) -> None:
    model = load_model(tiny_models["llama"], kv_dtype=kv_dtype)
    sides: list[Side] = ["prefill", "decode", "split"]
    history: list[int] = []
    async with running_system(model, tmp_path, 16, 64) as system:
        for turn, appended in enumerate(agent_turns(2, 5)):
            history += appended
            expected = await system.ask(history, "recompute")
            for answer in (await system.ask(history, sides[turn % 3]), await system.ask(history, sides[(turn + 1) % 3], max_hits=2)):
                assert answer.tokens == expected.tokens
            history += expected.tokens
            await system.settle()
        again = await system.ask(history, "decode")
        hit_blocks = again.usage.cached_tokens // 16
        assert hit_blocks > 1
        assert read_bytes(again.usage) == {"decode_node": hit_blocks * system.geometry.full_block_bytes}
