"""Compiled modules beside plain ones. Only leaves are compiled here, which takes seconds; `dualpath compile` takes a minute."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dualpath_ray.errors import ConfigError
from dualpath_ray.simulation import kept_cells
from dualpath_ray.simulation.compiled import HOT_MODULES, SUFFIX, compile_modules, use_compiled
from dualpath_ray.simulation.experiment import Experiment, run

LEAVES = ("policies.indexed_heap", "policies.water_filling", "dualpath_ray.simulation.link", "dualpath_ray.simulation.events")
RUN = """
import importlib, json, sys
from pathlib import Path
from dualpath_ray.simulation.compiled import use_compiled
assert use_compiled(Path(sys.argv[1]))
from dualpath_ray.simulation.experiment import Experiment, run
from dualpath_ray.simulation import kept_cells
files = [importlib.import_module(name).__file__ for name in sys.argv[2:]]
print(json.dumps({"files": files, "build": kept_cells.build(), "result": run(Experiment.model_validate_json(sys.stdin.read()))}))
"""


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="needs a C compiler")
def test_compiled_modules_give_the_same_results(tmp_path: Path) -> None:
    crowded = {"prefill_nodes": 1, "decode_nodes": 3, "node": {"staging_bytes": 2e9}}
    experiment = Experiment.model_validate({"model": "ds-27b", "cluster": crowded, "mal": "32K", "agents": 16, "mode": "layerwise"})
    folder = tmp_path / "compiled"
    compile_modules(folder, LEAVES)
    command = [sys.executable, "-c", RUN, str(folder), *LEAVES]
    found = json.loads(subprocess.run(command, input=experiment.model_dump_json(), check=True, text=True, stdout=subprocess.PIPE).stdout)
    assert [Path(file).is_relative_to(folder) for file in found["files"]] == [True] * len(LEAVES)
    assert found["build"] == kept_cells.build()
    assert found["result"] == json.loads(json.dumps(run(experiment)))


def test_compiled_modules_are_not_mixed_with_plain_ones(tmp_path: Path) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / f"indexed_heap{SUFFIX}").touch()
    before = list(sys.meta_path)
    assert not use_compiled(tmp_path)  # this process has imported the plain one
    assert sys.meta_path == before


def test_without_a_compiler_the_error_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ConfigError, match="C compiler"):
        compile_modules(tmp_path / "compiled", LEAVES)
    assert not (tmp_path / "compiled").exists()


def test_hot_modules_have_no_generators() -> None:
    """mypyc ends a generator that is left early without its `finally`; one such loop made compiled runs differ from plain ones."""
    root = Path(kept_cells.__file__).parents[2]
    for name in HOT_MODULES:
        tree = ast.parse((root / f"{name.replace('.', '/')}.py").read_text())
        assert not any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(tree)), name
