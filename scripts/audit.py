"""Look the versions of constraints.txt up among known vulnerabilities (`make audit`), with pip-audit.

Exit status: 0 none is known, 1 some are. Where the service that knows them cannot be reached, or does not know our packages (a mirror),
this says so, and is 0 too unless --strict is given.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

COMMAND = [
    "-m",
    "pip_audit",
    "--requirement",
    "constraints.txt",
    "--no-deps",
    "--disable-pip",
    "--progress-spinner",
    "off",
    "--timeout",
    "10",
    "--format",
    "json",
]
LONGEST_S = 180


def report(document: Mapping[str, Any], *, strict: bool) -> tuple[int, str]:
    """Exit status, and what to say of pip-audit's answer."""
    packages = document["dependencies"]
    known = [f"{one['name']} {one['version']}: {_named(bug)}" for one in packages for bug in one.get("vulns", ())]
    unknown = [one["name"] for one in packages if "vulns" not in one]
    lines = [*known, f"{len(packages) - len(unknown)} of {len(packages)} versions looked up, {len(known)} vulnerabilities known"]
    if unknown:
        lines.append(f"not looked up, as the service does not know them: {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}")
    return int(bool(known) or (strict and bool(unknown))), "\n".join(lines)


def _named(bug: Mapping[str, Any]) -> str:
    return f"{bug['id']}, fixed in {', '.join(bug['fix_versions']) or 'no version yet'}"


def main(strict: bool) -> int:
    try:
        audit = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True, timeout=LONGEST_S)
        status, said = report(json.loads(audit.stdout), strict=strict)
    except subprocess.TimeoutExpired:
        status, said = int(strict), f"not audited: no answer within {LONGEST_S} s"
    except ValueError:  # no document: pip-audit reached nobody
        status, said = int(strict), f"not audited: {(audit.stderr.strip().splitlines() or ['no answer'])[-1]}"
    print(f"audit: {said}")
    return status


if __name__ == "__main__":
    sys.exit(main("--strict" in sys.argv[1:]))
