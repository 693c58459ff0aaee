"""pyverbs absent, present outside the environment, and present but broken. (The real one: tests/rdma.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODULES = ("device", "pd", "mr", "cq", "qp", "addr", "wr", "pyverbs_error")


def run(code: str, system: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which may have any pyverbs."""
    prelude = f"import sys; from pathlib import Path; from dualpath_ray.rdma import verbs; system = Path({str(system)!r})\n"
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A distribution's folder: pyverbs as a package of the right shape, and another package that must stay out of reach."""
    package = tmp_path / "pyverbs"
    package.mkdir()
    for name in ("__init__", *MODULES):
        (package / f"{name}.py").write_text("class PD:\n    pass\n" if name == "pd" else "")
    (package / "enums.py").write_text("IBV_SEND_SIGNALED = 2\nIBV_SEND_INLINE = 8\nOTHER = 1\n")
    (tmp_path / "stranger.py").write_text("")
    return tmp_path


def test_absent_is_an_error_of_ours_with_the_remedy(tmp_path: Path) -> None:
    done = run("verbs.load(system)", tmp_path)
    assert "ConfigError: pyverbs is not available" in done.stderr and "python3-pyverbs" in done.stderr


def test_nothing_imports_it_unasked() -> None:
    done = run("import dualpath_ray.rdma.loopback, dualpath_ray.doctor.transfers; assert 'pyverbs' not in sys.modules", Path("/nowhere"))
    assert done.returncode == 0, done.stderr


def test_the_distributions_package_is_found_and_nothing_else_of_it(system: Path) -> None:
    code = (
        "names = verbs.load(system)\n"
        "assert names.PD and names.flags('IBV_SEND_SIGNALED', 'IBV_SEND_INLINE') == 10 and 'OTHER' not in names.constants\n"
        "try:\n    import stranger\nexcept ImportError:\n    print('apart')\n"
    )
    done = run(code, system)
    assert done.stdout == "apart\n", done.stderr


def test_newer_versions_keep_their_constants_in_classes(system: Path) -> None:
    (system / "pyverbs/enums.py").unlink()
    (system / "pyverbs/libibverbs_enums.py").write_text("import enum\nclass ibv_send_flags(enum.IntFlag):\n    IBV_SEND_SIGNALED = 2\n")
    done = run("assert verbs.load(system).flags('IBV_SEND_SIGNALED') == 2", system)
    assert done.returncode == 0, done.stderr


def test_one_of_another_python_version_is_as_good_as_none(system: Path) -> None:
    """Its folder is there, its compiled modules are not for us; a second try says the same."""
    for name in MODULES:
        (system / f"pyverbs/{name}.py").unlink()
    done = run("try:\n    verbs.load(system)\nexcept Exception:\n    verbs.load(system)", system)
    assert "ConfigError: pyverbs is not available (No module named 'pyverbs.device')" in done.stderr
