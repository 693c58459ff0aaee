"""Print docs/metrics.md: every metric, as declared in `metrics.py`."""

from __future__ import annotations

from dualpath_ray.telemetry.metrics import Metrics

_HEAD = """# Metrics

Served in Prometheus text format at `/metrics` of the HTTP service, for all processes of the system: each sample has the labels
`service` (scheduler, gateway, prefill, decode, serving) and `instance`. Turned off with `telemetry.metrics: false`.

This page is made from `dualpath_ray/telemetry/metrics.py` by `make docs`.

| metric | type | unit | labels | meaning |
|---|---|---|---|---|
"""


def render() -> str:
    """The page's text."""
    rows = []
    for spec in Metrics().specs:
        labels = "; ".join(f"`{name}`: {values}" for name, values in spec.labels.items())
        rows.append(f"| `{spec.name}` | {spec.kind} | {spec.unit} | {labels} | {spec.meaning} |\n")
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    print(render(), end="")
