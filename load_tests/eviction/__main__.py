"""`python -m load_tests.eviction [TRACES]...`: hit ratios of eviction policies over traces, by size of the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from load_tests.bench.figures import show
from load_tests.eviction.policies import POLICIES
from load_tests.eviction.replay import hits_of, optimum
from load_tests.eviction.uses import Uses, made_up_uses, read_uses
from load_tests.experiments.plots import figure

SIZES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # of all blocks that a trace makes
MADE_UP = "made up"
OPTIMUM = "optimum"


@click.command()
@click.argument("traces", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--count", type=click.IntRange(1), help="First requests or sessions of each trace only.")
@click.option("--block-tokens", type=click.IntRange(1), default=256, show_default=True, help="Tokens of a block where the trace has none.")
@click.option("--agents", type=click.IntRange(1), default=64, show_default=True, help="Sessions at a time where the trace has no times.")
@click.option(
    "--turn-s", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True, help="A turn's mean time, without its pause."
)
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="Also draw eviction.png there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def main(
    traces: tuple[Path, ...], count: int | None, block_tokens: int, agents: int, turn_s: float, plots: Path | None, as_json: bool
) -> None:
    """Of the blocks that requests load, the share that a gateway's memory would have: policies by memory size.

    TRACES are JSON lines of requests with block hashes (Mooncake's format) or of sessions with token counts; without any, one is made up.
    """
    results: dict[str, dict[str, Any]] = {}
    sources: list[Path | None] = [*traces] or [None]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(sources) * len(SIZES) * (len(POLICIES) + 1))
        for source in sources:
            name = source.stem if source else MADE_UP
            progress.update(task, description=name)
            try:
                if source is None:
                    requests = made_up_uses(block_tokens, agents, turn_s, count)
                else:
                    requests = read_uses(source, block_tokens, agents, turn_s, count)
            except ValueError as error:
                raise click.UsageError(str(error)) from error
            results[name] = compare(requests, lambda: progress.advance(task))
    if plots is not None:
        draw(results, plots / "eviction.png")
    settings = {"block_tokens": block_tokens, "agents": agents, "turn_s": turn_s, "count": count}
    document = {"settings": settings, "sizes": SIZES, "traces": results}
    show(
        "share of loaded blocks that memory has", document, _rows(results), ["trace", "policy", *(f"{size:.1%}" for size in SIZES)], as_json
    )


def compare(requests: Sequence[Uses], step: Any = lambda: None) -> dict[str, Any]:
    """Hit ratios by policy, one for each of SIZES."""
    blocks = sum(len(uses.makes) for uses in requests)
    loads = sum(len(uses.loads) for uses in requests)
    capacities = [max(2, round(size * blocks)) for size in SIZES]
    ratios: dict[str, list[float]] = {name: [] for name in (*POLICIES, OPTIMUM)}
    for capacity in capacities:
        for name, policy in POLICIES.items():
            ratios[name].append(hits_of(policy(capacity), requests) / max(1, loads))
            step()
        ratios[OPTIMUM].append(optimum(capacity, requests) / max(1, loads))
        step()
    return {"requests": len(requests), "blocks": blocks, "loads": loads, "capacities": capacities, "ratios": ratios}


def _rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    return [
        [trace, policy, *(f"{ratio:.3f}" for ratio in row)] for trace, found in results.items() for policy, row in found["ratios"].items()
    ]


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Hit ratio by size, a panel for each trace."""
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    with figure(path, rows, columns, size=(4.6 * columns, 3.6 * rows), sharex=True, sharey=True) as (_, grid):
        for axes, (trace, found) in zip(grid.flat, results.items(), strict=False):
            for policy, ratios in found["ratios"].items():
                style = {"color": "black", "linestyle": ":"} if policy == OPTIMUM else {"marker": "o", "markersize": 3}
                axes.plot(SIZES, ratios, label=policy, **style)
            axes.set_xscale("log")
            axes.set_xticks(SIZES, [f"{size:.1%}" for size in SIZES])
            axes.minorticks_off()
            axes.set_ylim(0, 1)
            axes.set_title(f"{trace}: {found['requests']:,} requests, {found['blocks']:,} blocks", fontsize=9)
            axes.grid(alpha=0.3)
        for axes in grid[:, 0]:
            axes.set_ylabel("share of loads in memory")
        for axes in grid[-1]:
            axes.set_xlabel("memory, of all blocks made")
        for axes in grid.flat[len(results) :]:
            axes.set_visible(False)
        grid[0, 0].legend(fontsize=8)
    return path


if __name__ == "__main__":
    main()
