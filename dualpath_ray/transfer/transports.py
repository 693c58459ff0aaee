"""Which UCX transports and devices a process uses, from its settings and from what its machine has.

UCX left to itself takes TCP, without a word, wherever RDMA does not come up (no device in the container, no locked memory, a missing
module), and the KV then crawls over the wrong network in nobody's class. So on machines with RDMA, TCP is not offered to it: what cannot be
done over RDMA fails at once and says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dualpath_ray.config.transfer import TransferSettings
from dualpath_ray.errors import ConfigError
from dualpath_ray.rdma.device import Machine
from dualpath_ray.rdma.pairing import plan_nics

SHARED_MEMORY = ("sysv", "cma")  # messages through shared memory, data by cross-memory attach; measured best on one machine
RDMA_TRANSPORTS = ("rc", "dc", "ud", "ib", "rc_verbs", "rc_mlx5", "rc_v", "rc_x", "dc_mlx5", "dc_x", "ud_verbs", "ud_mlx5", "ud_v", "ud_x")
GPU_TRANSPORTS = {"NVIDIA": "cuda", "AMD": "rocm"}


@dataclass(frozen=True, slots=True)
class Transports:
    """The choice. `rdma` says that RDMA was asked for, so that nothing else will do; `ports` are the RDMA ports to use (empty: any).
    `copied`: all bytes are copied by processors of this machine.
    """

    tls: tuple[str, ...]
    ports: tuple[str, ...]
    rdma: bool
    copied: bool = False

    def environment(self) -> dict[str, str]:
        """Variables that UCX must see before it is loaded."""
        variables = {"UCX_TLS": ",".join(self.tls)} if self.tls else {}
        if self.ports:
            variables["UCX_NET_DEVICES"] = ",".join(self.ports)
        return variables


def choose_transports(
    settings: TransferSettings,
    machine: Machine,
    same_machine: bool,
    accelerator: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Transports:
    """Transports for a process. `same_machine`: all peers are on this one; `accelerator`: PCI address of the GPU it computes on.

    What is set wins, be it in `transfer` or (`environ`) as UCX_TLS and UCX_NET_DEVICES. A process with a GPU uses the compute NIC that is
    paired with it, others all compute NICs; the storage NIC carries KV only if there is no other. Raises ConfigError for settings that
    contradict each other.
    """
    environ = environ or {}
    given = settings.tls if settings.tls is not None else environ.get("UCX_TLS")
    devices = settings.net_devices if settings.net_devices is not None else environ.get("UCX_NET_DEVICES")
    ports = tuple(devices.split(",")) if devices else ()
    if given is not None:
        tls = tuple(name.strip() for name in given.split(","))
        named = any(name in RDMA_TRANSPORTS for name in tls)
        if settings.fabric == "rdma" and (not named or "tcp" in tls):
            raise ConfigError(
                f"transfer.fabric is rdma, but UCX may only use {given} (transfer.tls or UCX_TLS): "
                + ("take tcp out of it, UCX would fall back to it silently" if named else "unset it, or add rc")
            )
        return Transports(tls, ports, settings.fabric == "rdma" or (named and "tcp" not in tls), same_machine and "cma" in tls)
    gpus = tuple(sorted({GPU_TRANSPORTS[each.vendor] for each in machine.accelerators}))
    rdma = settings.fabric == "rdma" or (settings.fabric == "auto" and bool(machine.active_ports) and not same_machine)
    if not rdma:
        return Transports((*SHARED_MEMORY, "tcp", *gpus, "self"), ports, False, same_machine)
    local = () if settings.local_copies == "cnic" else SHARED_MEMORY
    return Transports(("rc", *local, *gpus, "self"), ports or _compute_ports(machine, accelerator), True)


def own_accelerator(machine: Machine, environ: Mapping[str, str]) -> str | None:
    """PCI address of the GPU that Ray gave this process; None without one, or when it is not named by its number in bus order."""
    first = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    number = int(first) if first.isdigit() else len(machine.accelerators)
    return machine.accelerators[number].address if number < len(machine.accelerators) else None


def _compute_ports(machine: Machine, accelerator: str | None) -> tuple[str, ...]:
    plan = plan_nics(machine)
    own = plan.compute_port(accelerator) if accelerator is not None else None
    if own is not None:
        return (own.ucx_name,)
    compute = tuple(dict.fromkeys(pair.port.ucx_name for pair in plan.pairs))
    return compute or tuple(port.ucx_name for port in machine.active_ports if port != plan.storage or len(machine.active_ports) == 1)
