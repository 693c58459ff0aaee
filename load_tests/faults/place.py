"""Where the faults happen: hosts of a testbed, or this machine."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from deploy.http_api.proxy import CALLBACK, VARIABLE
from dualpath_ray.models.tiny import make_tiny_model
from load_tests.faults.driver import VOCABULARY
from load_tests.faults.hosts import BUCKET
from load_tests.faults.job import Answer, Job
from load_tests.testbed.errors import TestbedError
from load_tests.testbed.ray_nodes import ROOT
from load_tests.testbed.spec import HEAD, STORAGE, TestbedSpec
from load_tests.testbed.testbed import UCX, Testbed, open_testbed

PROXY_PORT = 8334
MAX_CONTEXT = 1024
SPEC = TestbedSpec(prefill_hosts=2, decode_hosts=3, snic_bits=100_000_000, cnic_bits=400_000_000)
NODES = 2  # prefill and decode nodes of the cluster: one decode host is a spare
SLACK_S = 1800.0

# How soon Ray notices that a host is gone, and how soon a host that was cut off notices it itself and ends its processes.
RAY_ENV = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    VARIABLE: CALLBACK,  # what Serve's proxy answers when a replica dies
}
NODE_FENCE_S = 25
# A kernel goes on sending what a dead process left for as long as the other end may be silent, and a little more.
TCP_USER_TIMEOUT_S, LATE_WRITE_S = 4, 5

COMMON = (
    "model.threads=1",
    f"model.max_context={MAX_CONTEXT}",
    "model.block_tokens=16",
    "staging.slots=512",
    "prefill.window_layers=2",
    "cluster.health_timeout_s=8",
    "scheduling.min_split_blocks=4",
    "scheduling.report_timeout_s=2",
    "serving.request_timeout_s=60",
)


def _model(folder: Path) -> Path:
    return make_tiny_model("llama", folder / "model", vocabulary=VOCABULARY, max_context=MAX_CONTEXT)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Wait for the driver. After Ctrl-C it ends with its round and what was found is kept; a second one ends all."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        return process.wait()


def run_local(job: Job) -> Answer:
    """On this machine alone: no links to cut, no storage server to kill."""
    with tempfile.TemporaryDirectory(prefix="dpf") as name:
        folder = Path(name)
        model = _model(folder)
        overrides = [
            *COMMON,
            "cluster.namespace=faults",
            "cluster.prefill_nodes=2",
            "cluster.decode_nodes=2",
            f"model.spec={model}",
            f"storage.path={folder / 'store'}",
            "storage.emulation={latency_s: 0.02, read_bandwidth: 20MB}",  # so that reading takes long enough to be met
            *job.overrides,
        ]
        job = replace(job, overrides=overrides, model_path=str(model))
        job.write(folder / "job.json")
        command = [sys.executable, "-m", "load_tests.faults.driver", str(folder / "job.json"), str(folder / "answer.json")]
        code = _end(subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr))  # Ray prints there
        if code:
            raise TestbedError(f"the run ended with status {code}; its output is above")
        return Answer.read(folder / "answer.json")


def run_testbed(job: Job, spec: TestbedSpec = SPEC, logs: Path | None = None) -> Answer:
    """On hosts of their own, with links and a storage server that fail too. Their Ray logs go to `logs`."""
    with open_testbed(spec, [BUCKET], ray_env=RAY_ENV) as testbed:
        model = _model(testbed.folder)
        endpoint = _store_proxy(testbed)
        ucx = {**UCX, "TCP_USER_TIMEOUT": f"{TCP_USER_TIMEOUT_S}s"}
        overrides = [
            *testbed.overrides(BUCKET),
            *COMMON,
            "cluster.namespace=faults",
            f"cluster.prefill_nodes={NODES}",
            f"cluster.decode_nodes={NODES}",
            f"model.spec={model}",
            f"storage.s3={{bucket: {BUCKET}, endpoint: '{endpoint}', anonymous: true, request_timeout_s: 5}}",
            "transfer.push_timeout_s=10",
            f"transfer.ucx={{{', '.join(f'{name}: {value}' for name, value in ucx.items())}}}",
            f"transfer.late_write_s={LATE_WRITE_S}",
            f"cluster.node_fence_s={NODE_FENCE_S}",
            *job.overrides,
        ]
        where = {"spec": asdict(spec), "owner": testbed.network.owner, "folder": str(testbed.folder), "env": RAY_ENV}
        job = replace(job, overrides=overrides, model_path=str(model), testbed=where)
        job.write(testbed.folder / "job.json")
        command = [sys.executable, "-m", "load_tests.faults.driver", str(testbed.folder / "job.json"), str(testbed.folder / "answer.json")]
        process = testbed.network.popen(
            HEAD, command, env={**testbed.ray.env, "RAY_ADDRESS": testbed.ray.address}, cwd=ROOT, stdout=sys.stderr
        )
        code = _end(process)
        if logs is not None:
            for found in testbed.folder.glob("*/session_2*/logs"):
                shutil.copytree(found, logs / found.parts[-3] / found.parts[-2], dirs_exist_ok=True)
        if code:
            raise TestbedError(f"the run ended with status {code}; its output is above")
        return Answer.read(testbed.folder / "answer.json")


def _store_proxy(testbed: Testbed) -> str:
    """Start the proxy on the storage host; returns its URL."""
    command = [
        sys.executable,
        "-m",
        "load_tests.faults.store_proxy",
        str(PROXY_PORT),
        testbed.storage.endpoint,
        str(testbed.folder / "store-mode"),
    ]
    with (testbed.folder / "store-proxy.log").open("wb") as log:
        testbed.network.popen(STORAGE, command, env={"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, cwd=ROOT)
    return f"http://{testbed.spec.address(STORAGE, 'snic')}:{PROXY_PORT}"
