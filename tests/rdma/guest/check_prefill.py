"""Turns of a session between two processes over RDMA: the second one reads its hits on the decode side and computes on the other."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from pathlib import Path

from dualpath_ray.engine.model import load_model
from tests.rdma.guest.two_hosts import DecodeHost, RemotePrefill, serve_prefill
from tests.rdma.guest.wire import DATA, Capture

OUT = Path("/out")
PREFILL_ADDRESS, DECODE_ADDRESS = "10.9.0.1", "10.9.0.2"


def test_text_of_a_prefill_over_rdma_is_the_same() -> None:
    """The expected tokens are transformers' own, computed on the host."""
    turns = json.loads((OUT / "turns.json").read_text(encoding="ascii"))
    model = load_model(OUT / "model")
    path = Path("/tmp/prefill.sock")
    # Forked before either has an agent: importing torch takes minutes here.
    process = multiprocessing.get_context("fork").Process(
        target=lambda: asyncio.run(serve_prefill(model, "rxe0", path)), daemon=True
    )  # fmt: skip
    process.start()
    try:
        with Capture("v0") as capture:
            hits = asyncio.run(_session(DecodeHost(model, "rxe1", Path("/tmp/store"), RemotePrefill(path)), turns))
    finally:
        process.kill()
    assert hits[0] == 0 and hits[1] > 4
    for source, destination in ((PREFILL_ADDRESS, DECODE_ADDRESS), (DECODE_ADDRESS, PREFILL_ADDRESS)):  # new KV, and hits
        sent = capture.dscps(source, DATA, destination)
        assert set(sent) == {18} and sent[18] > 10, (source, destination, sent)


async def _session(host: DecodeHost, turns: list[dict[str, list[int]]]) -> list[int]:
    await host.start()
    hits = []
    for number, turn in enumerate(turns):
        tokens, found = await host.ask(f"turn{number}", turn["prompt"], len(turn["expected"]))
        assert tokens == turn["expected"]
        await host.settle()
        hits.append(found)
    await host.close()
    return hits
