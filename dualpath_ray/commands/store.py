"""`dualpath store`: look into the block store and keep it in order, whether a cluster runs on it or not.

Exit status: 0 all well, 1 damage found, 2 wrong usage or a store that cannot be used, 3 another process is collecting.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from dualpath_ray.commands.options import with_settings
from dualpath_ray.config import Settings
from dualpath_ray.errors import BlockCorruptError, BlockMissingError
from dualpath_ray.kv.eviction import total_bytes, unrooted
from dualpath_ray.kv.keys import is_root
from dualpath_ray.stores.block_format import verify_whole
from dualpath_ray.stores.collector import Collector, CollectorSettings, NoIndex
from dualpath_ray.stores.inventory import Entry, Inventory
from dualpath_ray.stores.open import open_inventory

DAMAGED, BUSY = 1, 3
READERS = 4


@click.group()
def command() -> None:
    """Look into the block store, check it, make room in it."""


as_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


@command.command()
@as_json_option
@click.option("--limit", type=click.IntRange(min=0), default=40, show_default=True, help="Blocks shown, latest used first; 0: all.")
@with_settings
def ls(settings: Settings, as_json: bool, limit: int) -> None:
    """List the blocks, of all models."""
    inventory = open_inventory(settings.storage)
    entries = sorted(_listed(inventory), key=lambda entry: -entry.used_at)
    shown = entries[: limit or None]
    if as_json:
        rows = [{**asdict(entry), "key": entry.key.hex(), "parent": entry.parent.hex(), "first": is_root(entry.parent)} for entry in shown]
        click.echo(json.dumps({"place": inventory.name, "blocks": len(entries), "bytes": total_bytes(entries), "shown": rows}))
        return
    table = Table("key", "parent", "size", "last used", "model", box=None)
    for entry in shown:
        parent = "(first)" if is_root(entry.parent) else entry.parent.hex()[:12]
        table.add_row(entry.key.hex(), parent, decimal(entry.nbytes), f"{_age(entry)} ago", entry.model)
    console = Console()
    console.print(table)
    console.print(f"{len(shown)} of {len(entries)} blocks, {decimal(total_bytes(entries))} in all, in {inventory.name}")


@command.command()
@as_json_option
@with_settings
def stats(settings: Settings, as_json: bool) -> None:
    """Say how full the store is, and of what."""
    inventory = open_inventory(settings.storage)
    entries = list(_listed(inventory))
    by_model: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_model[entry.model].append(entry)
    capacity, usage = settings.storage.capacity_bytes, inventory.usage()
    document: dict[str, Any] = {
        "place": inventory.name,
        "blocks": len(entries),
        "bytes": total_bytes(entries),
        "capacity_bytes": capacity,
        "damaged": inventory.damaged,
        "collected_at": usage.at if usage is not None else None,
        "models": {model: _model_stats(part) for model, part in sorted(by_model.items())},
    }
    if as_json:
        click.echo(json.dumps(document))
        return
    table = Table("model", "blocks", "size", "first blocks", "chain ends", "orphans", "last used", box=None)
    for model, row in document["models"].items():
        numbers = [str(row[name]) for name in ("first_blocks", "leaves", "orphans")]
        table.add_row(model, str(row["blocks"]), decimal(row["bytes"]), *numbers, f"{_span(time.time() - row['used_at'])} ago")
    bound = "no bound" if capacity is None else f"{document['bytes'] / capacity:.0%} of {decimal(capacity)}"
    console = Console()
    console.print(table)
    console.print(f"{inventory.name}: {len(entries)} blocks, {decimal(document['bytes'])} ({bound}), {inventory.damaged} damaged")


def _model_stats(entries: Sequence[Entry]) -> dict[str, Any]:
    parents = Counter(entry.parent for entry in entries)
    return {
        "blocks": len(entries),
        "bytes": total_bytes(entries),
        "first_blocks": sum(is_root(entry.parent) for entry in entries),
        "leaves": sum(entry.key not in parents for entry in entries),
        "orphans": sum(unrooted(entries)),
        "used_at": max(entry.used_at for entry in entries),
    }


@command.command()
@as_json_option
@click.option("--repair", is_flag=True, help="Take damaged blocks out of service (a directory keeps some of them in quarantine/).")
@with_settings
def verify(settings: Settings, as_json: bool, repair: bool) -> None:
    """Read every block and compare it with its checksums."""
    inventory = open_inventory(settings.storage)
    entries = list(_listed(inventory))
    damaged: list[tuple[Entry, str]] = []
    start = time.monotonic()

    def check(entry: Entry) -> tuple[Entry, str]:
        try:
            verify_whole(inventory.content(entry), entry.key, entry.parent)
        except BlockCorruptError as error:
            return entry, str(error)
        except BlockMissingError:
            pass  # removed since it was listed
        return entry, ""

    with _progress() as progress, ThreadPoolExecutor(READERS) as pool:
        task = progress.add_task("verifying", total=total_bytes(entries))
        for entry, problem in pool.map(check, entries):
            progress.advance(task, entry.nbytes)
            if problem:
                damaged.append((entry, problem))
                if repair:
                    inventory.put_aside(entry)
    count = len(damaged) + inventory.damaged
    problems = [problem for _, problem in damaged]
    if inventory.damaged:
        problems.append(f"{inventory.damaged} entries under a block's name have no sound header")
    if as_json:
        document = {"place": inventory.name, "blocks": len(entries), "bytes": total_bytes(entries), "damaged": count, "problems": problems}
        click.echo(json.dumps({**document, "repaired": len(damaged) if repair else 0, "seconds": time.monotonic() - start}))
    else:
        for problem in problems:
            click.echo(problem)
        aside = f", {len(damaged)} put aside" if repair and damaged else ""
        click.echo(f"{inventory.name}: {len(entries)} blocks, {decimal(total_bytes(entries))} read, {count} damaged{aside}")
    if count:
        sys.exit(DAMAGED)


@command.command()
@as_json_option
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@with_settings
def gc(settings: Settings, as_json: bool, dry_run: bool) -> None:
    """Make room down to storage.capacity_bytes, and sweep orphans and leftovers.

    A running cluster does this by itself. What this command removes, it is not told of: it finds missing blocks, and computes them.
    """
    storage = settings.storage
    inventory = open_inventory(storage)
    options = CollectorSettings(storage.capacity_bytes, storage.orphan_age_s, grace_s=0.0)
    with Console(stderr=True).status(f"collecting in {inventory.name}"):
        done = Collector(inventory, options, NoIndex()).collect(dry_run)
    if as_json:
        click.echo(json.dumps({"place": inventory.name, "dry_run": dry_run, **asdict(done)}))
    elif done.skipped:
        click.echo(f"{inventory.name}: {done.skipped}")
    else:
        verb = "would be removed" if dry_run else "removed"
        click.echo(
            f"{inventory.name}: {done.blocks} blocks, {decimal(done.nbytes)}; {verb}: {done.evicted_blocks} blocks "
            f"({done.orphan_blocks} of them orphans), {decimal(done.evicted_bytes)}; {done.swept_files} leftovers swept"
        )
    if done.skipped:
        sys.exit(BUSY)


def _listed(inventory: Inventory) -> Iterator[Entry]:
    """The entries, with a line on a terminal that counts them."""
    with Console(stderr=True).status(f"listing {inventory.name}") as status:
        for number, entry in enumerate(inventory.entries(), 1):
            if number % 1000 == 0:
                status.update(f"listing {inventory.name}: {number} blocks")
            yield entry


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _age(entry: Entry) -> str:
    return _span(time.time() - entry.used_at)


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
