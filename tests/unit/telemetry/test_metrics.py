from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from dualpath_ray.errors import DualPathError
from dualpath_ray.telemetry.exposition import merge
from dualpath_ray.telemetry.metrics import Metrics
from dualpath_ray.telemetry.reference import render

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    result = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in found}
    assert len(result) == len(found), "a series appears twice"
    return result


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_processes_have_registries_of_their_own() -> None:
    first, second = Metrics(), Metrics()
    first.tokens.labels(kind="cached").inc(5)
    assert samples(first.render())[key("dualpath_tokens_total", kind="cached")] == 5
    assert key("dualpath_tokens_total", kind="cached") not in samples(second.render())


def test_advance_follows_a_total_kept_elsewhere() -> None:
    metrics = Metrics()
    for total in (10, 10, 25):
        metrics.advance(metrics.store_bytes, total, direction="read")
        metrics.advance(metrics.corrupt_blocks, total)
    metrics.advance(metrics.store_bytes, 1, direction="write")
    found = samples(metrics.render())
    assert found[key("dualpath_store_bytes_total", direction="read")] == 25
    assert found[key("dualpath_store_bytes_total", direction="write")] == 1
    assert found[key("dualpath_store_corrupt_blocks_total")] == 25


def test_every_declared_metric_is_rendered_under_its_declared_name_and_labels() -> None:
    metrics = Metrics()
    for spec in metrics.specs:
        collector = metrics.registry._names_to_collectors[spec.name]
        assert list(spec.labels) == list(collector._labelnames), spec.name
        if spec.labels:
            collector.labels(*("x" for _ in spec.labels))
    families = {family.name: family for family in openmetrics.text_string_to_metric_families(metrics.render())}
    assert families.keys() == {spec.name.removesuffix("_total") for spec in metrics.specs}
    for spec in metrics.specs:
        assert families[spec.name.removesuffix("_total")].type == spec.kind


def test_merge_joins_families_and_tells_processes_apart() -> None:
    gateway, prefill = Metrics(), Metrics()
    gateway.pushed_bytes.labels(kind="hit_layers").inc(7)
    prefill.pushed_bytes.labels(kind="new_layers").inc(9)
    prefill.ttft.observe(0.3)
    text = merge(
        [({"service": "gateway", "instance": "p0"}, gateway.render()), ({"service": "prefill", "instance": "p0/0"}, prefill.render())]
    ).text
    lines = text.splitlines()
    assert lines.count("# TYPE dualpath_pushed_bytes_total counter") == 1
    assert lines.count("# TYPE dualpath_ttft_seconds histogram") == 1
    found = samples(text)
    assert found[key("dualpath_pushed_bytes_total", kind="hit_layers", service="gateway", instance="p0")] == 7
    assert found[key("dualpath_pushed_bytes_total", kind="new_layers", service="prefill", instance="p0/0")] == 9
    assert found[key("dualpath_ttft_seconds_bucket", le="0.5", service="prefill", instance="p0/0")] == 1
    assert found[key("dualpath_ttft_seconds_bucket", le="0.2", service="prefill", instance="p0/0")] == 0
    last_of_family: dict[str, int] = {}
    for number, line in enumerate(lines):
        name = line.split()[2] if line.startswith("#") else line.partition("{")[0].partition(" ")[0]
        family = next(name.removesuffix(end) for end in ("_bucket", "_sum", "_count", "") if name.endswith(end))
        assert last_of_family.get(family, number - 1) == number - 1, f"{family} is not in one piece"
        last_of_family[family] = number


def test_merge_survives_odd_label_values() -> None:
    metrics = Metrics()
    metrics.report_age.labels(reporter='a"b\\c\nd').set(1.5)
    text = merge([({"instance": "ü{}"}, metrics.render())]).text
    assert samples(text)[key("dualpath_report_age_seconds", reporter='a"b\\c\nd', instance="ü{}")] == 1.5


def test_merge_refuses_contradictory_declarations() -> None:
    with pytest.raises(DualPathError, match="x is a gauge in one process and a histogram in another"):
        merge([({}, "# TYPE x gauge\nx 1\n# EOF\n"), ({}, '# TYPE x histogram\nx_bucket{le="+Inf"} 1\n# EOF\n')])


def test_merge_of_nothing_is_empty() -> None:
    assert merge([]).text == ""


def test_exemplars_reach_readers_of_openmetrics_and_nobody_else() -> None:
    metrics = Metrics()
    metrics.ttft.observe(0.3, {"trace_id": "ab" * 16})
    part = ({"instance": "1"}, metrics.render())
    plain, open_metrics = merge([part]), merge([part], "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert "trace_id" not in plain.text and plain.content_type.startswith("text/plain; version=0.0.4")
    assert open_metrics.content_type.startswith("application/openmetrics-text; version=1.0.0")
    found = [
        sample.exemplar
        for family in openmetrics.text_string_to_metric_families(open_metrics.text)
        for sample in family.samples
        if sample.exemplar
    ]
    assert [exemplar.labels for exemplar in found] == [{"trace_id": "ab" * 16}]
    assert list(text_string_to_metric_families(plain.text)), "Prometheus' own format stays readable"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `make docs`"
