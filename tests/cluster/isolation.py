"""Programs in network and process namespaces of their own: the ports that they name are free, and nothing outlives them."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
from collections.abc import Sequence

import pytest

from tests.unit.docs_commands import ROOT

ISOLATED = ("unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")


@functools.cache
def isolation_works() -> bool:
    return os.geteuid() == 0 and subprocess.run([*ISOLATED, "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0


needs_isolation = pytest.mark.skipif(not isolation_works(), reason="needs root, and namespaces of its own (unshare --net --pid)")


def run_isolated(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a program of the repository, with a loopback of its own."""
    shell = f"ip link set lo up && exec {shlex.join(command)}"
    return subprocess.run([*ISOLATED, "bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
