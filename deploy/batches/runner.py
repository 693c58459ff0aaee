"""Works batch orders off, oldest first, one at a time with many requests each."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy.batches.batch_store import BatchStore
from deploy.batches.file_store import FileStore
from deploy.openai_api.batch import BatchLine, LineDone, bounded_lines, parse_line, run_batch
from deploy.openai_api.caller import Caller
from deploy.openai_api.errors import ApiError
from deploy.openai_api.finished_lines import FinishedLines
from deploy.openai_api.service import OpenAIService

logger = logging.getLogger(__name__)

POLL_S = 1.0
MOST_ERRORS = 100  # told of an input that is no batch
# Batches wait for whoever waits for an answer.
PRIORITY_BELOW = 10


class BatchRunner:
    """One per service. Started again after a crash, it goes on where the result files end."""

    def __init__(self, service: OpenAIService, root: Path, concurrency: int, max_line_bytes: int) -> None:
        self._service, self._concurrency, self._max_line_bytes = service, concurrency, max_line_bytes
        self._files, self._batches = FileStore(root), BatchStore(root)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            worked = False
            for batch in await asyncio.to_thread(self._batches.unfinished):
                worked = True
                try:
                    await self._work(batch)
                except asyncio.CancelledError:
                    raise
                except Exception as error:
                    logger.exception("batch %s failed", batch["id"])
                    self._end(
                        batch, "failed", errors=[{"code": "internal_error", "message": str(error)[:200], "line": None, "param": None}]
                    )
            if not worked:
                await asyncio.sleep(POLL_S)

    async def _work(self, batch: dict[str, Any]) -> None:
        tenant = batch["_caller"]["tenant"]
        source = self._files.content_path(tenant, batch["input_file_id"])
        if batch["status"] == "validating" and not await self._validate(batch, source):
            return
        output, errors = (self._files.content_path(tenant, batch["_files"][kind]) for kind in ("output", "errors"))
        finished = FinishedLines()
        await asyncio.to_thread(finished.add_results, [output, errors])
        counts = batch["request_counts"]
        counts["failed"] = await asyncio.to_thread(_lines_of, errors)
        counts["completed"] = len(finished) - counts["failed"]
        told = time.monotonic()

        def on_done(line: LineDone) -> None:
            nonlocal told
            if not line.skipped:
                counts["failed" if line.failed else "completed"] += 1
            if time.monotonic() - told > POLL_S:
                told = time.monotonic()
                self._batches.put(batch)

        priority = batch["_caller"]["priority"]
        caller = Caller(batch["id"], tenant, salt=batch["_caller"]["salt"], session=batch["id"], highest_priority=priority - PRIORITY_BELOW)
        with source.open("rb") as lines, output.open("a", buffering=1) as good, errors.open("a", buffering=1) as bad:
            job = asyncio.ensure_future(
                run_batch(
                    self._service,
                    bounded_lines(lines, self._max_line_bytes),
                    good,
                    concurrency=self._concurrency,
                    caller=caller,
                    errors=bad,
                    finished=finished,
                    on_done=on_done,
                )
            )
            status = await self._watch(batch, job)
        for kind, path in (("output", output), ("errors", errors)):
            if path.stat().st_size:
                self._files.add(tenant, batch["_files"][kind], f"{batch['id']}_{kind}.jsonl", "batch_output")
                batch["output_file_id" if kind == "output" else "error_file_id"] = batch["_files"][kind]
            else:
                path.unlink()
        self._end(batch, status)

    async def _watch(self, batch: dict[str, Any], job: asyncio.Future[None]) -> str:
        """Let the job run unless it is to stop. How the batch has ended."""
        try:
            while not job.done():
                await asyncio.wait([job], timeout=POLL_S)
                if not job.done() and (self._batches.is_cancelled(batch) or time.time() > batch["expires_at"]):
                    job.cancel()
                    with suppress(asyncio.CancelledError):
                        await job
                    return "cancelled" if self._batches.is_cancelled(batch) else "expired"
            await job
            return "completed"
        finally:
            if not job.done():
                job.cancel()
                await asyncio.gather(job, return_exceptions=True)

    async def _validate(self, batch: dict[str, Any], source: Path) -> bool:
        if self._batches.is_cancelled(batch):
            self._end(batch, "cancelled")
            return False
        total, errors = await asyncio.to_thread(self._check, source, batch["endpoint"])
        batch["request_counts"]["total"] = total
        if errors:
            self._end(batch, "failed", errors=errors)
            return False
        tenant = batch["_caller"]["tenant"]
        batch["_files"] = {kind: self._files.begin(tenant)[0] for kind in ("output", "errors")}
        batch |= {"status": "in_progress", "in_progress_at": int(time.time())}
        self._batches.put(batch)
        return True

    def _check(self, source: Path, endpoint: str) -> tuple[int, list[dict[str, Any]]]:
        """The number of requests, and what is wrong with the file, if anything."""
        errors: list[dict[str, Any]] = []
        names = FinishedLines()
        total = 0
        try:
            for number, line in self._numbered(source):
                total += 1
                try:
                    self._check_line(parse_line(line), endpoint, names)
                except ApiError as error:
                    errors.append({"code": error.code, "message": str(error), "line": number, "param": error.param})
                    if len(errors) == MOST_ERRORS:
                        break
        except OSError as error:
            errors.append(
                {"code": "file_not_found", "message": f"the input file cannot be read: {error.strerror}", "line": None, "param": None}
            )
        if not total and not errors:
            errors.append({"code": "empty_file", "message": "the input file has no requests", "line": None, "param": None})
        return total, errors

    def _numbered(self, source: Path) -> Iterator[tuple[int, bytes]]:
        with source.open("rb") as file:
            for number, line in enumerate(bounded_lines(file, self._max_line_bytes), start=1):
                if line.strip():
                    yield number, line

    def _check_line(self, request: BatchLine, endpoint: str, names: FinishedLines) -> None:
        if request.url != endpoint:
            raise ApiError(400, f"url is {request.url}, but the batch's endpoint is {endpoint}", param="url", code="mismatched_endpoint")
        if not names.add(request.custom_id):
            raise ApiError(400, "another line has this custom_id", param="custom_id", code="duplicate_custom_id")

    def _end(self, batch: dict[str, Any], status: str, errors: list[dict[str, Any]] | None = None) -> None:
        batch |= {"status": status, f"{status}_at": int(time.time())}
        if errors:
            batch["errors"] = {"object": "list", "data": errors}
        self._batches.put(batch)
        logger.info("batch %s: %s, %s", batch["id"], status, batch["request_counts"])


def _lines_of(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)
