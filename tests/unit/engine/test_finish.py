from __future__ import annotations

import pytest

from dualpath_ray.engine.finish import FinishRule
from dualpath_ray.errors import InvalidRequestError
from dualpath_ray.requests import FinishReason, GenerationRequest


@pytest.mark.parametrize(
    "token, generated, reason",
    [(7, 3, "stop"), (8, 3, None), (7, 2, None), (8, 5, "length"), (7, 5, "stop")],
)
def test_reason(token: int, generated: int, reason: FinishReason | None) -> None:
    assert FinishRule(max_new_tokens=5, min_new_tokens=2, stop_token_ids=(7,)).reason(token, generated) == reason


def test_stop_tokens_are_forbidden_until_min_new_tokens_are_there() -> None:
    rule = FinishRule(max_new_tokens=5, min_new_tokens=2, stop_token_ids=(7,))
    assert [rule.forbidden(generated) for generated in range(3)] == [(7,), (7,), ()]


def test_the_context_cuts_max_new_tokens() -> None:
    request = GenerationRequest("r", tuple(range(90)), max_new_tokens=20, min_new_tokens=1, stop_token_ids=(7,))
    assert FinishRule.for_request(request, 1000) == FinishRule(20, 1, (7,))
    assert FinishRule.for_request(request, 95) == FinishRule(5, 1, (7,))
    with pytest.raises(InvalidRequestError, match="no room"):
        FinishRule.for_request(request, 90)
