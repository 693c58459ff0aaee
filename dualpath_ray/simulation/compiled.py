"""The modules a simulation spends its time in, compiled by mypyc: the same results to the last digit in less than half of the time.

`dualpath compile` puts extension modules into the user's cache, under a digest of the sources they were made of. `dualpath simulate`,
`reproduce` and `plan` take them from there if the digest is that of their own sources. All else, the live system and the tests among
it, runs the plain modules.

One difference between compiled and plain code matters here: mypyc ends a generator that is left early without running its `finally`.
So these modules have no generators.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import policies
from dualpath_ray.errors import ConfigError
from dualpath_ray.models.cache import build_directory, cache_dir
from dualpath_ray.simulation.kept_cells import build

HOT_POLICIES = (
    "accounts",
    "admission",
    "batch_quota",
    "core",
    "decode_placement",
    "indexed_heap",
    "prefill_placement",
    "read_plan",
    "read_queues",
    "vocabulary",
    "water_filling",
)
HOT_SIMULATION = (
    "curves",
    "decode_group",
    "events",
    "link",
    "measurements",
    "network",
    "prefill_group",
    "round_state",
    "simulator",
)
HOT_MODULES = (*(f"policies.{name}" for name in HOT_POLICIES), *(f"dualpath_ray.simulation.{name}" for name in HOT_SIMULATION))
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def compiled_folder() -> Path:
    """Where the extension modules of this Python and these sources lie, or would lie."""
    return cache_dir() / "simulator" / f"{build()}{SUFFIX.partition('.so')[0]}"


def compile_modules(folder: Path, modules: Sequence[str] = HOT_MODULES) -> None:
    """Fill `folder` with extension modules, unless it is there. Needs mypy and a C compiler; raises ConfigError if that fails."""
    build_directory(folder, lambda empty: _compile(empty, modules))


def _compile(folder: Path, modules: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for package in (Path(policies.__file__ or "").parent, Path(__file__).parents[1]):
            shutil.copytree(package, Path(scratch) / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        files = [f"{module.replace('.', '/')}.py" for module in modules]
        command = [sys.executable, "-m", "mypyc", "--ignore-missing-imports", *files]
        done = subprocess.run(command, cwd=scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise ConfigError(f"the simulator cannot be compiled; mypy[mypyc] and a C compiler are needed: {done.stdout[-500:]}")
        for made in Path(scratch).rglob(f"*{SUFFIX}"):
            if "build" not in made.relative_to(scratch).parts:
                target = folder / made.relative_to(scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(made, target)


def use_compiled(folder: Path | None = None) -> bool:
    """From now on import compiled modules, if there are any. They know each other's layout, so it is all or none: once a plain one has been
    imported this does nothing.
    """
    folder = folder or compiled_folder()
    found = {".".join(file.relative_to(folder).parts).removesuffix(SUFFIX): file for file in folder.rglob(f"*{SUFFIX}")}
    if not found or not sys.modules.keys().isdisjoint(found):
        return False
    sys.meta_path.insert(0, _Finder(found))
    return True


class _Finder:
    """Finds extension modules by their full names."""

    def __init__(self, found: Mapping[str, Path]) -> None:
        self._found = found

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        file = self._found.get(name)
        return None if file is None else importlib.util.spec_from_file_location(name, file)
