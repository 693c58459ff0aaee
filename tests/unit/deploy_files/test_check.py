"""Every shipped file is right, and a typo in any of them is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from deploy.check.__main__ import checks, command, find_definitions
from deploy.check.problems import Absent, Unreadable
from deploy.check.words import new_words

ROOT = Path(__file__).parents[3]
SHIPPED = ("docs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
FOLDERS = ("policies", "dualpath_ray", "actors", "load_tests")

# (file, what is there, what a slip of the pen makes of it)
TYPOS = [
    ("settings/cluster.yaml", "engines_per_node", "engine_per_node"),
    ("settings/cluster.yaml", "placement: spread", "placement: spraed"),
    ("settings/cluster.yaml", "decode_resources: {dp_decode: 1}", "decode_resources: {}"),
    ("settings/serve.yaml", "route_prefix", "route_prefx"),
    ("settings/serve.yaml", "deploy.app:build", "deploy.app:biuld"),
    ("settings/serve.yaml", "engines: attach", "engines: atach"),
    ("settings/serve.yaml", "http_options", "http_option"),
    ("settings/serve.yaml", "port: 8000", "prot: 8000"),
    ("settings/serve.yaml", "log_level", "log_levle"),
    ("launcher/aws.yaml", "max_workers: 8", "max_wrkers: 8"),
    ("launcher/aws.yaml", "InstanceType: p5", "InstanceTyp: p5"),
    ("launcher/aws.yaml", "resources: {dp_decode: 1}", "resources: {dp_decoed: 1}"),
    ("launcher/aws.yaml", "dp.role: prefill", "dp.role: prefil"),
    ("launcher/aws.yaml", "--dashboard-host", "--dashbord-host"),
    ("launcher/aws.yaml", "RAY_AUTH_MODE=token ray start --address", "RAI_AUTH_MODE=token ray start --address"),
    ("launcher/aws.yaml", "deploy/settings", "deploy/setings"),
    ("launcher/aws.yaml", "ray start --address", "ray strat --address"),
    ("launcher/gcp.yaml", "project_id", "projct_id"),
    ("launcher/gcp.yaml", "machineType: a3", "machinType: a3"),
    ("launcher/onpremise.yaml", "worker_ips", "worker_ip"),
    ("launcher/onpremise.yaml", "run_options", "run_option"),
    ("kubernetes/raycluster.yaml", "maxReplicas", "maxReplica"),
    ("kubernetes/raycluster.yaml", "livenessProbe", "livenesProbe"),
    ("kubernetes/raycluster.yaml", "rdma/hca_shared_devices_a", "rmda/hca_shared_devices_a"),
    ("kubernetes/raycluster.yaml", "dashboard-host", "dashbord-host"),
    ("kubernetes/raycluster.yaml", "RAY_TLS_CA_CERT", "RAY_TLS_CA_CRT"),
    ("kubernetes/raycluster.yaml", "DUALPATH__CLUSTER__ADDRESS", "DUALPATH__CLUSTER__ADRESS"),
    ("kubernetes/raycluster.yaml", 'dp_prefill\\"', 'dp_prefil\\"'),
    ("kubernetes/raycluster.yaml", "{name: RAY_TLS_CA_CERT", "{nmae: RAY_TLS_CA_CERT"),
    ("kubernetes/raycluster.yaml", "mode: token", "mode: tokn"),
    ("kubernetes/raycluster.yaml", "groupName: decode", "groupName: decoder"),
    ("kubernetes/rayservice.yaml", "serveConfigV2", "serveConfigV3"),
    ("kubernetes/rayservice.yaml", "import_path: deploy.app:build", "import_path: deploy.ap:build"),
    ("kubernetes/rayservice.yaml", "kind: RayService", "kind: RayServce"),
    ("monitoring/prometheus.yaml", "scrape_interval", "scrape_intervall"),
    ("monitoring/prometheus.yaml", "alerts.yaml", "alert.yaml"),
    (
        "monitoring/alerts.yaml",
        "histogram_quantile(0.95, sum by (le) (rate(dualpath_queue",
        "histogram_quantil(0.95, sum by (le) (rate(dualpath_queue",
    ),
    ("monitoring/alerts.yaml", "dualpath_store_corrupt_blocks_total", "dualpath_store_corupt_blocks_total"),
    ("monitoring/alerts.yaml", 'kind="cached"', 'knd="cached"'),
    ("monitoring/alerts.yaml", "sum by (role)", "sum by (rle)"),
    ("monitoring/alerts.yaml", "#requests-fail", "#requests-fial"),
    ("monitoring/alerts.yaml", "severity: warning", "severity: warnin"),
    ("monitoring/alerts.yaml", "annotations", "anotations"),
    ("monitoring/grafana.json", "dualpath_oldest_lease_seconds", "dualpath_oldest_leas_seconds"),
    ("monitoring/grafana.json", "dualpath:hit_share:rate5m", "dualpath:hit_shar:rate5m"),
    ("monitoring/grafana.json", "gridPos", "gridpos"),
    ("monitoring/grafana.json", "percentunit", "percentuni"),
    ("monitoring/grafana.json", '"panels": [\n', '"panel": [\n'),
    ("container/Dockerfile", "FROM python:3.11.13-slim-bookworm AS serve", "FORM python:3.11.13-slim-bookworm AS serve"),
    ("container/Dockerfile", "FROM python:3.11.13-slim-bookworm AS serve", "FROM python:latest AS serve"),
    ("container/Dockerfile", "USER 1000:1000", "USER root"),
    ("container/Dockerfile", "proxy:middlewares", "proxy:middleware"),
    ("container/Dockerfile", "COPY actors", "COPY actor"),
    ("container/Dockerfile", "--from=build", "--from=biuld"),
    ("container/Dockerfile", "[s3,otlp]", "[s3,oltp]"),
]

# What only their spelling gives away: names, paths, label values, text.
MISSPELT = [
    ("settings/cluster.yaml", "bucket: kv-blocks", "bucket: kv-blokcs"),
    ("settings/serve.yaml", "/etc/dualpath/settings", "/etc/daulpath/settings"),
    ("launcher/aws.yaml", "--device /dev/infiniband", "--device /dev/infinband"),
    ("launcher/gcp.yaml", "TERMINATE", "TREMINATE"),
    ("launcher/onpremise.yaml", "--cap-add IPC_LOCK", "--cap-add IPC_LOKC"),
    ("kubernetes/raycluster.yaml", "k8s.v1.cni.cncf.io/networks", "k8s.v1.cni.cncf.io/netwroks"),
    ("kubernetes/rayservice.yaml", "grep success", "grep sucess"),
    ("monitoring/prometheus.yaml", "metrics_path: /metrics", "metrics_path: /metircs"),
    ("monitoring/alerts.yaml", 'outcome="overloaded"', 'outcome="overlaoded"'),
    ("monitoring/grafana.json", "{{state}}", "{{sttae}}"),
    ("container/Dockerfile", "COPY actors actors", "COPY actors actros"),
]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository as far as the checks look."""
    for name in SHIPPED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    return tmp_path / "deploy"


def problems_of(check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except Unreadable as error:
        return [str(error)]
    except Absent as absent:
        pytest.skip(str(absent))


def test_every_shipped_file_is_right() -> None:
    result = CliRunner().invoke(command, ["--strict"])
    assert result.exit_code == 0, result.output
    assert result.output.count("\n") == 11


@pytest.mark.parametrize(("file", "right", "wrong"), MISSPELT, ids=[file for file, _, _ in MISSPELT])
def test_a_misspelt_word_is_found(copy: Path, file: str, right: str, wrong: str) -> None:
    assert not new_words(copy / file)
    text = (copy / file).read_text(encoding="utf-8")
    assert right in text, "the test is out of date"
    (copy / file).write_text(text.replace(right, wrong, 1), encoding="utf-8")
    assert len(new_words(copy / file)) == 1


def test_words_fail_only_where_they_are_ours(copy: Path) -> None:
    folder = copy / "settings"
    (folder / "cluster.yaml").write_text((folder / "cluster.yaml").read_text().replace("kv-blocks", "acme-blocks"))
    shown = CliRunner().invoke(command, ["--root", str(copy)])
    assert shown.exit_code == 0 and "deploy/settings/cluster.yaml: yours, or misspelt: acme" in shown.output
    assert CliRunner().invoke(command, ["--root", str(copy), "--strict"]).exit_code == 1


@pytest.mark.parametrize(("file", "right", "wrong"), TYPOS, ids=[f"{file}: {wrong.splitlines()[0][:40]}" for file, _, wrong in TYPOS])
def test_a_typo_is_found(copy: Path, file: str, right: str, wrong: str) -> None:
    path = copy / file
    text = path.read_text(encoding="utf-8")
    assert right in text, "the test is out of date"
    path.write_text(text.replace(right, wrong, 1), encoding="utf-8")
    assert problems_of(checks(copy, find_definitions())[path])


def test_a_file_that_nothing_checks_is_an_error(copy: Path) -> None:
    (copy / "monitoring" / "extra.yaml").write_text("a: 1\n")
    assert problems_of(checks(copy, None)[copy / "monitoring" / "extra.yaml"]) == ["nothing checks this file"]


def test_what_cannot_be_checked_is_said(copy: Path) -> None:
    with pytest.raises(Absent, match="CRDs"):
        checks(copy, None)[copy / "kubernetes" / "raycluster.yaml"]()
