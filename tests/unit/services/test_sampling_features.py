"""Penalties, bias, grammars and log probabilities through prefill and decode engine, and resumed after the loss of either."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dualpath_ray import grammars
from dualpath_ray.engine.model import CausalModel
from dualpath_ray.errors import InvalidRequestError
from dualpath_ray.requests import GenerationRequest, SamplingParams, TokenLogprobs
from dualpath_ray.serving.tokenizer import Tokenizer
from tests.unit.services.harness import System, running_system, shared_model

PROMPT = [int(token) for token in torch.randint(3, 500, (70,), generator=torch.Generator().manual_seed(5))]
PARAMETERS = {
    "penalties": SamplingParams(frequency_penalty=0.9, presence_penalty=0.5, logprobs=3),
    "sampled": SamplingParams(1.0, seed=7, min_p=0.02, repetition_penalty=1.2, logit_bias=((20, 4.0), (21, -100.0)), logprobs=0),
    "grammar": SamplingParams(1.0, seed=8, grammar=grammars.of_regex(r"[a-z ]{8,40}"), logprobs=1),
}


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> CausalModel:
    return shared_model(tiny_models["llama"])


async def texts(system: System, request: GenerationRequest) -> tuple[list[int], list[TokenLogprobs]]:
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    async for delta in system.stream(request, "split"):
        tokens += delta.tokens
        logprobs += delta.logprobs
    return tokens, logprobs


@pytest.mark.parametrize("name", PARAMETERS)
async def test_an_attempt_goes_on_where_another_stopped(model: CausalModel, tmp_path: Path, name: str) -> None:
    async with running_system(model, tmp_path) as system:
        whole = system.request(PROMPT, 14, sampling=PARAMETERS[name], stop_token_ids=model.eos_token_ids)
        tokens, logprobs = await texts(system, whole)
        assert len(tokens) == len(logprobs) > 5
        for cut in (1, 2, len(tokens) - 1):
            rest = replace(
                whole,
                request_id=f"cut-{cut}",
                tokens=(*whole.tokens, *tokens[:cut]),
                max_new_tokens=14 - cut,
                resumed_tokens=cut,
            )
            again, again_logprobs = await texts(system, rest)
            assert again == tokens[cut:]
            assert [one.logprob for one in again_logprobs] == pytest.approx([one.logprob for one in logprobs[cut:]], abs=1e-4)


async def test_logprobs_are_those_of_the_model(model: CausalModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    async with running_system(model, tmp_path) as system:
        tokens, logprobs = await texts(system, system.request(PROMPT, 10, sampling=PARAMETERS["penalties"]))
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT + tokens])).logits[0].log_softmax(-1)[len(PROMPT) - 1 : -1]
    for position, (token, told) in enumerate(zip(tokens, logprobs, strict=True)):
        assert told.logprob == pytest.approx(float(expected[position, token]), abs=1e-3)
        best = expected[position].topk(3)
        assert [one for one, _ in told.top] == best.indices.tolist()
        assert [value for _, value in told.top] == pytest.approx(best.values.tolist(), abs=1e-3)


async def test_a_schema_is_followed_by_both_engines(model: CausalModel, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"], "additionalProperties": False}
    sampling = SamplingParams(1.0, seed=1, grammar=grammars.of_json_schema(schema))
    async with running_system(model, tmp_path) as system:
        answer = await system.ask(PROMPT, "prefill", 60, sampling=sampling, stop_token_ids=model.eos_token_ids)
    assert answer.finish_reason == "stop"
    assert set(json.loads(Tokenizer.from_directory(model.path).decode(answer.tokens))) == {"n"}


async def test_a_bad_grammar_fails_its_request_alone(model: CausalModel, tmp_path: Path) -> None:
    async with running_system(model, tmp_path) as system:
        with pytest.raises(InvalidRequestError, match="grammar"):
            await system.ask(PROMPT, "prefill", sampling=SamplingParams(grammar=grammars.of_regex("(")))
        assert len((await system.ask(PROMPT, "prefill", 3)).tokens) == 3
