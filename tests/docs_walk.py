"""Runs the commands of a page of the docs one after the other, as its reader would: in one directory, under the variables that `export`
has set, and beside the service that the last `dualpath serve` has started.

    python -m tests.docs_walk PAGE DIRECTORY     all of a page that can be run, in DIRECTORY
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from dualpath_ray.models.cache import cache_dir
from tests.unit.docs_commands import PAGES, ROOT, commands_of

SERVE = "dualpath serve"
START_S, END_S = 240.0, 90.0
NOT_A_READER_S = ("RAY_ADDRESS", "RAY_AUTH_MODE", "XDG_CACHE_HOME", "DUALPATH_CACHE")


class Walk:
    """`directory` becomes the home directory, too, with the models that there are here. `close` it, or at least `kill` it."""

    def __init__(self, directory: Path, **environment: str) -> None:
        self.directory = directory
        for path in ROOT.iterdir():  # what commands write stays out of the repository
            if path.name not in (".git", ".venv"):
                (directory / path.name).symlink_to(path)
        (directory / ".venv").symlink_to(sys.prefix)
        (directory / ".cache" / "dualpath-ray" / "blocks").mkdir(parents=True)  # as after the quick start
        (directory / ".cache" / "dualpath-ray" / "models").symlink_to(cache_dir() / "models")
        (directory / ".curlrc").write_text("fail-with-body\n")  # otherwise curl succeeds whatever the answer is
        ours = {
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "PYTHONWARNINGS": "ignore",
            "HOME": str(directory),
            "TMPDIR": str(directory),
        }
        self.environment = {name: value for name, value in os.environ.items() if name not in NOT_A_READER_S} | ours | environment
        self.served: subprocess.Popen[bytes] | None = None
        self.log = directory / "serve.log"

    def missing(self, line: str) -> str:
        """The program of this line, if it is not installed."""
        program = shlex.split(line, comments=True)[0]
        there = "=" in program or program == "export" or shutil.which(program, path=self.environment["PATH"])
        return "" if there else program

    def run(self, line: str, timeout_s: float = 120) -> None:
        """Raises AssertionError unless it succeeds, or begins to serve."""
        if line.startswith(SERVE):
            self._serve(line)
            return
        if line.startswith("export "):
            line += "\nenv -0"
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line], cwd=self.directory, env=self.environment, capture_output=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{line}\n{done.stdout.decode()}{done.stderr.decode()}"
        if line.startswith("export "):
            pairs = (pair.partition("=") for pair in done.stdout.decode().split("\0") if pair)
            self.environment = {name: value for name, _, value in pairs}

    def address(self) -> str:
        """Where the service is."""
        return self.log.read_text().partition(" at ")[2].split()[0].removesuffix("/v1")

    def _serve(self, line: str) -> None:
        self.close()
        with self.log.open("w") as log:
            self.served = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=self.directory, env=self.environment, stderr=log)
        deadline = time.monotonic() + START_S
        while "serving " not in self.log.read_text():
            assert self.served.poll() is None and time.monotonic() < deadline, f"{line}\n{self.log.read_text()}"
            time.sleep(0.2)

    def close(self) -> None:
        """End the service. Raises AssertionError if it does not end well."""
        served, self.served = self.served, None
        if served is not None:
            served.terminate()
            assert served.wait(END_S) == 0, self.log.read_text()

    def kill(self) -> None:
        """The same for one that did not end well, or at all."""
        if self.served is not None and self.served.poll() is None:
            for process in (*psutil.Process(self.served.pid).children(recursive=True), self.served):
                process.kill()


def main(name: str, directory: Path) -> None:
    (page,) = [page for page in PAGES if page.stem == name]
    walk = Walk(directory)
    for command in commands_of(page):
        if missing := command.runs != "never" and walk.missing(command.line):
            print(f"$ {command.line}\n  left out: {missing} is not installed", flush=True)
        elif command.runs != "never":
            print(f"$ {command.line}", flush=True)
            started = time.monotonic()
            walk.run(command.line, timeout_s=280)
            print(f"  {time.monotonic() - started:.1f} s", flush=True)
    walk.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
