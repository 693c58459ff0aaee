"""How many engines there are, and where Ray puts them."""

from __future__ import annotations

from typing import Literal

from pydantic import ByteSize, Field

from dualpath_ray.config.section import Count, Delay, Nodes, Seconds, Section
from policies.pd_ratio import violations


class ClusterSettings(Section):
    """The `cluster` section. A *node* here is one gateway with the engines beside it, all prefill or all decode."""

    prefill_nodes: Nodes = Field(default=1, description="Nodes whose engines prefill.")
    decode_nodes: Nodes = Field(default=1, description="Nodes whose engines decode.")
    engines_per_node: Count = Field(default=1, description="Engines beside each gateway, one per GPU.")
    placement: Literal["logical", "spread"] = Field(
        default="logical",
        description="logical: nodes may share a machine (laptop, tests); spread: every node on a machine of its own (STRICT_SPREAD).",
    )
    address: str = Field(default="local", description="Ray cluster to join: an address, auto, or local to start one for this run.")
    namespace: str = Field(
        default="dualpath", min_length=1, description="Ray namespace of the actors; two systems on one cluster need two."
    )
    engine_cpus: Delay = Field(default=0.0, description="CPUs that Ray books for each engine (bookkeeping only; it limits nothing).")
    engine_gpus: Delay = Field(
        default=0.0,
        description="GPUs that Ray books for each engine; 1 on GPU nodes, so that each sees its own. 0 with placement logical: an even "
        "share of the machine's.",
    )
    prefill_resources: dict[str, float] = Field(
        default={}, description="Custom Ray resources each prefill node must have, e.g. {dp_prefill: 1}."
    )
    decode_resources: dict[str, float] = Field(default={}, description="Custom Ray resources each decode node must have.")
    prefill_labels: dict[str, str] = Field(default={}, description="Ray node labels that prefill nodes must have, e.g. {dp.role: prefill}.")
    decode_labels: dict[str, str] = Field(default={}, description="Ray node labels that decode nodes must have.")
    start_timeout_s: Seconds = Field(default=180.0, description="How long placement and the start of all actors may take.")
    health_timeout_s: Seconds = Field(
        default=20.0,
        description="A process whose load reports have stopped for this long is killed and started again (Ray never notices a hung actor).",
    )
    node_fence_s: Seconds = Field(
        default=75.0,
        description="When Ray has lost a node, how long processes there may live on: memory they could write to is kept until then. More "
        "than Ray's RAY_gcs_rpc_server_reconnect_timeout_s (60 s), after which a node that is cut off ends itself.",
    )
    snic_bandwidth: ByteSize = Field(
        default=ByteSize(0),
        description="A node's storage NIC in bytes/s. With cnic_bandwidth, the ratio of nodes is checked; 0: not known.",
    )
    cnic_bandwidth: ByteSize = Field(default=ByteSize(0), description="One GPU's compute NIC in bytes/s; 0: not known.")
    memory_bandwidth: ByteSize = Field(
        default=ByteSize(500 * 10**9), ge=1, description="A node's DRAM in bytes/s, for the check of the ratio of nodes."
    )

    def warnings(self) -> list[str]:
        """What keeps the storage NICs from being the only bottleneck (policies/pd_ratio.py), a sentence per violated row."""
        if not self.snic_bandwidth or not self.cnic_bandwidth:
            return []
        bandwidths = float(self.snic_bandwidth), float(self.cnic_bandwidth), float(self.memory_bandwidth)
        return violations(self.prefill_nodes, self.decode_nodes, self.engines_per_node, *bandwidths)
