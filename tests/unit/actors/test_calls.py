"""Calls between actors raise the package's own errors, whatever Ray raises."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import RayError

from actors.calls import ActorCalls
from dualpath_ray.errors import TransferError, UnansweredError


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(ValueError("no such actor"), TransferError), (RayError("the head does not answer"), UnansweredError)],
)
async def test_an_actor_that_cannot_be_looked_up_is_a_retryable_error(
    raised: Exception, expected: type[TransferError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_actor(*arguments: Any, **options: Any) -> Any:
        raise raised

    monkeypatch.setattr(ray, "get_actor", get_actor)
    calls = ActorCalls("namespace")
    with pytest.raises(expected, match="decode-0") as caught:
        await calls.call("decode-0", "generate")
    assert type(caught.value) is expected
    assert caught.value.retryable
    calls.send("decode-0", "cancel")  # waits for nothing, and so has nothing to say
