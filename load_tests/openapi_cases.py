"""Requests that schemathesis makes up from our own OpenAPI document."""

from __future__ import annotations

from typing import Any

import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings


def check_document(api: FastAPI, cases: int) -> int:
    """Send up to `cases` cases for each operation; returns the number of operations. Raises AssertionError for a status of 500 or above."""
    schema: Any = schemathesis.openapi.from_asgi("/openapi.json", api)
    count = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        count += 1

        @settings(max_examples=cases, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            reply = case.call()
            assert reply.status_code < 500, f"{case.method} {case.path} {case.body!r}: {reply.status_code} {reply.text[:300]}"

        check()
    return count
