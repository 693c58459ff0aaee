"""Figures of a run."""

from __future__ import annotations

from collections import Counter, defaultdict
from statistics import median
from typing import Any

from load_tests.faults.job import Answer


def figures(answer: Answer) -> dict[str, Any]:
    """What `--json` prints. `recovery_s_max` is None if the rate did not come back after some round."""
    recoveries = [outcome["recovery_s"] for outcome in answer.outcomes]
    known = sorted(seconds for seconds in recoveries if seconds is not None)
    restarts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for outcome in answer.outcomes:
        if outcome["restart_s"] is not None:
            restarts[outcome["kind"]].append((outcome["restart_s"], outcome["own_s"] or 0.0))
    stats = answer.stats
    return {
        "faults": len(answer.outcomes),
        "requests": stats["requests"],
        "wrong_texts": stats["wrong_texts"],
        "leaks": len(answer.leaks),
        "hung_requests": stats["hung_requests"],
        "recovery_s_max": known[-1] if known and len(known) == len(recoveries) else None,
        "recovery_s_p50": known[len(known) // 2] if known else None,
        "recovery_s_p95": known[int(len(known) * 0.95)] if known else None,
        "recovered_within_5_s": sum(seconds <= 5.0 for seconds in known) / len(recoveries) if recoveries else None,
        "not_recovered": len(recoveries) - len(known),
        "answered": stats["answered"],
        "refused": stats["refused"],
        "unclear_errors": stats["unclear"] + len(answer.http.get("unclear", ())),
        "vanished_clients": stats["vanished"],
        "attempts": stats["attempts"],
        "slowest_answer_s": stats["slowest_s"],
        "calm_tokens_per_s": answer.calm_rate,
        "seconds": answer.seconds,
        "rests": answer.rests,
        "rss_growth_bytes": answer.rss_growth,
        "fd_growth": answer.fd_growth,
        "by_kind": dict(Counter(outcome["kind"] for outcome in answer.outcomes)),
        "by_phase": dict(Counter(outcome["phase"] for outcome in answer.outcomes if outcome["phase"] and outcome["aimed"])),
        "phase_not_met": sum(bool(outcome["phase"]) and not outcome["aimed"] for outcome in answer.outcomes),
        "restart_s": {
            kind: {"p50": median(total for total, _ in times), "own_p50": median(own for _, own in times), "max": max(t for t, _ in times)}
            for kind, times in restarts.items()
        },
        "leaked": answer.leaks,
        "trouble": answer.trouble,
        "unexplained_restarts": answer.unexplained,
        "errors": stats["errors"],
        "http": answer.http,
        "outcomes": answer.outcomes,
    }


def sound(answer: Answer) -> bool:
    """Whether everything that must hold did."""
    shown = figures(answer)
    return not (shown["wrong_texts"] or shown["leaks"] or shown["hung_requests"] or shown["unclear_errors"] or answer.trouble)
