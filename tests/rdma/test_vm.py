"""Runs tests/rdma/guest in a virtual machine with two soft-RoCE devices, in one boot, and reports each of its tests here.

`make test-rdma`; no part of `make test`, since it takes minutes of emulation. What it shows is function: that every flow is marked as
configured, and that verbs, UCX, NIXL and the system work over RDMA. Isolation between classes and speed need real switches and cards.
"""

from __future__ import annotations

import ast
import json
import os
import random
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dualpath_ray.models.tiny import make_tiny_model
from tests.rdma.vm import CHECKOUT, Vm, why_not

ENABLE = "DUALPATH_TEST_VM"
GUEST = Path(__file__).with_name("guest")
TIME_LIMIT_S = 15 * 60
TEST_LIMIT_S = 400
ORDER = ("discovery", "verbs", "classes", "nixl", "doctor", "prefill")  # the slowest last

pytestmark = [
    pytest.mark.timeout(TIME_LIMIT_S + 60),
    pytest.mark.skipif(os.environ.get(ENABLE) != "1", reason=f"runs a virtual machine for minutes: make test-rdma ({ENABLE}=1)"),
]


def guest_tests() -> list[str]:
    """`module::function` of every test in the guest, without importing what only works there."""
    found = []
    for path in (GUEST / f"check_{name}.py" for name in ORDER):
        functions = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
        found += [f"{path.stem}::{function.name}" for function in functions if function.name.startswith("test_")]
    return found


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """Every guest test with its failures (of its parameters), from one run of the machine."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("out")
    write_session(out)
    options = f"-p no:cacheprovider -p pytest_timeout --timeout={TEST_LIMIT_S} --confcutdir={GUEST} --rootdir={GUEST} -c /dev/null"
    options += " -o python_files=check_*.py --durations=0 -v -s --junitxml=/out/results.xml"
    environment = "OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1"  # most plug-ins are only slow to import there
    files = " ".join(str(GUEST / f"check_{name}.py") for name in ORDER)
    command = f"cd {CHECKOUT}; {environment} {sys.executable} -m pytest {options} {files}"
    code = Vm().run(command, out, TIME_LIMIT_S)
    log = (out / "output.log").read_text(errors="replace")
    print(log)
    if (figures := out / "classes.json").exists():
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            for name, row in json.loads(figures.read_text(encoding="ascii")).items():
                print(f"\n{name:24}", ", ".join(f"{key} {value:.2f}" for key, value in row.items()), end="", flush=True)
    results = out / "results.xml"
    assert results.exists(), f"pytest ended with {code} in the guest: {log[-3000:]}"
    return read_results(results)


def write_session(out: Path) -> None:
    """A tiny model, and two turns with transformers' own continuation of each."""
    import torch
    from transformers import AutoModelForCausalLM

    path = make_tiny_model("llama", out / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    generator = random.Random(7)
    history: list[int] = []
    turns = []
    for appended in (150, 40):
        history += [generator.randrange(3, 500) for _ in range(appended)]
        full = model.generate(torch.tensor([history]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected = full[0, len(history) :].tolist()
        turns.append({"prompt": list(history), "expected": expected})
        history += expected
    (out / "turns.json").write_text(json.dumps(turns), encoding="ascii")


def read_results(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        module = case.attrib["classname"].rpartition(".")[2]
        name = f"{module}::{case.attrib['name'].partition('[')[0]}"
        failures = [str(child.text) for child in case if child.tag in ("failure", "error", "skipped")]
        found.setdefault(name, []).extend(failures)
    return found


@pytest.mark.parametrize("name", guest_tests())
def test_in_the_guest(name: str, outcomes: dict[str, list[str]]) -> None:
    assert name in outcomes, "did not run in the guest"
    assert not outcomes[name], "\n".join(outcomes[name])
