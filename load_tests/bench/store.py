"""`dualpath bench store`: what the block stores make of a file system and of an S3 service.

Ours and what it is measured against take turns, in alternating order, within one run; ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console
from rich.progress import Progress

from dualpath_ray.transfer.memory import HugePages
from load_tests.bench import store_directory, store_s3
from load_tests.bench.blocks import make_case, scratch
from load_tests.bench.figures import show

NO_FIO = "fio is not installed, so vs_fio_read and vs_fio_write are missing (Debian: apt-get install fio)"


@click.command()
@click.option("--store", "kind", type=click.Choice(["dir", "s3"]), default="dir", show_default=True)
@click.option(
    "--dir", "parent", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Directory to measure in (default: temporary)."
)
@click.option("--endpoint", default="", help="S3 service to measure, with a bucket --bucket (default: a SeaweedFS of its own).")
@click.option("--bucket", default=store_s3.BUCKET, show_default=True)
@click.option(
    "--block-kib", multiple=True, type=click.IntRange(min=256), default=(512, 3072, 8192), show_default=True, help="Full Block sizes."
)
@click.option(
    "--depth", "depths", multiple=True, type=click.IntRange(1, 256), default=(4, 16), show_default=True, help="Blocks under way at once."
)
@click.option("--total-mib", type=click.IntRange(min=1), default=192, show_default=True, help="Bytes moved per measurement.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--io", type=click.Choice(["auto", "nixl", "plain"]), default="auto", show_default=True)
@click.option("--direct", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option(
    "--threads", type=click.IntRange(1, 64), default=store_directory.THREADS, show_default=True, help="Reading, and writing, threads."
)
@click.option(
    "--pages", type=click.Choice(["transparent", "off"]), default="transparent", show_default=True, help="Huge pages, ours and fio's."
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write a PNG of rates by block size and depth.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(
    kind: str,
    parent: Path | None,
    endpoint: str,
    bucket: str,
    block_kib: tuple[int, ...],
    depths: tuple[int, ...],
    total_mib: int,
    rounds: int,
    io: Literal["auto", "nixl", "plain"],
    direct: Literal["auto", "on", "off"],
    threads: int,
    pages: HugePages,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure a block store beside fio, or beside plain GETs and PUTs."""
    sizes = [(kib << 10, depth) for kib in block_kib for depth in depths]
    cases: list[dict[str, Any]] = []
    console = Console(stderr=True)
    if kind == "dir" and not store_directory.has_fio():
        console.print(NO_FIO)
    with Progress(console=console, transient=True) as progress, _service(kind, endpoint, parent) as service:
        task = progress.add_task("", total=len(sizes) * rounds)
        for block_bytes, depth in sizes:
            case = make_case(block_bytes, depth, total_mib << 20, pages)
            progress.update(task, description=case.name)
            tick: Callable[[], None] = lambda: progress.advance(task)  # noqa: E731
            if kind == "s3":
                cases.append(store_s3.measure(case, store_s3.settings_for(case, service, bucket), rounds, tick))
                continue
            with scratch(parent) as folder:
                options = store_directory.settings_for(case, io, direct, threads)
                cases.append(store_directory.measure(case, options, folder, rounds, tick))
    beside = "plain" if kind == "s3" else "fio"
    document = {
        "store": kind,
        "pages": pages,
        **{name: _worst(cases, name) for name in (f"vs_{beside}_read", f"vs_{beside}_write")},
        "checksum_cost": statistics.median(case["checksum_cost"] for case in cases),
        "checksum_cost_quartiles": [statistics.median(case["checksum_cost_quartiles"][end] for case in cases) for end in (0, 1)],
        "checksum_cpu_share": statistics.median(case["checksum_cpu_s_per_gb"] / case["read_cpu_s_per_gb"] for case in cases),
        "cases": cases,
    }
    if plot is not None:
        _plot(cases, beside, plot)
    columns = (
        "block",
        "depth",
        "read GB/s",
        f"x {beside}",
        "write GB/s",
        f"x {beside}",
        "checksums (quartiles)",
        "CPU s/GB",
        "p50 ms",
        "p99 ms",
        f"{beside} p99 ms",
    )
    show(f"{kind} store through {cases[0]['io']}", document, [_row(case, beside) for case in cases], columns, as_json)


@contextlib.contextmanager
def _service(kind: str, endpoint: str, parent: Path | None) -> Iterator[str]:
    if kind != "s3" or endpoint:
        yield endpoint
        return
    with scratch(parent) as folder, store_s3.running_server(folder) as own:
        yield own


def _worst(cases: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [case[key] for case in cases if case[key] is not None]
    return min(values) if values else None


def _row(case: dict[str, Any], beside: str) -> list[str]:
    def number(name: str, form: str = ".2f") -> str:
        return "-" if case.get(name) is None else format(case[name], form)

    def checksums() -> str:
        first, third = case["checksum_cost_quartiles"]
        return f"{case['checksum_cost']:.1%} ({first:.0%} to {third:.0%})"

    return [
        f"{case['block_bytes'] >> 10} KiB", str(case["depth"]), number("read_gbps"), number(f"vs_{beside}_read"), number("write_gbps"),
        number(f"vs_{beside}_write"), checksums(), f"{number('checksum_cpu_s_per_gb', '.3f')} of {number('read_cpu_s_per_gb', '.3f')}",
        number("load_p50_ms"), number("load_p99_ms"),
        number(f"{beside}_read_p99_ms"),
    ]  # fmt: skip


def _plot(cases: Sequence[dict[str, Any]], beside: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{case['block_bytes'] / 2**20:g} MiB\ndepth {case['depth']}" for case in cases]
    places = range(len(cases))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for axis, operation in zip(axes, ("read", "write"), strict=True):
        axis.bar([place - 0.2 for place in places], [case[f"{operation}_gbps"] for case in cases], 0.4, label="dualpath")
        if f"{beside}_{operation}_gbps" in cases[0]:
            axis.bar([place + 0.2 for place in places], [case[f"{beside}_{operation}_gbps"] for case in cases], 0.4, label=beside)
        axis.set_xticks(list(places), labels, fontsize=8)
        axis.set_title(f"{operation}, GB/s")
        axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
