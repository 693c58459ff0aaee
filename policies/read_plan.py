"""Which node reads each hit block of a request.

Intent: keep every storage NIC of the cluster equally busy, so that a request's hit KV is complete as early as possible.
Inputs: the request, the chosen prefill and decode node, candidate nodes with their read queue, bandwidth and free slots.
Modes: `prefill_only` (Basic), `alternate` (the two sides in turn: the paper's dual path without its scheduling; each decode engine has
turns of its own, since with one turn for all and engines in turn too, every other node would read nothing), `shorter_queue`
(paper section 6: the side whose read queue is shorter; ties go to the decode node, where the bytes are needed anyway and the
prefill-to-decode copy is saved), `split` and `pool` (water filling, policies/water_filling.py, over the
two sides or over any node).
Blocks that a node's DRAM still holds are taken from there first, in every mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from policies.settings import ReadMode
from policies.vocabulary import ReadPlan, ReadSegment, RequestDemand, Source
from policies.water_filling import fill_level_shares


class ReadCandidate(NamedTuple):
    """A node that may read: queued tokens not yet read, storage bandwidth (0: unknown) and staging slots it can still lease."""

    node_id: str
    queue_tokens: int
    bandwidth: float
    free_slots: int


def plan_reads(
    request: RequestDemand,
    prefill: ReadCandidate,
    decode: ReadCandidate,
    others: Sequence[ReadCandidate] = (),
    mode: ReadMode = "shorter_queue",
    min_split_blocks: int = 1,
    use_resident: bool = True,
    turn: int = 0,
) -> ReadPlan:
    """A plan that covers each hit block exactly once, in order.

    `others` matter in mode `pool` only; `turn` counts the decode engine's requests for mode `alternate`.
    """
    resident = _resident_nodes(request, prefill.node_id, decode.node_id) if use_resident else {}
    shares = _shares(request, request.hit_blocks - len(resident), prefill, decode, others, mode, min_split_blocks, turn)
    if not resident:
        return ReadPlan(_consecutive(shares))
    missing = [position for position in range(request.hit_blocks) if position not in resident]
    owners: list[tuple[str, Source]] = [("", "storage")] * request.hit_blocks
    for position, node_id in resident.items():
        owners[position] = (node_id, "dram")
    start = 0
    for node_id, blocks in shares:
        for position in missing[start : start + blocks]:
            owners[position] = (node_id, "storage")
        start += blocks
    return ReadPlan(_segments(owners))


def reading_sides(mode: ReadMode, prefill: ReadCandidate, decode: ReadCandidate, blocks: int, turn: int = 0) -> list[ReadCandidate]:
    """The nodes of the request among which its storage reads are divided."""
    if mode == "prefill_only" or prefill.node_id == decode.node_id:
        return [prefill]
    if mode == "alternate":
        return [(prefill, decode)[turn % 2]]
    if mode == "shorter_queue":
        on_prefill = prefill.queue_tokens < decode.queue_tokens and prefill.free_slots >= blocks
        return [prefill if on_prefill else decode]
    return [prefill, decode]


def _resident_nodes(request: RequestDemand, prefill_node: str, decode_node: str) -> dict[int, str]:
    """Node that serves each DRAM-resident position: the decode node, else the prefill node, else the first by name."""
    nodes: dict[int, str] = {}
    for node_id in sorted(request.resident, key=lambda node: (node != decode_node, node != prefill_node, node)):
        for position in request.resident[node_id]:
            if 0 <= position < request.hit_blocks:
                nodes.setdefault(position, node_id)
    return nodes


def _shares(
    request: RequestDemand,
    blocks: int,
    prefill: ReadCandidate,
    decode: ReadCandidate,
    others: Sequence[ReadCandidate],
    mode: ReadMode,
    min_split_blocks: int,
    turn: int,
) -> list[tuple[str, int]]:
    """How many storage blocks each node reads, prefill node first. The decode node's slots are leased for the whole prompt already."""
    if blocks == 0:
        return []
    candidates = reading_sides(mode, prefill, decode, blocks, turn)
    if mode == "pool":
        sides = {prefill.node_id, decode.node_id}
        candidates += [other for other in others if other.node_id not in sides]
    if len(candidates) == 1:
        return [(candidates[0].node_id, blocks)]
    limits = [blocks if c.node_id == decode.node_id else max(0, min(blocks, c.free_slots)) for c in candidates]
    shares = fill_level_shares(
        blocks,
        [c.queue_tokens / request.block_tokens for c in candidates],
        [c.bandwidth for c in candidates],
        limits,
        min_split_blocks,
    )
    return [(c.node_id, share) for c, share in zip(candidates, shares, strict=True) if share]


def _consecutive(shares: Sequence[tuple[str, int]]) -> tuple[ReadSegment, ...]:
    segments: list[ReadSegment] = []
    start = 0
    for node_id, blocks in shares:
        segments.append(ReadSegment(node_id, start, blocks, "storage"))
        start += blocks
    return tuple(segments)


def _segments(owners: Sequence[tuple[str, Source]]) -> tuple[ReadSegment, ...]:
    """Runs of equal owners."""
    segments: list[ReadSegment] = []
    start = 0
    for position in range(1, len(owners) + 1):
        if position == len(owners) or owners[position] != owners[start]:
            node_id, source = owners[start]
            segments.append(ReadSegment(node_id, start, position - start, source))
            start = position
    return tuple(segments)
