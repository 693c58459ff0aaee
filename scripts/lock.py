"""Print constraints: the versions installed here of everything that this project with its `dev` extra pulls in, and of nothing else.

Local version tags (`2.13.0+cpu`) are cut off, so that the same file serves machines with and without GPUs.
"""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = "dualpath-ray"


def main() -> None:
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [(PROJECT, ""), (PROJECT, "dev")]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        distribution = metadata.distribution(name)
        versions[name] = Version(distribution.version).public
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                dependency = str(canonicalize_name(requirement.name))
                queue += [(dependency, ""), *((dependency, wanted) for wanted in requirement.extras)]
    del versions[PROJECT]
    versions.pop("pip", None)  # of the virtual environment, which installs with it
    print("# Made by `make lock`. Installed with these versions, the tests pass.")
    print("\n".join(f"{name}=={version}" for name, version in sorted(versions.items())))


if __name__ == "__main__":
    main()
