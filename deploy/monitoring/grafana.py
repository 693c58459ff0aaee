"""Print deploy/monitoring/grafana.json (`make docs`): the dashboard as rows of panels, each with its queries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 24, 8
SOURCE = {"type": "prometheus", "uid": "${source}"}
RANGE = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph. `unit` is Grafana's name of it; `stack`: the series add up to something."""

    title: str
    meaning: str
    unit: str
    queries: tuple[Query, ...]
    stack: bool = False


def rate(metric: str, by: str, matching: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{matching}{RANGE}))"


def quantiles(metric: str, *shares: float, by: str = "", exemplars: bool = False) -> tuple[Query, ...]:
    labels = f"le, {by}" if by else "le"
    name = f"{{{{{by}}}}} " if by else ""
    return tuple(
        Query(f"histogram_quantile({share}, {rate(f'{metric}_bucket', labels)})", f"{name}p{share * 100:g}", exemplars) for share in shares
    )


ROWS: dict[str, tuple[Panel, ...]] = {
    "Requests": (
        Panel("Requests", "That ended, by how.", "reqps", (Query(rate("dualpath_requests_total", "outcome"), "{{outcome}}"),), True),
        Panel(
            "In progress",
            "At the clients, and waiting for engines.",
            "short",
            (
                Query("sum(dualpath_requests_active)", "active"),
                Query("sum(dualpath_scheduler_queued_requests)", "queued"),
            ),
        ),
        Panel("Tokens", "Generated, and of prompts.", "short", (Query(rate("dualpath_tokens_total", "kind"), "{{kind}}"),)),
        Panel("Time to first token", "Points are traces.", "s", quantiles("dualpath_ttft_seconds", 0.5, 0.95, 0.99, exemplars=True)),
        Panel("Time per token after it", "Mean per request.", "s", quantiles("dualpath_tpot_seconds", 0.5, 0.95)),
        Panel(
            "What the first token waits for",
            "Mean seconds per request; the parts add up to the time to first token.",
            "s",
            (
                Query(
                    f"{rate('dualpath_ttft_part_seconds_sum', 'part')} / ignoring(part) group_left "
                    f"sum(rate(dualpath_ttft_seconds_count{RANGE}))",
                    "{{part}}",
                ),
            ),
            True,
        ),
    ),
    "Two paths": (
        Panel(
            "KV read from storage, per path",
            "prefill_node is path 1, decode_node path 2.",
            "Bps",
            (Query(rate("dualpath_kv_read_bytes_total", "side"), "{{side}}"),),
            True,
        ),
        Panel(
            "Wait per path", "From slots to the first layers in memory.", "s", quantiles("dualpath_kv_read_wait_seconds", 0.95, by="side")
        ),
        Panel(
            "KV pushed between processes",
            "Layers of hits, layers of new KV, whole blocks, prompts into decode pools.",
            "Bps",
            (Query(rate("dualpath_pushed_bytes_total", "kind"), "{{kind}}"),),
            True,
        ),
        Panel(
            "Storage NICs",
            "Bytes per second read by each gateway.",
            "Bps",
            (Query(rate("dualpath_store_bytes_total", "instance", '{direction="read"}'), "{{instance}}"),),
        ),
        Panel(
            "Busiest storage NIC over the mean", "1 is perfect balance.", "none", (Query("dualpath:snic_read:max_over_mean", "max / mean"),)
        ),
        Panel(
            "Utilisation of NICs",
            "Share of time in which a gateway had something to read, a process something to push.",
            "percentunit",
            (
                Query(rate("dualpath_snic_busy_seconds_total", "instance"), "storage {{instance}}"),
                Query(rate("dualpath_cnic_busy_seconds_total", "instance"), "compute {{instance}}"),
            ),
        ),
    ),
    "Cache": (
        Panel("Hit share", "Of prompt tokens.", "percentunit", (Query("dualpath:hit_share:rate5m", "hits"),)),
        Panel(
            "Hit sources", "Hit tokens.", "short", (Query(rate("dualpath_hit_tokens_total", "source, side"), "{{source}} {{side}}"),), True
        ),
        Panel(
            "Loaded or recomputed", "Stored blocks.", "short", (Query(rate("dualpath_hit_blocks_total", "decision"), "{{decision}}"),), True
        ),
        Panel("Blocks in the index", "", "short", (Query("sum(dualpath_scheduler_index_blocks)", "blocks"),)),
    ),
    "Memory and engines": (
        Panel("Staging", "Slots of all gateways.", "short", (Query("sum by (state) (dualpath_staging_slots)", "{{state}}"),), True),
        Panel("Oldest lease", "", "s", (Query("max by (instance) (dualpath_oldest_lease_seconds)", "{{instance}}"),)),
        Panel("Read queues", "", "bytes", (Query("sum by (instance) (dualpath_read_queue_bytes)", "{{instance}}"),)),
        Panel("KV pools", "Blocks of all decode engines.", "short", (Query("sum by (state) (dualpath_pool_blocks)", "{{state}}"),), True),
        Panel(
            "Engines at work",
            "Share of time.",
            "percentunit",
            (Query(rate("dualpath_engine_busy_seconds_total", "instance"), "{{instance}}"),),
        ),
        Panel("Waiting at engines", "", "s", (Query(rate("dualpath_engine_queue_seconds_total", "service"), "{{service}}"),)),
    ),
    "Health": (
        Panel("Restarts", "", "short", (Query("sum by (role) (increase(dualpath_actor_restarts_total[10m]))", "{{role}}"),)),
        Panel("Age of reports", "", "s", (Query("max by (reporter) (dualpath_report_age_seconds)", "{{reporter}}"),)),
        Panel(
            "Faults",
            "Per second.",
            "short",
            (
                Query(rate("dualpath_store_corrupt_blocks_total", "instance"), "corrupt blocks {{instance}}"),
                Query(rate("dualpath_push_failures_total", "instance"), "failed pushes {{instance}}"),
                Query(rate("dualpath_persist_failures_total", "instance"), "not stored {{instance}}"),
                Query(rate("dualpath_retries_total", "service"), "retries"),
            ),
        ),
        Panel("Scheduler", "Seconds per decision.", "s", quantiles("dualpath_scheduler_decision_seconds", 0.5, 0.99)),
    ),
}


def dashboard() -> dict[str, Any]:
    """The document that Grafana imports."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "collapsed": False, "gridPos": _place(0, top, WIDTH, 1), "panels": []})
        width = WIDTH // 3 if len(row) % 3 == 0 else WIDTH // 4
        for index, panel in enumerate(row):
            column, line = index % (WIDTH // width), index // (WIDTH // width)
            panels.append(_graph(panel, _place(column * width, top + 1 + line * HEIGHT, width, HEIGHT)))
        top += 1 + -(-len(row) * width // WIDTH) * HEIGHT
    for number, document in enumerate(panels, 1):
        document["id"] = number
    return {
        "uid": "dualpath",
        "title": "dualpath_ray",
        "tags": ["dualpath"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [{"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"}]},
        "panels": panels,
    }


def _place(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def _graph(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.stack else "none"}
    drawing = {"lineWidth": 1, "fillOpacity": 25 if panel.stack else 5, "showPoints": "never", "stacking": stacking}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.meaning,
        "gridPos": place,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": drawing}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "exemplar": query.exemplars,
            }
            for number, query in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
