from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import yaml

from dualpath_ray.config import DecodeSettings, Settings, StagingSettings, TransferSettings
from dualpath_ray.errors import ConfigError


def load(*overrides: str, file: Path | None = None, **environ: str) -> Settings:
    return Settings.load(file, overrides, environ)


def test_set_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("prefill: {window_layers: 5, max_batch_tokens: 2048, max_requests: 7}\n")
    environ = {"DUALPATH__PREFILL__WINDOW_LAYERS": "6", "DUALPATH__PREFILL__MAX_BATCH_TOKENS": "4096", "UNRELATED": "1"}
    settings = Settings.load(file, ["prefill.window_layers=7"], environ)
    assert (settings.prefill.window_layers, settings.prefill.max_batch_tokens, settings.prefill.max_requests) == (7, 4096, 7)
    assert settings.decode == DecodeSettings()


def test_values_are_yaml_and_sizes_have_units() -> None:
    settings = load(
        "staging.bytes=2GiB",
        "cluster.prefill_labels={dp.role: prefill}",
        "model.served_name=7",
        "storage.emulation.read_bandwidth=100MB",
        "transfer.busy_poll_s=1e-3",
        "telemetry.traces=off",  # YAML's word for False
        "storage.direct=on",
        "staging.huge_pages=off",
        "model.max_context=null",
    )
    assert settings.staging.bytes == 2 << 30
    assert (settings.storage.direct, settings.staging.huge_pages) == ("on", "off")
    assert settings.cluster.prefill_labels == {"dp.role": "prefill"}
    assert settings.model.name == "7"
    assert settings.storage.emulation.read_bandwidth == 100_000_000 and settings.storage.emulation.active
    assert not load().storage.emulation.active
    assert settings.transfer.busy_poll_s == 0.001
    assert settings.telemetry.traces == "off"


def test_it_can_be_pickled_compared_and_written_out_again(tmp_path: Path) -> None:
    settings = load("storage.path=~/blocks", "transfer.ucx={RNDV_THRESH: 8k}", "model.max_context=2048")
    assert settings.storage.path == Path.home() / "blocks"
    assert pickle.loads(pickle.dumps(settings)) == settings
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert load(file=file) == settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "prefill.windw_layers=2",
            "prefill.windw_layers (from --set prefill.windw_layers=2) is not a setting; did you mean prefill.window_layers?",
        ),
        (
            "storage.emulation.bandwidth=2",
            "storage.emulation.bandwidth (from --set storage.emulation.bandwidth=2) is not a setting; did you mean",
        ),
        ("engine.x=1", "is not a setting; there are: autoscaling, cluster, decode"),
        ("prefill=3", "prefill = 3 (from --set prefill=3): this is a section: give its fields"),
        (
            "staging.bytes=-1",
            "staging.bytes = -1 (from --set staging.bytes=-1): a size is a number of bytes, or a number with a unit: 4GiB",
        ),
        ("staging.bytes=4GoB", "staging.bytes = '4GoB' (from --set staging.bytes=4GoB): a size is a number of bytes"),
        (
            "prefill.window_layers=0",
            "prefill.window_layers = 0 (from --set prefill.window_layers=0): Input should be greater than or equal to 1",
        ),
        ("cluster.prefill_nodes=true", "cluster.prefill_nodes = True (from --set cluster.prefill_nodes=true): Input should be a number"),
        ("cluster.decode_nodes=10000000000000000000000", "Input should be less than or equal to 10000"),
        ("serving.request_timeout_s=yes", "Input should be a number"),
        ("model.dtype=int8", "model.dtype = 'int8' (from --set model.dtype=int8): Input should be 'float32', 'bfloat16' or 'float16'"),
        ("serving.request_timeout_s=.inf", "finite number"),
        ("model.block_tokens=100", "prefill.max_batch_tokens must be a multiple of model.block_tokens (100)"),
        ("prefill.window_tokens=64", "prefill.window_tokens must be at least prefill.max_batch_tokens"),
        ("storage.kind=s3", "storage (from --set storage.kind=s3): kind s3 needs s3.bucket"),
        ("telemetry.traces=otlp", "telemetry (from --set telemetry.traces=otlp): traces: otlp needs endpoint"),
        ("scheduling.report_interval_s=9", "at least three times report_interval_s"),
        ("serving.max_tokens_limit=3", "default_max_tokens must not exceed max_tokens_limit"),
        ("prefill.compute_quota_s=0.3", "compute_quota_s needs attention_pair_s to predict from"),
        (
            "storage.emulation.error_rate=1.5",
            "storage.emulation.error_rate = 1.5 (from --set storage.emulation.error_rate=1.5): Input should be less than or",
        ),
        ("a", "--set a: write it as section.field=value"),
        ("=3", "write the field as section.field"),
        ("model.spec=[", "the value is not valid YAML; quote it"),
        ("model.spec=", "model.spec = None (from --set model.spec=): Input should be a valid string"),
    ],
)
def test_errors_name_the_field_its_origin_and_the_remedy_on_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load(override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ("staging.slots=8", "staging.bytes=1GiB"),
        ("decode.pool_blocks=8", "decode.pool_bytes=1GiB"),
        ("prefill.window_tokens=2048", "model.max_context=4096"),
    ],
)
def test_contradictions_are_refused(overrides: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"one of them|at least model.max_context"):
        load(*overrides)


def test_several_errors_and_their_origins_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"model.dtype.*DUALPATH__MODEL__DTYPE.*; serving.port.*--set serving.port=-1"):
        Settings.load(None, ["serving.port=-1"], {"DUALPATH__MODEL__DTYPE": "x"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must hold sections"),
        ("a: [", "not valid YAML"),
        ("prefill: {window_layers: 1}\nmodel: {}\nprefill: {max_requests: 2}\n", "prefill is given twice"),
        (b"\xff\xfe\xff", "not valid YAML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    file = tmp_path / "c.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        load(file=file)


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load(file=tmp_path / "c.yaml") == Settings()
    (tmp_path / "c.yaml").write_text("prefill:\n#  window_layers: 5\n")
    assert load(file=tmp_path / "c.yaml") == Settings()


def test_the_served_name_defaults_to_the_last_part_of_the_path() -> None:
    assert load("model.spec=/models/Some-Model.gguf").model.name == "Some-Model"
    assert load("model.spec=/models/Some-Model/").model.name == "Some-Model"


def test_staging_and_pool_hold_at_least_one_request() -> None:
    assert StagingSettings(slots=10).slot_count(1 << 20, 10) == 10
    assert StagingSettings(bytes=10 << 20).slot_count(1 << 20, 10) == 10
    assert StagingSettings().slot_count(1 << 20, 10) == 1024
    assert StagingSettings().slot_count(1 << 20, 1000) == 2000
    assert DecodeSettings(pool_bytes=10 << 20).pool_size(1 << 20, 10) == 10
    assert DecodeSettings(max_batch=16).pool_size(1 << 20, 10) == 40
    assert DecodeSettings(max_batch=1).pool_size(1 << 20, 10) == 10
    with pytest.raises(ConfigError, match="staging holds 9 blocks"):
        StagingSettings(slots=9).slot_count(1 << 20, 10)
    with pytest.raises(ConfigError, match="pool holds 9 blocks"):
        DecodeSettings(pool_blocks=9).pool_size(1 << 20, 10)


def test_ucx_environment() -> None:
    settings = TransferSettings(tls="tcp", net_devices="eth1", error_handling="none", ucx={"TCP_TX_SEG_SIZE": "256K"})
    assert settings.environment() == {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "eth1", "UCX_TCP_TX_SEG_SIZE": "256K"}
    assert TransferSettings().environment() == {"UCX_SYSV_ERROR_HANDLING": "y", "UCX_POSIX_ERROR_HANDLING": "y"}


def test_a_ratio_outside_the_range_is_warned_of_by_row() -> None:
    known = ["cluster.snic_bandwidth=50GB", "cluster.cnic_bandwidth=50GB", "cluster.engines_per_node=8"]
    assert Settings.load(overrides=[*known, "cluster.decode_nodes=2"], environ={}).cluster.warnings() == []
    (nic, memory) = Settings.load(overrides=[*known, "cluster.prefill_nodes=4"], environ={}).cluster.warnings()
    assert nic.startswith("decode NIC in: P/D = 4 is above 3.5") and memory.startswith("decode memory")
    assert Settings.load(overrides=["cluster.prefill_nodes=99"], environ={}).cluster.warnings() == [], "bandwidths are not known"
