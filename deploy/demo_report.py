"""What the demo measures, and how it is shown: a live table for people, one JSON document for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


@dataclass(slots=True)
class Turn:
    """One turn. Times in seconds. `ttft_recompute_s` is the same prompt's time to first token with nothing cached."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    read_bytes: dict[str, int] = field(default_factory=lambda: {"prefill_node": 0, "decode_node": 0})
    ttft_s: float = 0.0
    ttft_recompute_s: float | None = None
    tpot_s: float = 0.0
    identical_to_reference: bool | None = None
    text: str = ""
    after_restart: bool = False


@dataclass(slots=True)
class Report:
    """All turns, and what was left behind.

    `object_store_created_bytes` is everything that Ray put into its object store during the turns; `object_store_bytes` is how much KV that
    could have been, in units of one token's KV in one layer, the smallest piece of KV there is.
    """

    model: str
    turns: list[Turn] = field(default_factory=list)
    leaked_slots: int = 0
    object_store_bytes: int = 0
    object_store_created_bytes: int = 0
    elapsed_s: float = 0.0

    @property
    def hit_ratio(self) -> float:
        """Cached over prompt tokens, all turns together."""
        prompt = sum(turn.prompt_tokens for turn in self.turns)
        return sum(turn.cached_tokens for turn in self.turns) / prompt if prompt else 0.0

    @property
    def identical_to_reference(self) -> bool:
        return all(turn.identical_to_reference for turn in self.turns)

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"hit_ratio": self.hit_ratio, "identical_to_reference": self.identical_to_reference}


class LiveView:
    """The table as far as it goes, the status line and the text of the current turn."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.status = ""
        self.text = ""

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [table(self.report)]
        if self.text:
            parts.append(Panel(Text(self.text[-400:]), title="the model says", title_align="left", border_style="dim"))
        if self.status:
            parts.append(Text(self.status, style="cyan"))
        return Group(*parts)


def table(report: Report) -> Table:
    out = Table(title=f"DualPath demo: an agent's turns on {report.model}", title_justify="left")
    for column in (
        "turn",
        "prompt",
        "hit",
        "computed",
        "read by\nprefill node",
        "read by\ndecode node",
        "TTFT",
        "TTFT\nrecompute",
        "faster",
        "same\ntext",
    ):
        out.add_column(column, justify="right")
    for number, turn in enumerate(report.turns, 1):
        name = f"{number}{' *' if turn.after_restart else ''}"
        if not turn.prompt_tokens:  # under way
            out.add_row(name, "...")
            continue
        recompute = turn.ttft_recompute_s
        out.add_row(
            name,
            str(turn.prompt_tokens),
            str(turn.cached_tokens),
            str(turn.computed_tokens),
            _megabytes(turn.read_bytes.get("prefill_node", 0)),
            _megabytes(turn.read_bytes.get("decode_node", 0)),
            f"{turn.ttft_s:.2f} s",
            "" if recompute is None else f"{recompute:.2f} s",
            "" if recompute is None else f"{recompute / turn.ttft_s:.1f}x",
            {None: "", True: "yes", False: "NO"}[turn.identical_to_reference],
        )
    return out


def summary(report: Report, console: Console) -> None:
    console.print(table(report))
    console.print("[dim]* all engines were restarted before this turn: its hits can only come from storage[/dim]")
    console.print(
        f"hit ratio {report.hit_ratio:.1%}   text {'identical to' if report.identical_to_reference else 'DIFFERS from'} the reference   "
        f"leaked slots {report.leaked_slots}   KV through the object store {report.object_store_bytes} B   {report.elapsed_s:.0f} s"
    )


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes else "-"
