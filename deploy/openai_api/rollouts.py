"""A whole agent's rollout as one line of a batch: several turns of one conversation, each with what the model said before.

The body is that of a chat completion with `turns` in place of `messages`: a list of lists of messages. The first turn's are the prompt,
each later turn's (tool results, the user's next words) follow the model's answer to the turn before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from deploy.openai_api.caller import Caller
from deploy.openai_api.errors import ApiError
from deploy.openai_api.messages import ChatMessage
from deploy.openai_api.reply import JsonReply, json_object
from deploy.openai_api.service import CHAT, OpenAIService

ROLLOUT = "/v1/rollouts"


class RolloutFields(BaseModel):
    """What a rollout has beside the fields of its chat completions."""

    model_config = ConfigDict(strict=True)

    turns: list[list[ChatMessage]] = Field(min_length=1, max_length=10_000)


async def rollout(service: OpenAIService, body: Mapping[str, Any], caller: Caller) -> JsonReply:
    """All turns, one after the other: `{"object": "rollout", "turns": [chat completion, ...]}`.

    A turn that is refused ends the rollout with its status; the body is its error and the turns before it, so that a retry (the turn is
    the same again) finds their KV-Cache. Turns of one rollout are one session.
    """
    if body.get("n") not in (None, 1) or "messages" in body:
        raise ApiError(400, "a rollout has turns, not messages, and one answer each", param="turns", code="invalid_value")
    RolloutFields.model_validate(dict(body))
    shared = {name: value for name, value in body.items() if name != "turns"}
    messages: list[Any] = []
    done: list[Any] = []
    for number, turn in enumerate(body["turns"]):
        messages += turn
        caller_of_turn = replace(caller, request_id=f"{caller.request_id}-{number}", session=caller.session or caller.request_id)
        reply = await service.generate(CHAT, {**shared, "messages": messages}, caller_of_turn)
        assert isinstance(reply, JsonReply)  # streams are refused in batches
        answer = json.loads(reply.body)
        if reply.status != 200:
            return json_object({**answer, "object": "rollout", "turns": done}, reply.status)
        done.append(answer)
        messages.append({name: value for name, value in answer["choices"][0]["message"].items() if value is not None})
    return json_object({"object": "rollout", "turns": done})
