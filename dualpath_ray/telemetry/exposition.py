"""Join the expositions of several processes into one, as a Prometheus endpoint must serve it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from dualpath_ray.errors import DualPathError


@dataclass(frozen=True, slots=True)
class Exposition:
    text: str
    content_type: str


def merge(parts: Iterable[tuple[Mapping[str, str], str]], accept: str = "") -> Exposition:
    """One valid exposition from pairs of (labels that name a process, its exposition as `Metrics.render` makes it).

    Each family appears once with its HELP and TYPE and all processes' samples; the labels must tell the processes apart. `accept` is the
    reader's HTTP header: Prometheus' text format unless it asks for OpenMetrics, which has the exemplars too. Raises DualPathError
    when two parts declare one family differently.
    """
    families: dict[str, Metric] = {}
    for labels, text in parts:
        for family in text_string_to_metric_families(text):  # type: ignore[no-untyped-call]
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            if merged.type != family.type:
                raise DualPathError(f"metric {family.name} is a {merged.type} in one process and a {family.type} in another")
            for sample in family.samples:
                merged.add_sample(sample.name, {**sample.labels, **labels}, sample.value, exemplar=sample.exemplar)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fixed(families.values()))
    encode, content_type = choose_encoder(accept)
    return Exposition(encode(registry).decode(), content_type)


class _Fixed(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
