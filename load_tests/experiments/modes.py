"""The systems that are compared, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mode:
    """A system to measure: how it reads (scheduling.read_mode), further settings, and whether it may read at all."""

    name: str
    read_mode: str
    settings: tuple[str, ...] = ()
    share_nothing: bool = False
    unlimited_snic: bool = False

    @property
    def overrides(self) -> list[str]:
        return [f"scheduling.read_mode={self.read_mode}", *self.settings]


MODES = {
    mode.name: mode
    for mode in (
        Mode("basic", "prefill_only", ("prefill.layerwise=false",)),
        Mode("layerwise", "prefill_only"),
        Mode("alternate", "alternate", ("scheduling.placement=round_robin",)),
        Mode("shorter_queue", "shorter_queue"),
        Mode("split", "split"),
        Mode("pool", "pool"),
        Mode("cheapest", "split", ("scheduling.recompute=true",)),
        Mode("oracle", "split", unlimited_snic=True),
        Mode("recompute", "prefill_only", share_nothing=True),
    )
}
DUAL = ("shorter_queue", "split", "pool", "cheapest")  # all storage NICs are used, and requests are scheduled accordingly
