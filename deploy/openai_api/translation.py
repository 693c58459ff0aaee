"""OpenAI's parameters to the cluster's requests."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

from deploy.openai_api.caller import Caller
from deploy.openai_api.errors import ApiError
from deploy.openai_api.requests import AgentHints, GenerationFields
from dualpath_ray.config.serving import ServingSettings
from dualpath_ray.requests import GenerationRequest, SamplingParams
from dualpath_ray.serving.model_card import ModelCard

_SEED_MASK = 2**63 - 1


def generation_requests(
    fields: GenerationFields,
    prompts: Sequence[tuple[int, ...]],
    *,
    request_id: str,
    caller: Caller,
    card: ModelCard,
    limits: ServingSettings,
    grammar: str = "",
) -> list[GenerationRequest]:
    """The requests of all choices: `n` successive ones for each of `prompts`.

    Raises ApiError where a value does not fit the model or the server's limits.
    """
    choices = fields.n or 1
    if choices * len(prompts) > limits.max_choices:
        raise ApiError(
            400,
            f"{choices * len(prompts)} answers in one request; at most {limits.max_choices} are possible (serving.max_choices)",
            param="n" if choices > 1 else fields.prompt_field,
            code="invalid_value",
        )
    first_seed = secrets.randbits(63) if fields.seed is None else fields.seed & _SEED_MASK
    requests = []
    for index, tokens in enumerate(prompts):
        for choice in range(choices):
            number = index * choices + choice
            requests.append(
                _request(
                    fields,
                    tokens,
                    request_id=f"{request_id}-{number}" if number else request_id,
                    caller=caller,
                    card=card,
                    limits=limits,
                    sampling=_sampling(fields, card.default_sampling, _choice_seed(first_seed, choice), grammar),
                )
            )
    return requests


def _request(
    fields: GenerationFields,
    tokens: tuple[int, ...],
    *,
    request_id: str,
    caller: Caller,
    card: ModelCard,
    limits: ServingSettings,
    sampling: SamplingParams,
) -> GenerationRequest:
    max_tokens = _max_tokens(fields, len(tokens), card, limits)
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise ApiError(
            400, f"min_tokens ({min_tokens}) is greater than max_tokens ({max_tokens})", param="min_tokens", code="invalid_value"
        )
    hints = fields.agent_hints or AgentHints()
    timeouts = (fields.timeout, hints.deadline_s, limits.request_timeout_s)
    return GenerationRequest(
        request_id=request_id,
        tokens=tokens,
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens,
        sampling=sampling,
        stop_token_ids=() if fields.ignore_eos else card.eos_token_ids,
        tenant=caller.tenant,
        # Neither part of the pair holds the separator: a key's salt is printable
        salt="\x1f".join(part for part in (caller.salt, fields.cache_salt) if part),
        priority=caller.priority(hints.priority),
        session=caller.session,
        next_turn_s=hints.next_turn_s,
        timeout=min(timeout for timeout in timeouts if timeout is not None),
        trace=caller.trace,
    )


def stop_strings(fields: GenerationFields, limits: ServingSettings) -> tuple[str, ...]:
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    if len(stop) > limits.max_stop_strings:
        raise ApiError(
            400, f"stop has {len(stop)} strings, at most {limits.max_stop_strings} are possible", param="stop", code="invalid_value"
        )
    return stop


def _max_tokens(fields: GenerationFields, prompt: int, card: ModelCard, limits: ServingSettings) -> int:
    wanted = fields.wanted_tokens()
    room = card.max_context - prompt
    if room < (wanted or 1):
        raise ApiError(
            400,
            f"the model's context is {card.max_context} tokens, but the request asks for {prompt + (wanted or 1)}: {prompt} in the prompt "
            f"and {wanted or 'at least 1'} to generate; shorten either",
            param=fields.prompt_field,
            code="context_length_exceeded",
        )
    if wanted is None:
        return min(limits.default_max_tokens, room)
    if limits.max_tokens_limit is not None and wanted > limits.max_tokens_limit:
        raise ApiError(400, f"max_tokens may be at most {limits.max_tokens_limit}", param="max_tokens", code="invalid_value")
    return wanted


def _sampling(fields: GenerationFields, default: SamplingParams, seed: int, grammar: str) -> SamplingParams:
    return SamplingParams(
        temperature=default.temperature if fields.temperature is None else fields.temperature,
        top_p=default.top_p if fields.top_p is None else fields.top_p,
        top_k=default.top_k if fields.top_k is None else max(fields.top_k, 0),
        seed=seed,
        min_p=fields.min_p or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        repetition_penalty=fields.repetition_penalty or 1.0,
        logit_bias=tuple(sorted((int(token), bias) for token, bias in (fields.logit_bias or {}).items())),
        grammar=grammar,
        logprobs=fields.alternatives(),
    )


def _choice_seed(seed: int, choice: int) -> int:
    """The first choice has the request's seed, so that it is the answer of a request for one."""
    if not choice:
        return seed
    digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _SEED_MASK
