"""`dualpath top`: a running service in a terminal, from what it says at /status."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import click
import httpx
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dualpath_ray.commands.options import positive
from dualpath_ray.errors import DualPathError

TIMEOUT_S = 5.0
LONGEST_BAR, SHORTEST_BAR = 14, 3
ROWS = 12
SILENT_S = 3.0
ONE, TWO = "blue", "dark_orange"


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Address of the service.")
@click.option("--key", envvar="DUALPATH_API_KEY", default="", help="API key, if the service asks for one (or DUALPATH_API_KEY).")
@click.option(
    "--interval", type=click.FloatRange(0.2), callback=positive, default=1.0, show_default=True, help="Seconds between two looks."
)
@click.option("--count", type=click.IntRange(1), help="Stop after this many looks and leave the last one on the screen.")
def command(url: str, key: str, interval: float, count: int | None) -> None:
    """Show a running service: nodes, both paths, requests and events."""
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    try:
        client = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S)
    except httpx.InvalidURL as error:
        raise DualPathError(f"{url} is no address ({error}); give the address of a running service by --url") from error
    with client as http:
        view = View(fetch(http))  # before the screen is cleared: a wrong address is one line
        with Live(view.render(), console=Console(), screen=count is None, auto_refresh=False) as live:
            looks = 1
            try:
                while count is None or looks < count:
                    time.sleep(interval)
                    view.update(fetch(http))
                    live.update(view.render(), refresh=True)
                    looks += 1
            except KeyboardInterrupt:
                return


def fetch(http: httpx.Client) -> dict[str, Any]:
    """The service's status. Raises DualPathError: one line that says what to change."""
    try:
        answer = http.get("/status")
    except httpx.HTTPError as error:
        advice = "give the address of a running service by --url"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            advice = "name the file of its certificate authority in SSL_CERT_FILE"
        raise DualPathError(f"{http.base_url} does not answer ({error}); {advice}") from error
    if answer.status_code in (401, 403):
        raise DualPathError(f"{http.base_url} asks for an API key: give it by --key or DUALPATH_API_KEY")
    status: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        found = answer.json()
        status = found if isinstance(found, dict) else {}
    if "processes" not in status:
        raise DualPathError(
            f"{http.base_url} has no status to show (HTTP {answer.status_code}): {status.get('reason', 'is it this service?')}"
        )
    return status


@dataclass(slots=True)
class _Moved:
    """Bytes and tokens per second."""

    one: float = 0.0
    two: float = 0.0
    hits: float = 0.0
    new: float = 0.0
    tokens: float = 0.0


class View:
    """The last status, and rates against the one before."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        self._now, self._before = status, status

    def update(self, status: Mapping[str, Any]) -> None:
        self._before, self._now = self._now, status

    def rate(self, name: str, figure: str) -> float:
        """Growth per second of a process's counter; 0 for one that has been restarted."""
        seconds = self._now["time"] - self._before["time"]
        now, before = self._now["processes"][name], self._before["processes"].get(name)
        if before is None or before["agent"] != now["agent"] or seconds <= 0:
            return 0.0
        growth: float = now["figures"].get(figure, 0.0) - before["figures"].get(figure, 0.0)
        return max(0.0, growth) / float(seconds)

    def render(self) -> RenderableType:
        return Group(self._head(), "", self._nodes(), "", self._requests(), "", self._events())

    def _role_of(self, node: str) -> str:
        roles = (process["role"] for process in self._now["processes"].values() if process["node"] == node)
        return next((role for role in roles if role != "gateway"), "")

    def _moved(self) -> _Moved:
        moved = _Moved()
        for name, process in self._now["processes"].items():
            if process["role"] == "gateway":
                read, hits = self.rate(name, "read_bytes"), self.rate(name, "hit_layer_bytes")
                if self._role_of(process["node"]) == "decode":
                    moved.two, moved.hits = moved.two + read, moved.hits + hits
                else:
                    moved.one += read
            moved.new += self.rate(name, "new_layer_bytes")
            moved.tokens += self.rate(name, "generated_tokens")
        return moved

    def _head(self) -> Text:
        status, moved = self._now, self._moved()
        text = Text()
        text.append(f"{status['model']}   ", style="bold")
        text.append(f"{status['running']} running, {status['queued']} queued   {moved.tokens:.0f} tokens/s   ")
        text.append(f"path 1 {size(moved.one)}/s   ", style=ONE)
        text.append(f"path 2 {size(moved.two)}/s", style=TWO)
        text.append(f"   new KV {size(moved.new)}/s   {status['index_blocks']} blocks stored", style="dim")
        return text

    def _nodes(self) -> Table:
        table = _table(
            "node",
            "role",
            "read",
            "storage NIC",
            "staging",
            "to read",
            "engines",
            "requests",
            right=("read", "to read", "requests"),
            narrow=("storage NIC", "staging", "engines"),
        )
        processes = self._now["processes"]
        gateways = sorted((p["node"], name, p) for name, p in processes.items() if p["role"] == "gateway")
        for node, name, gateway in sorted(gateways, key=lambda row: (self._role_of(row[0]) != "prefill", row[0])):
            role = self._role_of(node)
            load = gateway["load"]
            engines = [(n, p) for n, p in processes.items() if p["node"] == node and p["role"] != "gateway"]
            used = 1 - load["free_slots"] / load["total_slots"] if load else 0.0
            colour = TWO if role == "decode" else ONE
            silent = max(p["report_age_s"] for p in (gateway, *(p for _, p in engines))) > SILENT_S
            table.add_row(
                Text(node, style="bold red" if silent else "bold"),
                f"{role}{' (draining)' if gateway['draining'] else ''}",
                Text(f"{size(self.rate(name, 'read_bytes'))}/s", style=colour),
                Bar(self.rate(name, "read_busy_s"), colour),
                Bar(used, "white"),
                size(load.get("read_queue_bytes", 0)),
                Bar(_busy(self, role, engines), colour),
                str(sum(p["load"].get("unfinished_requests", 0) for _, p in engines)),
            )
        return table

    def _requests(self) -> RenderableType:
        requests = self._now["requests"][:ROWS]
        if not requests:
            return Text("no requests in progress", style="dim")
        table = _table(
            "request", "phase", "prompt", "cached", "decode engine", "for", right=("prompt", "cached", "for"), narrow=("request",)
        )
        for request in requests:
            cached = f"{100 * request['hit_tokens'] / max(1, request['prompt_tokens']):.0f} %"
            table.add_row(
                Text(request["id"], no_wrap=True, overflow="ellipsis"),
                request["phase"],
                str(request["prompt_tokens"]),
                cached,
                request.get("decode_engine", "-"),
                f"{request['age_s']:.1f} s",
            )
        return table

    def _events(self) -> Text:
        text = Text()
        for event in self._now["events"][-8:][::-1]:
            at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
            fault = event["kind"] in ("died", "hung", "lost", "corrupt")
            text.append(f"{at}  ", style="dim").append(f"{event['who']} {event['kind']}", style="bold red" if fault else "bold")
            text.append(f"  {event['text']}\n", style="dim")
        return text


def _busy(view: View, role: str, engines: list[tuple[str, Any]]) -> float:
    """Share of time the node's prefill engines computed, or of the decode engines' KV pools that is taken."""
    if role != "decode":
        return sum(view.rate(name, "busy_s") for name, _ in engines) / max(1, len(engines))
    capacity = sum(p["load"].get("hbm_capacity_tokens", 0) for _, p in engines)
    return 1 - sum(p["load"].get("free_hbm_tokens", 0) for _, p in engines) / capacity if capacity else 0.0


def _table(*columns: str, right: Iterable[str] = (), narrow: Iterable[str] = ()) -> Table:
    """`narrow`: columns that give way in a terminal that is too narrow for all."""
    table = Table(box=None, pad_edge=False, header_style="dim", expand=False)
    for column in columns:
        # Rich takes room from columns that may wrap before it takes any from the others.
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column not in narrow)
    return table


@dataclass(frozen=True, slots=True)
class Bar:
    """A share from 0 to 1 as a bar, as long as there is room, with its number."""

    share: float
    colour: str

    @property
    def _number(self) -> str:
        return f" {100 * self.share:3.0f} %"

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(SHORTEST_BAR + len(self._number), LONGEST_BAR + len(self._number)).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        length = max(0, min(LONGEST_BAR, options.max_width - len(self._number)))
        filled = round(length * min(1.0, max(0.0, self.share)))
        bar = Text("━" * filled, style=self.colour, no_wrap=True)
        yield bar.append("━" * (length - filled), style="grey30").append(self._number, style="dim")


def size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if nbytes >= 100 or unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
