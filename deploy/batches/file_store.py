"""Uploaded files, and the results that batches leave."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from deploy.batches.documents import Documents, new_id
from deploy.openai_api.errors import ApiError

PURPOSE = "batch"


class FileStore:
    """Contents are `ID.data` beside their documents, which are OpenAI's file objects."""

    def __init__(self, root: Path) -> None:
        self._documents = Documents(root, "files")

    def begin(self, tenant: str) -> tuple[str, Path]:
        """A new file's id, and where to write its content before `add` or `result` makes it known."""
        name = new_id("file")
        return name, self._documents.made_directory(tenant) / f"{name}.data"

    def content_path(self, tenant: str, name: str) -> Path:
        return self._documents.directory(tenant) / f"{name}.data"

    def add(self, tenant: str, name: str, filename: str, purpose: str = PURPOSE) -> dict[str, Any]:
        """Make a file known whose content is complete."""
        document = {
            "id": name,
            "object": "file",
            "bytes": self.content_path(tenant, name).stat().st_size,
            "created_at": int(time.time()),
            "filename": filename[:255],
            "purpose": purpose,
            "status": "processed",
        }
        self._documents.put(tenant, name, document)
        return document

    def get(self, tenant: str, name: str) -> dict[str, Any]:
        """Raises ApiError (404)."""
        document = self._documents.get(tenant, name)
        if document is None:
            raise ApiError(404, f"there is no file {name[:60]!r}", param="file_id", code="file_not_found")
        return document

    def of_tenant(self, tenant: str) -> list[dict[str, Any]]:
        return self._documents.of_tenant(tenant)

    def remove(self, tenant: str, name: str) -> None:
        """Raises ApiError (404)."""
        self.get(tenant, name)
        self._documents.remove(tenant, name)
        self.content_path(tenant, name).unlink(missing_ok=True)
