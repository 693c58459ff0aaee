"""The words for a generation request, shared by the HTTP layer, the actors and the engines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. `temperature == 0` is greedy.

    Sampling is a pure function of (logits, params, position): the noise of the token at absolute position p comes from
    `(seed, p)` alone, so batch composition, retries and restarts do not change the text (architecture.md, invariant 4).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue. `tokens` is the whole prompt; `timeout` is in seconds from submission."""

    request_id: str
    tokens: tuple[int, ...]
    max_new_tokens: int
    min_new_tokens: int = 0
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: tuple[int, ...] = ()  # end of sequence; ignored before min_new_tokens
    tenant: str = ""  # salt of the block keys; tenants never share blocks
    timeout: float = 600.0
    trace: Mapping[str, str] = field(default_factory=dict)  # W3C trace context carrier


@dataclass(frozen=True, slots=True)
class GenerationUsage:
    """What one request cost. Bytes are KV bytes read from storage, by the side whose storage NIC read them; times are seconds."""

    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    completion_tokens: int = 0
    read_bytes: Mapping[str, int] = field(default_factory=dict)  # keys: prefill_node, decode_node
    attempts: int = 1
    prefill_engine: str = ""
    decode_engine: str = ""
    queue_s: float = 0.0
    read_s: float = 0.0
    prefill_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GenerationDelta:
    """Newly generated tokens, in order. The last delta of a request has a finish_reason; `usage` is set on the first and the last."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: GenerationUsage | None = None


class Generator(Protocol):
    """What serves requests: the cluster client in production, a single-process engine in tests."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        """Stream the continuation. Closing the iterator cancels the request and frees everything it held.

        Raises InvalidRequestError, OverloadedError, DeadlineExceededError or another DualPathError.
        """
        ...
