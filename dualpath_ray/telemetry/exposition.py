"""Join the expositions of several processes into one, as a Prometheus endpoint must serve it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from dualpath_ray.errors import DualPathError


def merge(parts: Iterable[tuple[Mapping[str, str], str]]) -> str:
    """One valid exposition from pairs of (labels that name a process, its exposition).

    Each family appears once with its HELP and TYPE and all processes' samples; the labels must tell the processes apart. Raises
    DualPathError when two parts declare one family differently.
    """
    families: dict[str, Metric] = {}
    for labels, text in parts:
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            if merged.type != family.type:
                raise DualPathError(f"metric {family.name} is a {merged.type} in one process and a {family.type} in another")
            for sample in family.samples:
                merged.add_sample(sample.name, {**sample.labels, **labels}, sample.value)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fixed(families.values()))
    return generate_latest(registry).decode()


class _Fixed(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
