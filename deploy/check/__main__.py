"""`python -m deploy.check`: a line per file; exit status 1 if one is wrong. What could not be checked here is said, and is no failure.

Words that the shipped files do not have are shown, for one's own names are among them; `--strict`, for the shipped files, fails on them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from deploy.check.container import check_container
from deploy.check.kubernetes import check_manifest
from deploy.check.launcher import check_launcher
from deploy.check.monitoring import check_grafana, check_prometheus, check_rules
from deploy.check.problems import Absent, Unreadable
from deploy.check.settings import check_serve, check_settings
from deploy.check.words import learn, new_words

DEPLOY = Path(__file__).parents[1]
CRDS = Path("shared") / "data" / "kuberay_crds"  # beside this repository, or above it; never in it


def find_definitions() -> Path | None:
    """KubeRay's custom resource definitions, where a developer keeps them."""
    return next((parent / CRDS for parent in DEPLOY.parents if (parent / CRDS).is_dir()), None)


def checks(root: Path, definitions: Path | None) -> dict[Path, Callable[[], list[str]]]:
    """Every file under `root` (a deploy folder) that another program reads, with its check. A file without one is an error of ours."""
    settings, monitoring, container = root / "settings", root / "monitoring", root / "container" / "Dockerfile"
    rules, dashboard = monitoring / "alerts.yaml", monitoring / "grafana.json"
    found: dict[Path, Callable[[], list[str]]] = {
        settings / "cluster.yaml": partial(check_settings, settings / "cluster.yaml"),
        settings / "serve.yaml": partial(check_serve, settings / "serve.yaml"),
        monitoring / "prometheus.yaml": partial(check_prometheus, monitoring / "prometheus.yaml"),
        rules: partial(check_rules, rules),
        dashboard: partial(check_grafana, dashboard, rules),
        container: partial(check_container, container),
    }
    found |= {path: partial(check_launcher, path) for path in sorted((root / "launcher").glob("*"))}
    found |= {path: partial(check_manifest, path, definitions) for path in sorted((root / "kubernetes").glob("*"))}
    shipped = {path for path in root.rglob("*") if path.suffix in (".yaml", ".yml", ".json") or path.name.startswith("Dockerfile")}
    found = {path: partial(_guarded, check) for path, check in found.items()}
    return found | {path: partial(list, ["nothing checks this file"]) for path in sorted(shipped - set(found))}


def _guarded(check: Callable[[], list[str]]) -> list[str]:
    """A document whose parts are of other types than a check takes for granted is wrong, too."""
    try:
        return check()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"not built as it should be: {type(error).__name__}: {error}"]


@click.command()
@click.option("--root", type=click.Path(path_type=Path, exists=True), default=DEPLOY, help="Folder to check (default: this one).")
@click.option("--crds", type=click.Path(path_type=Path), help=f"KubeRay's custom resource definitions (default: ../{CRDS} if it exists).")
@click.option("--strict", is_flag=True, help="Fail on words that the shipped files do not have.")
@click.option("--learn", "learns", is_flag=True, help="Take the words of the files, as they are, for known ones.")
def command(root: Path, crds: Path | None, strict: bool, learns: bool) -> None:
    """Check every file that deploy/ ships for other programs."""
    failed = 0
    found = checks(root, crds or find_definitions())
    if learns:
        learn(found)
    for path, check in found.items():
        name = path.relative_to(root.parent)
        new = ", ".join(new_words(path))
        if new:
            failed += strict
            click.echo(f"{name}: {'misspelt, or for --learn' if strict else 'yours, or misspelt'}: {new}")
        try:
            problems = check()
        except Absent as absent:
            click.echo(f"{name}: NOT CHECKED, {absent}")
            continue
        except Unreadable as error:
            problems = [str(error)]
        failed += bool(problems)
        click.echo(f"{name}: {'ok' if not problems else f'{len(problems)} problems'}")
        for problem in problems:
            click.echo(f"  {problem}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    command()
