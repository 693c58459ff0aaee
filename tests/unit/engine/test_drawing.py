"""Penalties, bias, grammars and log probabilities: what is drawn, and that it can be resumed at any token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dualpath_ray import grammars
from dualpath_ray.engine.drawing import Draw, draw
from dualpath_ray.engine.logit_rules import LogitRules
from dualpath_ray.errors import InvalidRequestError
from dualpath_ray.grammars import Grammars
from dualpath_ray.models.tiny import END, PAD, make_tiny_model
from dualpath_ray.requests import SamplingParams
from dualpath_ray.serving.tokenizer import Tokenizer

VOCABULARY = 520  # wider than the tokenizer's, as in many models
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def compiler(directory: Path) -> Grammars:
    return Grammars(directory, VOCABULARY, (END, PAD))


def rules(params: SamplingParams, compiler: Grammars, prompt: tuple[int, ...] = (), generated: tuple[int, ...] = ()) -> LogitRules:
    return LogitRules.of(params, prompt, generated, VOCABULARY, compiler)


def applied(params: SamplingParams, compiler: Grammars, prompt: tuple[int, ...] = (), generated: tuple[int, ...] = ()) -> torch.Tensor:
    logits = torch.linspace(-1, 1, VOCABULARY)
    rules(params, compiler, prompt, generated).apply(logits)
    return logits - torch.linspace(-1, 1, VOCABULARY)


def test_frequency_and_presence_penalties_count_generated_tokens_only(compiler: Grammars) -> None:
    change = applied(SamplingParams(frequency_penalty=0.5, presence_penalty=1.0), compiler, prompt=(7, 8), generated=(8, 9, 9))
    assert change.nonzero().flatten().tolist() == [8, 9]
    torch.testing.assert_close(change[[8, 9]], torch.tensor([-1.5, -2.0]))


def test_repetition_penalty_counts_the_prompt_too(compiler: Grammars) -> None:
    change = applied(SamplingParams(repetition_penalty=2.0), compiler, prompt=(500,), generated=(10,))
    before = torch.linspace(-1, 1, VOCABULARY)
    assert change.nonzero().flatten().tolist() == [10, 500]
    torch.testing.assert_close(change[[10, 500]], torch.stack([before[10], -before[500] / 2]))


def test_bias_is_added_and_unknown_tokens_are_left_alone(compiler: Grammars) -> None:
    change = applied(SamplingParams(logit_bias=((3, -100.0), (4, 5.0), (99_999, 1.0))), compiler)
    assert {token: round(float(change[token]), 3) for token in change.nonzero().flatten().tolist()} == {3: -100.0, 4: 5.0}


@pytest.mark.parametrize("min_p", [0.1, 0.6])
def test_min_p_leaves_what_is_likely_enough(min_p: float) -> None:
    logits = torch.tensor([[0.0, -0.5, -2.0, -5.0]])
    seen = {draw(logits.clone(), [Draw(SamplingParams(1.0, min_p=min_p, seed=1), position)])[0].token for position in range(500)}
    assert seen == {token for token in range(4) if logits[0, token].exp() >= min_p}


def test_logprobs_are_the_models_whatever_is_drawn(compiler: Grammars) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, VOCABULARY)
    expected = logits.log_softmax(-1)
    biased = SamplingParams(logit_bias=((5, 100.0),), logprobs=2)
    rows = [Draw(SamplingParams(logprobs=0), 1), Draw(SamplingParams(), 1), Draw(biased, 1, rules=rules(biased, compiler))]
    first, second, third = draw(logits.clone(), rows)
    assert first.logprobs is not None and third.logprobs is not None
    assert (second.logprobs, first.logprobs.top) == (None, ())
    assert first.logprobs.logprob == pytest.approx(float(expected[0, first.token]))
    assert (third.token, third.logprobs.logprob) == (5, pytest.approx(float(expected[2, 5])))
    assert [token for token, _ in third.logprobs.top] == expected[2].topk(2).indices.tolist()


def generate(
    params: SamplingParams, compiler: Grammars, prompt: tuple[int, ...], count: int, generated: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """The continuation by a made-up model, whose logits depend on the position alone."""
    state = rules(params, compiler, prompt, generated)
    while len(generated) < count:
        position = len(prompt) + len(generated)
        logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(position))
        (drawn,) = draw(logits, [Draw(params, position, rules=state)])
        generated += (drawn.token,)
        if drawn.token in (END, PAD):
            break
        state.advance(drawn.token)
    return generated


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(0.0, frequency_penalty=0.7, presence_penalty=0.3),
        SamplingParams(1.0, seed=3, frequency_penalty=0.1, repetition_penalty=1.3, min_p=0.05),
        SamplingParams(1.0, seed=4, grammar=grammars.of_json_schema(SCHEMA)),
        SamplingParams(1.0, seed=4, presence_penalty=2.0, grammar=grammars.of_regex("[a-z]{5,30}")),
    ],
    ids=["penalties", "sampled", "schema", "regex"],
)
def test_it_can_be_resumed_at_any_token(params: SamplingParams, compiler: Grammars) -> None:
    prompt = (40, 41, 42)
    whole = generate(params, compiler, prompt, 24)
    assert len(whole) > 4
    for cut in range(len(whole)):
        assert generate(params, compiler, prompt, 24, whole[:cut]) == whole


def test_text_matches_its_schema_and_then_ends(directory: Path, compiler: Grammars) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    grammar = grammars.of_json_schema(SCHEMA)
    for seed in range(5):
        tokens = generate(SamplingParams(1.0, seed=seed, grammar=grammar), compiler, (), 400)
        assert tokens[-1] in (END, PAD)
        value = json.loads(tokenizer.decode(tokens))
        assert value["city"] in ("Oslo", "Rome") and len(value["days"]) <= 3


def test_choices_and_lark_too(directory: Path, compiler: Grammars) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    choices = grammars.of_choices(['say "yes"', "no\n", "\\d"])
    texts = {tokenizer.decode(generate(SamplingParams(1.0, seed=seed, grammar=choices), compiler, (), 99)) for seed in range(12)}
    assert texts <= {'say "yes"', "no\n", "\\d"} and len(texts) > 1
    with pytest.raises(InvalidRequestError):
        compiler.check(grammars.of_lark("start: missing"))


@pytest.mark.parametrize("grammar", [grammars.of_json_schema({"type": "objekt"}), grammars.of_regex("(a"), "no grammar at all ("])
def test_an_unusable_grammar_is_refused(grammar: str, compiler: Grammars) -> None:
    with pytest.raises(InvalidRequestError) as error:
        compiler.check(grammar)
    assert "\n" not in str(error.value)
    with pytest.raises(InvalidRequestError):
        compiler.start(grammar)


def test_tokens_that_do_not_fit_are_refused(compiler: Grammars) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be followed") as error:
        rules(SamplingParams(grammar=grammars.of_regex("x")), compiler, generated=(300,))
    assert "Tokens:" not in str(error.value)  # messages may be logged, texts not


def test_a_model_without_an_end_cannot_follow_grammars(directory: Path) -> None:
    with pytest.raises(InvalidRequestError, match="end-of-sequence"):
        Grammars(directory, None, ()).check(grammars.of_regex("x"))
