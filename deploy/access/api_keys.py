"""API keys: the file that lists them, and the check of one.

A key is `dp-ID-SECRET`. The file holds the SHA-256 of each secret; secrets are 256 random bits, which no one guesses, so a slow
password hash would add nothing but load. Whoever reads the file cannot call the API.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dualpath_ray.errors import ConfigError

logger = logging.getLogger(__name__)

Word = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")]
_NOBODY = hashlib.sha256(b"").hexdigest()


class ApiKey(BaseModel):
    """One key, without its secret, and what its owner may do. Limits are of the tenant, and count in each HTTP replica for its share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: Word = Field(description="Whose key it is. Tenants share no cached prompts.")
    salt: Word = Field(description="Part of the tenant's block keys, so that nobody else can name its blocks.")
    requests_per_minute: float | None = Field(default=None, gt=0)
    concurrency: int | None = Field(default=None, ge=1)
    priority: int = Field(default=0, ge=-100, le=100, description="Highest priority of its requests, and the usual one.")
    disabled: bool = False


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[ApiKey] = []


class ApiKeys:
    """The keys of a file, read again when it changes, so that keys are added and revoked while the service runs."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file cannot be used now. Later a broken file leaves the last good keys in force."""
        self._path = path
        self._stamp = (0, 0)
        self._keys: dict[str, ApiKey] = {}
        self._load()

    def find(self, presented: str) -> ApiKey | None:
        """The key, or None. Takes the same time for an unknown id as for a wrong secret."""
        self._reload_if_changed()
        prefix, _, rest = presented.partition("-")
        name, _, secret = rest.partition("-")
        key = self._keys.get(name)
        matches = hmac.compare_digest(_hash(secret), key.sha256 if key else _NOBODY)
        return key if key is not None and matches and prefix == "dp" else None

    def _reload_if_changed(self) -> None:
        try:
            if _stamp(self._path) != self._stamp:
                self._load()
        except (OSError, ConfigError) as error:
            logger.error("API keys stay as they were: %s", error)

    def _load(self) -> None:
        try:
            stamp = _stamp(self._path)
        except OSError as error:
            raise ConfigError(f"serving.api_keys {self._path} cannot be read: {error.strerror}") from error
        self._stamp = stamp  # also of a file that turns out broken: it is complained about once
        self._keys = {key.id: key for key in read_keys(self._path)}


def read_keys(path: Path) -> list[ApiKey]:
    """Raises ConfigError."""
    try:
        return _KeyFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise ConfigError(f"API keys {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path} is no file of API keys (dualpath keys create makes one): {where and f'{where}: '}{first['msg']}"
        ) from error


def write_keys(path: Path, keys: list[ApiKey]) -> None:
    """Replace the file at once, readable by its owner only. Raises ConfigError."""
    text = json.dumps({"keys": [key.model_dump(exclude_defaults=True) for key in keys]}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # of mode 0600
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        raise ConfigError(f"API keys {path} cannot be written: {error.strerror}") from error


def new_key(
    tenant: str, *, salt: str = "", requests_per_minute: float | None = None, concurrency: int | None = None, priority: int = 0
) -> tuple[str, ApiKey]:
    """(what its owner presents and nobody keeps, what the file keeps). Raises ConfigError for unusable values."""
    name, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    try:
        key = ApiKey(
            id=name,
            sha256=_hash(secret),
            tenant=tenant,
            salt=salt or secrets.token_hex(8),
            requests_per_minute=requests_per_minute,
            concurrency=concurrency,
            priority=priority,
        )
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return f"dp-{name}-{secret}", key


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_ino
