"""The package's few exception types. Each message says what the operator or the user can change.

`retryable` tells a caller whether the same request may succeed later or elsewhere: the HTTP layer turns
retryable errors into 429/503/504 and the others into 4xx; the cluster client re-plans retryable ones.
"""

from __future__ import annotations


class DualPathError(Exception):
    """Base of every error this package raises on purpose."""

    retryable = False


class ConfigError(DualPathError):
    """A setting is wrong; the message names the field and what it may be."""


class InvalidRequestError(DualPathError):
    """The request can never succeed as it is (prompt too long, bad parameter, ...)."""


class OverloadedError(DualPathError):
    """A bounded queue is full; the same request may succeed later."""

    retryable = True


class DeadlineExceededError(DualPathError):
    """A wait outlasted its deadline; the work was given up and its resources are being freed."""

    retryable = True


class CancelledError(DualPathError):
    """The client withdrew the request."""


class TransferError(DualPathError):
    """A NIXL transfer failed or its peer died."""

    retryable = True


class UnansweredError(TransferError):
    """A call to another process got no answer: whether it was, is being or will be carried out is unknown.

    `process` is the name of the actor that was called, for whoever looks after it.
    """

    def __init__(self, message: str, process: str = "") -> None:
        super().__init__(message)
        self.process = process

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.process)


class StaleEpochError(DualPathError):
    """A message names a lease or an assignment that is no longer the current one; it is dropped."""

    retryable = True


class StoreError(DualPathError):
    """The block store failed as a device (permission, full disk, I/O error, time-out)."""

    retryable = True


class BlockError(StoreError):
    """One block cannot be served; treat it and its descendants as misses. `key` names the block."""

    def __init__(self, key: bytes, message: str) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple[type, tuple[bytes, str]]:
        return type(self), (self.key, str(self))


class BlockMissingError(BlockError):
    """The index named a block that the store does not hold (any more)."""


class BlockCorruptError(BlockError):
    """A block's header or checksum does not fit its content, or it belongs to another model or layout."""
