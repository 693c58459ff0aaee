"""The one place that imports pyverbs, which is optional: nothing but diagnosis and benchmarks needs it, and nothing breaks without it.

pyverbs must fit the machine's rdma-core, so it is taken from where that comes from: the distribution's package (Debian, Ubuntu:
python3-pyverbs; found here although it is outside a virtual environment, when its Python version is ours), or one that was built for the
machine and installed into the environment. The one on PyPI is source only and needs a libibverbs of its own version.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dualpath_ray.errors import ConfigError

SYSTEM_PACKAGES = Path("/usr/lib/python3/dist-packages")
REMEDY = "install the distribution's python3-pyverbs (same Python version) with its libibverbs, see docs/traffic.md"


@dataclass(frozen=True, slots=True)
class Verbs:
    """pyverbs, whatever its version: classes by name, constants by their C names."""

    modules: tuple[ModuleType, ...]
    constants: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        for module in self.modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(name)

    def flags(self, *names: str) -> int:
        """Constants joined into a mask."""
        mask = 0
        for name in names:
            mask |= int(self.constants[name])
        return mask


def load(system: Path = SYSTEM_PACKAGES) -> Verbs:
    """Raises ConfigError when pyverbs is missing or does not fit the machine's libraries."""
    try:
        _find(system)
        names = ("device", "pd", "mr", "cq", "qp", "addr", "wr", "pyverbs_error")
        modules = tuple(importlib.import_module(f"pyverbs.{name}") for name in names)
        return Verbs(modules, _constants())
    except ImportError as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == "pyverbs"]:
            del sys.modules[name]  # half of it may be there
        raise ConfigError(f"pyverbs is not available ({error}): {REMEDY}") from error


def _find(system: Path) -> None:
    """Make `import pyverbs` work if the distribution has it; its other packages stay out of our path."""
    if "pyverbs" in sys.modules or importlib.util.find_spec("pyverbs") is not None:
        return
    spec = importlib.util.spec_from_file_location(
        "pyverbs", system / "pyverbs" / "__init__.py", submodule_search_locations=[str(system / "pyverbs")]
    )
    if spec is None or spec.loader is None or not (system / "pyverbs").is_dir():
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["pyverbs"] = module
    spec.loader.exec_module(module)


def _constants() -> dict[str, Any]:
    try:
        flat = importlib.import_module("pyverbs.enums")  # up to rdma-core 50-odd
    except ImportError:
        enums = importlib.import_module("pyverbs.libibverbs_enums")
        kinds = [value for value in vars(enums).values() if isinstance(value, type) and hasattr(value, "__members__")]
        return {name: member for kind in kinds for name, member in kind.__members__.items()}
    return {name: value for name, value in vars(flat).items() if name.startswith("IBV_")}
