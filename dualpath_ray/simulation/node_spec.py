"""Hardware of one node, as the simulator sees it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class NodeSpec(BaseModel):
    """A node of GPUs, each with its compute NIC, one storage NIC and DRAM for staging. The defaults are the paper's Hopper nodes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    gpus: int = Field(default=8, ge=1, description="GPUs per node; each is one engine with one compute NIC.")
    snic_bytes_per_s: float = Field(default=49e9, gt=0, description="Read bandwidth of the storage NIC (400 Gbps less headers).")
    cnic_bytes_per_s: float = Field(default=49e9, gt=0, description="Bandwidth of each compute NIC, each direction.")
    dram_bytes_per_s: float = Field(default=500e9, gt=0, description="Memory bandwidth of one node, reads and writes together.")
    hbm_bytes: float = Field(default=80e9, gt=0, description="Memory of one GPU.")
    hbm_reserved_bytes: float = Field(default=8e9, ge=0, description="GPU memory for activations, communication buffers and the runtime.")
    staging_bytes: float = Field(default=80e9, gt=0, description="DRAM of one node given to staging.")
    read_latency_s: float = Field(default=0.002, ge=0, description="Time from the start of a storage read to its first byte.")
