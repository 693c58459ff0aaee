"""One turn of one agent on its way through the cluster."""

from __future__ import annotations

from policies.vocabulary import Assignment


class RoundState:
    """Mutable state of a turn; times are simulated seconds."""

    __slots__ = (
        "agent",
        "arrived",
        "assignment",
        "cached",
        "chunk",
        "fetched",
        "first_token",
        "generate",
        "granted",
        "hit",
        "index",
        "new",
        "prefill_read",
        "prompt",
        "reads",
        "reads_left",
        "ready",
        "request_id",
        "second_token",
    )

    def __init__(self, agent: int, index: int, request_id: str, prompt: int, hit: int, generate: int, arrived: float) -> None:
        self.agent = agent
        self.index = index
        self.request_id = request_id
        self.prompt = prompt
        self.hit = hit
        self.cached = hit  # tokens whose KV exists
        self.new = prompt - hit  # tokens left to compute
        self.generate = generate
        self.arrived = arrived
        self.chunk = 0
        self.reads: dict[str, int] = {}  # node -> tokens that its storage NIC reads
        self.reads_left = 0  # nodes
        self.prefill_read = 0  # tokens read on the prefill node
        self.fetched = 0.0
        self.granted = 0.0
        self.ready = 0.0
        self.first_token = 0.0
        self.second_token = 0.0
        self.assignment: Assignment | None = None

    def assign(self, assignment: Assignment, block_tokens: int) -> None:
        self.assignment = assignment
        self.reads = {node_id: blocks * block_tokens for node_id, blocks in assignment.read_plan.storage_blocks().items()}
        self.prefill_read = self.reads.get(assignment.prefill_node, 0)

    def load(self, hit: int) -> None:
        """Only the first `hit` tokens are loaded, the rest is computed."""
        self.hit = self.cached = hit
        self.new = self.prompt - hit
