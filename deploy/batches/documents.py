"""Small JSON documents in a directory of their tenant, replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_ID = re.compile(r"[a-z]+-[0-9a-f]{24}")


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


class Documents:
    """`root/KIND/TENANT/ID.json`. Tenants' names become digests: they may hold what no file name can."""

    def __init__(self, root: Path, kind: str) -> None:
        self._root = root / kind

    def directory(self, tenant: str) -> Path:
        """Where a tenant's documents are, and whatever belongs to them. Asking for it does not make it."""
        return self._root / hashlib.blake2b(tenant.encode(), digest_size=12).hexdigest()

    def made_directory(self, tenant: str) -> Path:
        path = self.directory(tenant)
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path

    def put(self, tenant: str, name: str, document: Mapping[str, Any]) -> None:
        """Readers see the old or the new document, also after a power loss."""
        directory = self.made_directory(tenant)
        handle, scratch = tempfile.mkstemp(dir=directory, prefix=".")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, directory / f"{name}.json")

    def get(self, tenant: str, name: str) -> dict[str, Any] | None:
        """None for a name that is none of this tenant's."""
        if not _ID.fullmatch(name):
            return None
        return _read(self.directory(tenant) / f"{name}.json")

    def of_tenant(self, tenant: str) -> list[dict[str, Any]]:
        """Newest first."""
        documents = [document for path in self.directory(tenant).glob("*-*.json") if (document := _read(path)) is not None]
        return sorted(documents, key=lambda document: (document["created_at"], document["id"]), reverse=True)

    def everyones(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self._root.glob("*/*-*.json")):
            document = _read(path)
            if document is not None:
                yield document

    def remove(self, tenant: str, name: str) -> None:
        (self.directory(tenant) / f"{name}.json").unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return document
