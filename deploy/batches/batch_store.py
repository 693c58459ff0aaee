"""Batch orders and how far they are, as OpenAI's batch objects."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from deploy.batches.documents import Documents, new_id
from deploy.openai_api.errors import ApiError

FINAL = ("completed", "failed", "cancelled", "expired")
WINDOW_S = 24 * 3600


class BatchRequest(BaseModel):
    """Body of /v1/batches."""

    model_config = ConfigDict(strict=True)

    input_file_id: str = Field(max_length=64, description="An uploaded file with one request per line.")
    endpoint: str = Field(description="/v1/chat/completions, /v1/completions or /v1/rollouts; that of every line.")
    completion_window: str = Field(pattern="^24h$", description="24h; lines not done by then are left out.")
    metadata: dict[str, str] | None = Field(default=None, max_length=16, description="Returned as it is.")


class BatchStore:
    """HTTP replicas create orders and ask for their cancellation; everything else is written by the runner alone."""

    def __init__(self, root: Path) -> None:
        self._documents = Documents(root, "batches")

    def create(self, tenant: str, request: BatchRequest, caller: dict[str, Any]) -> dict[str, Any]:
        """`caller` is kept for the runner and not shown."""
        now = int(time.time())
        batch: dict[str, Any] = {
            "id": new_id("batch"),
            "object": "batch",
            "endpoint": request.endpoint,
            "input_file_id": request.input_file_id,
            "completion_window": request.completion_window,
            "status": "validating",
            "created_at": now,
            "expires_at": now + WINDOW_S,
            "metadata": request.metadata,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "_caller": {"tenant": tenant, **caller},
        }
        self._documents.put(tenant, batch["id"], batch)
        return self._shown(tenant, batch)

    def get(self, tenant: str, name: str) -> dict[str, Any]:
        """Raises ApiError (404)."""
        batch = self._documents.get(tenant, name)
        if batch is None:
            raise ApiError(404, f"there is no batch {name[:60]!r}", param="batch_id", code="batch_not_found")
        return self._shown(tenant, batch)

    def of_tenant(self, tenant: str) -> list[dict[str, Any]]:
        return [self._shown(tenant, batch) for batch in self._documents.of_tenant(tenant)]

    def cancel(self, tenant: str, name: str) -> dict[str, Any]:
        """Ask the runner to stop. Raises ApiError: 404, or 409 for a batch that has ended."""
        batch = self.get(tenant, name)
        if batch["status"] in FINAL:
            raise ApiError(409, f"the batch is {batch['status']} already", code="batch_ended")
        self._mark(tenant, name).touch()
        return self.get(tenant, name)

    # ---- for the runner

    def unfinished(self) -> list[dict[str, Any]]:
        """Whole documents, oldest first."""
        batches = [batch for batch in self._documents.everyones() if batch["status"] not in FINAL]
        return sorted(batches, key=lambda batch: batch["created_at"])

    def put(self, batch: dict[str, Any]) -> None:
        self._documents.put(batch["_caller"]["tenant"], batch["id"], batch)

    def is_cancelled(self, batch: dict[str, Any]) -> bool:
        return self._mark(batch["_caller"]["tenant"], batch["id"]).exists()

    def _mark(self, tenant: str, name: str) -> Path:
        return self._documents.directory(tenant) / f"{name}.cancel"

    def _shown(self, tenant: str, batch: dict[str, Any]) -> dict[str, Any]:
        shown = {name: value for name, value in batch.items() if not name.startswith("_")}
        if shown["status"] not in FINAL and self._mark(tenant, batch["id"]).exists():
            shown["status"] = "cancelling"
        return shown
