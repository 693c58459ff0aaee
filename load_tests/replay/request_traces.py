"""Traces of single requests with the hashes of their prompts' blocks, as Mooncake publishes them: JSON lines of

`{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...], "session_id": optional}`.

Equal hash ids are equal blocks after equal blocks, so prompts made of them share exactly the prefixes that the traced ones shared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from load_tests.replay.trajectory import Trajectory, made_up_tokens

TAIL_SEED = 1 << 40  # what is not a whole block is nobody else's
OWN_IDS = 1_000_000  # hash ids set aside for each session


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`at_s` counts from the trace's start. `hash_ids` name the prompt's blocks of `block_tokens`; the last one may be partial."""

    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]
    block_tokens: int
    session: str = ""

    def prompt(self, vocabulary: int) -> tuple[int, ...]:
        """Tokens without meaning: the same for the same blocks, and beyond the named blocks like those of no other block."""
        tokens: list[int] = []
        for hash_id in self.hash_ids:
            tokens += made_up_tokens(hash_id, self.block_tokens, vocabulary).tolist()
        if len(tokens) < self.input_tokens:
            last = self.hash_ids[-1] if self.hash_ids else 0
            tokens += made_up_tokens(TAIL_SEED + last, self.input_tokens - len(tokens), vocabulary).tolist()
        return tuple(tokens[: self.input_tokens])

    def scaled(self, block_tokens: int) -> TraceRequest:
        """The same with blocks of another size, and all lengths in proportion."""
        factor = block_tokens / self.block_tokens
        shorter = max(1, round(self.input_tokens * factor)), max(1, round(self.output_tokens * factor))
        return replace(self, input_tokens=shorter[0], output_tokens=shorter[1], block_tokens=block_tokens)

    def as_row(self) -> dict[str, object]:
        """As in a trace file."""
        row = {"timestamp": round(self.at_s * 1000), "input_length": self.input_tokens, "output_length": self.output_tokens}
        return {**row, "hash_ids": list(self.hash_ids), **({"session_id": self.session} if self.session else {})}


def read_requests(path: Path, block_tokens: int, count: int | None = None) -> list[TraceRequest]:
    """The first `count` requests, with times from the first one's. Raises ValueError naming the line that is not understood."""
    found: list[TraceRequest] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if count is not None and len(found) == count:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                hash_ids = tuple(int(each) for each in row["hash_ids"])
                lengths = int(row["input_length"]), int(row["output_length"])
                if min(lengths) < 1:
                    raise ValueError("lengths must be at least 1")
                found.append(TraceRequest(float(row["timestamp"]) / 1000, *lengths, hash_ids, block_tokens, str(row.get("session_id", ""))))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number}: not a request: {error}") from error
    first = min((request.at_s for request in found), default=0.0)
    return sorted((replace(request, at_s=request.at_s - first) for request in found), key=lambda request: request.at_s)


def requests_of(trajectories: Iterable[Trajectory], block_tokens: int, agents_per_s: float, turn_s: float) -> list[TraceRequest]:
    """Sessions as a trace of requests: one starts every 1/`agents_per_s`, a turn comes `turn_s` and its pause after the one before.

    All sessions begin with one common block, as with a common system prompt; the rest is each one's own. As in published traces, a partial
    last block has an id that no whole block has.
    """
    found = []
    for agent, trajectory in enumerate(trajectories):
        at, context = agent / agents_per_s, 0
        for number, turn in enumerate(trajectory.turns):
            prompt = context + turn.append
            own = agent * OWN_IDS
            ids = tuple(own + block if block else 0 for block in range(prompt // block_tokens))
            if prompt % block_tokens:
                ids += (own + OWN_IDS // 2 + number,)
            found.append(TraceRequest(at, prompt, turn.generate, ids, block_tokens))
            context = prompt + turn.generate
            at += turn_s + turn.pause_s
    return sorted(found, key=lambda request: request.at_s)
