"""OpenAI's parameters to the cluster's request."""

from __future__ import annotations

import secrets

from deploy.openai_api.caller import Caller
from deploy.openai_api.errors import ApiError
from deploy.openai_api.requests import GenerationFields
from dualpath_ray.config.serving import ServingSettings
from dualpath_ray.requests import GenerationRequest, SamplingParams
from dualpath_ray.serving.model_card import ModelCard

_SEED_MASK = 2**63 - 1


def generation_request(
    fields: GenerationFields, tokens: tuple[int, ...], *, request_id: str, caller: Caller, card: ModelCard, limits: ServingSettings
) -> GenerationRequest:
    """The request for a prompt of `tokens`. Raises ApiError where a value does not fit the model or the server's limits."""
    max_tokens = _max_tokens(fields, len(tokens), card, limits)
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise ApiError(
            400, f"min_tokens ({min_tokens}) is greater than max_tokens ({max_tokens})", param="min_tokens", code="invalid_value"
        )
    return GenerationRequest(
        request_id=request_id,
        tokens=tokens,
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens,
        sampling=_sampling(fields, card.default_sampling),
        stop_token_ids=() if fields.ignore_eos else card.eos_token_ids,
        # X-Tenant holds no control characters, so that no tenant and salt read like another pair
        tenant=f"{caller.tenant}\x1f{fields.cache_salt}" if fields.cache_salt else caller.tenant,
        timeout=min(fields.timeout or limits.request_timeout_s, limits.request_timeout_s),
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


def _sampling(fields: GenerationFields, default: SamplingParams) -> SamplingParams:
    seed = secrets.randbits(63) if fields.seed is None else fields.seed & _SEED_MASK
    return SamplingParams(
        temperature=default.temperature if fields.temperature is None else fields.temperature,
        top_p=default.top_p if fields.top_p is None else fields.top_p,
        top_k=default.top_k if fields.top_k is None else max(fields.top_k, 0),
        seed=seed,
    )
