"""How much an engine takes on at once."""

from __future__ import annotations

from typing import Self

from pydantic import ByteSize, Field, model_validator

from dualpath_ray.config.section import Count, Seconds, Section
from dualpath_ray.errors import ConfigError


class PrefillSettings(Section):
    """The `prefill` section, per prefill engine."""

    max_batch_tokens: Count = Field(
        default=1024, description="New tokens computed in one forward pass; longer prompts go in chunks. A multiple of model.block_tokens."
    )
    window_layers: Count = Field(
        default=4, description="Layers whose KV is resident at once: while one is computed, the next ones arrive and the last one leaves."
    )
    window_tokens: Count | None = Field(
        default=None,
        description="Tokens (old and new, of all requests in a batch) that the window holds per layer; default: the longest context.",
    )
    layerwise: bool = Field(
        default=True,
        description="Compute a layer as soon as its KV is there, and send its new KV on at once. false, for comparisons: a batch waits for "
        "all layers and sends its new KV at the end; the window then holds all layers.",
    )
    compute_quota_s: Seconds | None = Field(
        default=None,
        description="Predicted attention time of one forward pass at most (paper: 0.3); none: only max_batch_tokens limits it.",
    )
    attention_pair_s: Seconds | None = Field(
        default=None,
        description="Seconds of attention per query-key pair, summed over all layers, by which compute_quota_s predicts; measure it on the "
        "device that serves.",
    )
    max_requests: Count = Field(default=1024, description="Requests that an engine holds at once, waiting ones included; more are refused.")

    @model_validator(mode="after")
    def _quota_can_be_predicted(self) -> Self:
        if self.compute_quota_s is not None and self.attention_pair_s is None:
            raise ValueError("compute_quota_s needs attention_pair_s to predict from")
        return self


class DecodeSettings(Section):
    """The `decode` section, per decode engine."""

    pool_blocks: Count | None = Field(default=None, description="Blocks in the KV pool; default: from pool_bytes.")
    pool_bytes: ByteSize | None = Field(
        default=None,
        gt=0,
        description="Memory of the KV pool, e.g. 20GiB; default: room for max_batch requests of a quarter of the longest context.",
    )
    max_batch: Count = Field(default=16, description="Requests that decode together; more wait for their turn.")
    max_requests: Count = Field(default=256, description="Requests that an engine holds at once, waiting ones included; more are refused.")

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.pool_blocks is not None and self.pool_bytes is not None:
            raise ValueError("pool_blocks and pool_bytes are two ways to say the same: give one of them")
        return self

    def pool_size(self, full_block_bytes: int, blocks_per_context: int) -> int:
        """Blocks in the pool. Raises ConfigError when a request of the longest context (`blocks_per_context`) cannot fit."""
        if self.pool_blocks is None and self.pool_bytes is None:
            return max(blocks_per_context, self.max_batch * blocks_per_context // 4)
        blocks = self.pool_blocks if self.pool_blocks is not None else (self.pool_bytes or 0) // full_block_bytes
        if blocks < blocks_per_context:
            raise ConfigError(
                f"the decode pool holds {blocks} blocks of {full_block_bytes} bytes, but a request of the longest context needs "
                f"{blocks_per_context}: raise decode.pool_blocks or decode.pool_bytes, or lower model.max_context"
            )
        return blocks
