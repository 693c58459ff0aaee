"""What the client asks of the next attempt when one has died."""

from __future__ import annotations

import time

from actors.client import _attempt
from dualpath_ray.requests import GenerationRequest, SamplingParams


def test_an_attempt_says_which_tokens_were_generated() -> None:
    """Penalties and grammars count those, and not the prompt."""
    sampling = SamplingParams(frequency_penalty=1.0, logprobs=2)
    request = GenerationRequest("r", (1, 2, 3), 10, min_new_tokens=4, sampling=sampling, salt="s", priority=3)
    deadline = time.monotonic() + 60
    first = _attempt(request, [], deadline, {})
    assert (first.tokens, first.resumed_tokens, first.max_new_tokens) == ((1, 2, 3), 0, 10)
    second = _attempt(request, [7, 8], deadline, {})
    assert (second.tokens, second.resumed_tokens) == ((1, 2, 3, 7, 8), 2)
    assert (second.max_new_tokens, second.min_new_tokens) == (8, 2)
    assert (second.sampling, second.block_salt, second.priority) == (sampling, "\x1fs", 3)
