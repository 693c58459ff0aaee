"""What `make audit` says, and that it says it where nobody can be asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from scripts.audit import report

SOUND = {"name": "numpy", "version": "2.0", "vulns": []}
BROKEN = {"name": "jinja2", "version": "3.0", "vulns": [{"id": "CVE-1", "fix_versions": ["3.1"]}, {"id": "CVE-2", "fix_versions": []}]}
UNKNOWN = {"name": "ours", "skip_reason": "not found"}


def test_a_known_vulnerability_fails() -> None:
    status, said = report({"dependencies": [SOUND, BROKEN]}, strict=False)
    assert status == 1
    assert "jinja2 3.0: CVE-1, fixed in 3.1" in said and "CVE-2, fixed in no version yet" in said


def test_what_was_not_looked_up_is_no_clean_bill() -> None:
    """pip-audit itself says that there are no known vulnerabilities where it found no package at all."""
    for strict in (False, True):
        status, said = report({"dependencies": [SOUND, UNKNOWN]}, strict=strict)
        assert status == strict and "1 of 2 versions looked up" in said and "does not know them: ours" in said


def test_without_a_service_it_says_so_at_once() -> None:
    environment = os.environ | {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # nobody listens there
    command = [sys.executable, "scripts/audit.py"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("audit: not audited: ") and "Connection refused" in done.stdout
    assert subprocess.run([*command, "--strict"], cwd=root, env=environment, capture_output=True, timeout=60).returncode == 1
