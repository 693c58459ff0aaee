"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Check:
    """`remedy` is for warnings and failures: what to change. `node` is empty for the machine that the doctor runs on."""

    name: str
    status: Status
    text: str
    remedy: str = ""
    node: str = ""


def ok(name: str, text: str) -> Check:
    return Check(name, "ok", text)


def warning(name: str, text: str, remedy: str) -> Check:
    return Check(name, "warning", text, remedy)


def failed(name: str, text: str, remedy: str) -> Check:
    return Check(name, "failed", text, remedy)


def skipped(name: str, text: str) -> Check:
    return Check(name, "skipped", text)
