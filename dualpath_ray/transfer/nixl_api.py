"""The one place that imports NIXL.

The PyPI meta-package `nixl` requires the CUDA 12 *and* CUDA 13 builds at once, so the project depends on one of them directly
and takes whichever is there. Two defaults must be in the environment before NIXL loads UCX: on a machine without RDMA
devices UCX's InfiniBand module must stay unloaded, since its bundled libnl crashes the interpreter at exit (measured with NIXL
1.4.1 to 1.5.1), and with RDMA devices the same holds for the EFA module.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dualpath_ray.errors import ConfigError

CANDIDATES = ("nixl_cu13", "nixl_cu12", "nixl")
COPIED_BLOCKS = 8  # fewer are copied sooner than a thread has been woken


def has_rdma_devices() -> bool:
    """Whether the kernel shows any RDMA device."""
    folder = Path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())


def set_environment_defaults() -> None:
    """Settings that NIXL and UCX read when they are loaded; what the user has set wins."""
    os.environ.setdefault("UCX_MODULES", "^efa" if has_rdma_devices() else "^ib")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("UCX_LOG_LEVEL", "error")


def load() -> ModuleType:
    """The installed NIXL Python API module. Raises ConfigError when there is none."""
    set_environment_defaults()
    for name in CANDIDATES:
        try:
            return importlib.import_module(f"{name}._api")
        except ModuleNotFoundError:
            continue
    raise ConfigError("NIXL is not installed: pip install nixl-cu12 (or nixl-cu13 on a CUDA 13 machine)")


def make_agent(
    name: str,
    *,
    progress_thread_delay_us: int | None = None,
    backends: tuple[str, ...] = (),
    ucx: Mapping[str, str] | None = None,
    copy_threads: int = 0,
) -> Any:
    """A NIXL agent that must be used by one thread only (no locking inside).

    `progress_thread_delay_us` is how long the agent's progress thread sleeps in poll() when nothing arrives; None starts no
    such thread. An agent that peers write to needs one. NIXL's Python API fixes the delay at 0, a busy loop that burns a
    core, so the value is put in while the agent's configuration is being built. `ucx`: UCX settings (without UCX_) of this agent alone; the
    process's environment goes before them. `copy_threads`: threads of NIXL's own that post transfers of at least `COPIED_BLOCKS` blocks.
    """
    parameters: dict[str, str] = {}
    if ucx:
        parameters["engine_config"] = ",".join(f"{key}={value}" for key, value in ucx.items())
    if copy_threads:
        parameters |= {"num_threads": str(copy_threads), "split_batch_size": str(COPIED_BLOCKS)}
    if parameters:
        agent = make_agent(name, progress_thread_delay_us=progress_thread_delay_us, backends=tuple(b for b in backends if b != "UCX"))
        agent.create_backend("UCX", parameters)
        return agent
    api = load()
    config = api.nixl_agent_config(enable_prog_thread=progress_thread_delay_us is not None, backends=list(backends))
    if progress_thread_delay_us is None:
        return api.nixl_agent(name, config)
    bindings = api.nixlBind
    original = bindings.nixlAgentConfig

    class ConfigWithDelay(original):  # type: ignore[misc, valid-type]
        def __setattr__(self, attribute: str, value: Any) -> None:
            super().__setattr__(attribute, progress_thread_delay_us if attribute == "pthrDelay" else value)

    bindings.nixlAgentConfig = ConfigWithDelay
    try:
        return api.nixl_agent(name, config)
    finally:
        bindings.nixlAgentConfig = original
