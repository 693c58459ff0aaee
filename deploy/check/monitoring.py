"""Prometheus and Grafana files: their own grammar, and that every metric and label in them exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deploy.check.problems import load_yaml, run
from dualpath_ray.telemetry.metrics import Metrics

PROMTOOL = "Debian and Ubuntu: apt-get install prometheus"
COMMON_LABELS = {"service", "instance", "le", "job"}
OTHER_METRICS = {"up"}
METRIC = re.compile(r"\b(dualpath[a-z0-9_:]*[a-z0-9_]|up)\b(?:\{([^}]*)\})?")
LABEL = re.compile(r"([A-Za-z_]+)\s*(?:=~|!~|!=|=)")
GROUPING = re.compile(r"\bby\s*\(([^)]*)\)")


def check_prometheus(path: Path) -> list[str]:
    return run(["promtool", "check", "config", "--lint-fatal", str(path)], PROMTOOL)


def check_rules(path: Path) -> list[str]:
    """Grammar by promtool; names against the code."""
    document = load_yaml(path)
    problems = run(["promtool", "check", "rules", "--lint-fatal", str(path)], PROMTOOL)
    if problems:
        return problems
    rules = [rule for group in document["groups"] for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        problems += [f"{rule.get('alert') or rule['record']}: {problem}" for problem in check_expression(rule["expr"], recorded)]
        annotations = rule.get("annotations", {})
        runbook = annotations.get("runbook", "")
        if "alert" in rule and not _has_heading(path.resolve().parents[2] / runbook.partition("#")[0], runbook.partition("#")[2]):
            problems.append(f"{rule['alert']}: there is no {runbook or 'runbook'}")
        if "alert" in rule and set(annotations) != {"summary", "runbook"}:
            problems.append(f"{rule['alert']}: annotations are {sorted(annotations)}, not runbook and summary")
        if "alert" in rule and rule.get("labels", {}).get("severity") not in ("warning", "critical"):
            problems.append(f"{rule['alert']}: severity is neither warning nor critical")
    return problems


def check_expression(expression: str, recorded: set[str]) -> list[str]:
    """Metrics and labels of a PromQL expression that nobody exports."""
    labels = _exported()
    problems = []
    allowed: set[str] = set(COMMON_LABELS)
    for name, matchers in METRIC.findall(expression):
        if name in recorded or name in OTHER_METRICS:
            continue
        if name not in labels:
            problems.append(f"there is no metric {name}")
            continue
        allowed |= labels[name]
        wrong = set(LABEL.findall(re.sub(r'"[^"]*"', "", matchers))) - labels[name] - COMMON_LABELS
        problems += [f"{name} has no label {label}" for label in sorted(wrong)]
    used = {label.strip() for group in GROUPING.findall(expression) for label in group.split(",") if label.strip()}
    return problems + [f"grouped by {label}, which no metric here has" for label in sorted(used - allowed)]


def check_grafana(path: Path, rules: Path) -> list[str]:
    """The dashboard's shape, and its queries."""
    recorded = {rule["record"] for group in load_yaml(rules)["groups"] for rule in group["rules"] if "record" in rule}
    try:
        dashboard = Dashboard.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        return [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    problems = []
    for panel in dashboard.panels:
        for target in panel.targets:
            problems += [f"panel {panel.title!r}: {problem}" for problem in check_expression(target.expr, recorded)]
    return problems


def _exported() -> dict[str, set[str]]:
    """Labels of every series that our metrics make."""
    series: dict[str, set[str]] = {}
    for spec in Metrics().specs:
        names = [f"{spec.name}_{end}" for end in ("bucket", "sum", "count")] if spec.kind == "histogram" else [spec.name]
        series |= {name: set(spec.labels) for name in names}
    return series


def _has_heading(page: Path, anchor: str) -> bool:
    if not anchor or not page.is_file():
        return False
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return anchor in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Source(_Strict):
    type: Literal["prometheus"]
    uid: Literal["${source}"]


class Target(_Strict):
    refId: str
    datasource: Source
    expr: str
    legendFormat: str
    exemplar: bool


class Place(_Strict):
    x: int
    y: int
    w: int
    h: int


class Stacking(_Strict):
    mode: Literal["none", "normal"]


class Drawing(_Strict):
    lineWidth: int
    fillOpacity: int
    showPoints: Literal["never", "auto"]
    stacking: Stacking


class Defaults(_Strict):
    unit: Literal["short", "none", "s", "Bps", "bytes", "reqps", "percentunit"]
    min: float
    custom: Drawing


class Fields(_Strict):
    defaults: Defaults
    overrides: list[Any]


class Legend(_Strict):
    displayMode: Literal["list", "table"]
    placement: Literal["bottom", "right"]


class Tooltip(_Strict):
    mode: Literal["multi", "single"]
    sort: Literal["desc", "asc", "none"]


class Options(_Strict):
    legend: Legend
    tooltip: Tooltip


class GrafanaPanel(_Strict):
    id: int
    type: Literal["timeseries", "row"]
    title: str
    description: str = ""
    gridPos: Place
    datasource: Source | None = None
    fieldConfig: Fields | None = None
    options: Options | None = None
    targets: list[Target] = []
    collapsed: bool = False
    panels: list[Any] = []


class Dashboard(_Strict):
    """What our dashboard uses of Grafana's schema (version 39); anything else is a typo."""

    uid: str
    title: str
    tags: list[str]
    schemaVersion: Literal[39]
    version: int
    editable: bool
    refresh: str
    time: dict[Literal["from", "to"], str]
    templating: dict[Literal["list"], list[dict[Literal["name", "label", "type", "query"], str]]]
    panels: list[GrafanaPanel]
