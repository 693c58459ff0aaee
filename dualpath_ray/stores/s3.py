"""A block store in an S3 bucket (SeaweedFS, MinIO, AWS, ...): one object per Full Block, read by ranges of layers.

    <prefix>/<digest of fingerprint and geometry>/<key, hex>/<parent, hex>

A block below two ranges' size is one GET, streamed into its buffer and verified layer by layer on the way; of a larger one the header
comes with the first layers, and ranges of layers follow.

The object is the block file of block_format.py without its padding. The name says all that a listing must tell, so a scan reads no
object; other models' blocks lie under other digests. A PUT is atomic, and durable when it has been answered. It never replaces an
object (If-None-Match): a block that is computed twice, in other batches, differs in its last bits, and a reader that has checked the
header of one version must not be given the data of another. The client (obstore, the Rust
`object_store` crate) keeps its connections, bounds each request in time and repeats what failed in passing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from dualpath_ray.errors import BlockCorruptError, BlockMissingError, ConfigError, DualPathError, OverloadedError, StoreError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.keys import KEY_BYTES
from dualpath_ray.stores.base import BlockBuffer, BlockReader, Bytes, StoredBlock
from dualpath_ray.stores.block_format import BlockFormat, BlockHeader
from dualpath_ray.stores.bucket_inventory import BucketInventory
from dualpath_ray.stores.budget import Budget
from dualpath_ray.stores.counters import Counters
from dualpath_ray.stores.ordered_work import OrderedWork
from dualpath_ray.stores.s3_reader import S3Reader

log = logging.getLogger(__name__)

COUNTERS = (
    "read_bytes", "read_seconds", "written_bytes", "write_seconds", "written_blocks", "existing_blocks", "failed_writes", "missing_blocks",
    "corrupt_blocks", "read_errors", "foreign_files", "removed_blocks", "refused_writes", "unnoted_uses",
)  # fmt: skip

RANGE_BYTES = 8 << 20  # no block is cut into ranges smaller than that: each costs the service and the client a request
CHUNK_BYTES = 256 << 10  # bytes are copied into the slot, and verified, this many at a time while the rest is still arriving
PREFIX_BYTES = 1 << 20  # what comes with the header: a request for a few more bytes costs nothing, a request of its own does

# Order of work: headers are small and gate everything, so they overtake data; were they to wait for the data of earlier requests, the
# link would idle at each change of request. Data goes request by request; that of a block without ranges comes with its header, and the
# requests' headers take turns in the order in which they were opened.
HEADERS_FIRST = 0
MAX_USES = 100_000  # that wait to be written down


@dataclass(frozen=True, slots=True)
class S3Settings:
    """`endpoint` is a URL (`http://host:8333`), or empty for AWS. Without `anonymous`, credentials are those of the environment.

    `read_threads` and `write_threads` are requests under way at once, the queue bounds count requests. A write waits for reads up to
    `write_yield_s`. `capacity_bytes` bounds what lies below the prefix; uses are written down every `use_interval_s`.
    """

    bucket: str
    endpoint: str = ""
    prefix: str = "blocks"
    region: str = "us-east-1"
    anonymous: bool = False
    layer_groups: int = 4
    read_threads: int = 8
    write_threads: int = 2
    request_timeout_s: float = 30.0
    max_queued_reads: int = 65_536
    max_queued_writes: int = 4_096
    write_yield_s: float = 0.02
    capacity_bytes: int | None = None
    use_interval_s: float = 60.0


class S3Store:
    """A BlockStore. Futures it returns cannot be cancelled. Raises ConfigError when the client is missing or the settings are wrong.

    `bucket` is an obstore store to use instead of the one that the settings name.
    """

    def __init__(self, geometry: KVGeometry, fingerprint: str, settings: S3Settings, bucket: Any = None) -> None:
        self.settings = settings
        self.format = BlockFormat(geometry, fingerprint)
        self.counters = Counters(*COUNTERS)
        digest = hashlib.blake2b(fingerprint.encode() + b"\0" + geometry.signature(), digest_size=8).hexdigest()
        self._folder = f"{settings.prefix}/{digest}" if settings.prefix else digest
        self._client = load_client()
        self._exists: type[Exception] = self._client.exceptions.AlreadyExistsError
        self._bucket = bucket or connect(settings)
        few = min(geometry.layers, PREFIX_BYTES // geometry.layer_block_bytes)
        self.prefix_layers = geometry.layers if self.layer_groups() == 1 else few
        self.reading = OrderedWork(settings.read_threads, settings.max_queued_reads, "s3-read")
        self._writing = OrderedWork(settings.write_threads, settings.max_queued_writes, "s3-write")
        self._turns = itertools.count(HEADERS_FIRST + 1)
        self.budget = Budget(settings.capacity_bytes)
        self._uses: set[bytes] = set()
        self._uses_lock = threading.Lock()
        self._uses_noted = time.monotonic()

    def register(self, arena: Bytes) -> None:
        """Nothing to do: bytes arrive in the client's memory and are copied."""

    def layer_groups(self) -> int:
        """One for blocks below two ranges: such a block is one GET, which opening it begins and ends."""
        return max(1, min(self.settings.layer_groups, self.format.geometry.layers, self.format.payload_bytes // RANGE_BYTES))

    def scan(self) -> Iterator[StoredBlock]:
        try:
            for page in self._client.list(self._bucket, prefix=f"{self._folder}/"):
                for entry in page:
                    block = self._parse(entry["path"], entry["size"])
                    if block is None:
                        self.counters.add("foreign_files")
                    else:
                        yield block
        except Exception as error:
            raise self._store_error("listing blocks", error) from error

    def _parse(self, path: str, size: int) -> StoredBlock | None:
        try:
            key, parent = (bytes.fromhex(name) for name in path.split("/")[-2:])
            block = StoredBlock(key, parent, self.format.payload_bytes)
        except ValueError:
            return None
        whole = len(block.key) == len(block.parent) == KEY_BYTES and size == self._object_bytes
        return block if whole else None

    @property
    def _object_bytes(self) -> int:
        return self.format.header_bytes + self.format.payload_bytes

    def _path(self, key: bytes, parent: bytes) -> str:
        return f"{self._folder}/{key.hex()}/{parent.hex()}"

    # ---- reading

    def open(self, blocks: Sequence[BlockBuffer]) -> Future[BlockReader]:
        future: Future[BlockReader] = Future()
        future.set_running_or_notify_cancel()
        turn = next(self._turns)
        headers: list[BlockHeader | None] = [None] * len(blocks)
        failures: list[DualPathError] = []
        lock = threading.Lock()
        left = len(blocks)

        def fetch(index: int) -> None:
            nonlocal left
            failure: DualPathError | None = None
            try:
                if not failures:
                    headers[index] = self._header(blocks[index])
            except DualPathError as error:
                failure = error
            except Exception as error:  # or nobody would ever hear of this read again
                failure = self._store_error(f"reading block {blocks[index].key.hex()}", error)
            with lock:
                if failure is not None:
                    failures.append(failure)
                left -= 1
                last = not left
            if last and failures:
                future.set_exception(failures[0])
            elif last:
                self.touch([block.key for block in blocks])
                future.set_result(S3Reader(self, turn, blocks, [header for header in headers if header is not None]))

        if not blocks:
            future.set_result(S3Reader(self, turn, (), ()))
            return future
        try:
            self.reading.submit(HEADERS_FIRST, [lambda i=i: fetch(i) for i in range(len(blocks))])  # type: ignore[misc]
        except (OverloadedError, StoreError) as error:
            future.set_exception(error)
        return future

    def _header(self, block: BlockBuffer) -> BlockHeader:
        """The header, checked, and the first layers that come with it, verified in the block's buffer."""
        size = self.format.header_bytes
        chunks = self._fetch(block, 0, size + self.prefix_layers * self.format.geometry.layer_block_bytes)
        with self.counters.busy("read_seconds"), self._guard(block):
            page, rest = _split(chunks, size)
            header = self.format.check(page, self.format.file_bytes, block.key, block.parent)
            self._land(itertools.chain([rest], chunks), block, header, 0, self.prefix_layers)
        return header

    def read_layers(self, block: BlockBuffer, header: BlockHeader, first: int, stop: int) -> None:
        """Layers `[first, stop)` of a block into its buffer, verified. Raises BlockError or StoreError."""
        size, start = self.format.geometry.layer_block_bytes, self.format.header_bytes
        with self.counters.busy("read_seconds"), self._guard(block):
            self._land(self._fetch(block, start + first * size, start + stop * size), block, header, first, stop)

    def _land(self, chunks: Iterable[Bytes], block: BlockBuffer, header: BlockHeader, first: int, stop: int) -> None:
        """Bytes of layers `[first, stop)`, as they arrive; each layer is verified as soon as it is whole, while the cache still has it."""
        size = self.format.geometry.layer_block_bytes
        at, verified = first * size, first
        for chunk in chunks:
            block.data[at : at + len(chunk)] = chunk
            at += len(chunk)
            self.format.verify(header, block.data, verified, at // size)
            verified = at // size
        self.counters.add("read_bytes", (stop - first) * size)

    def _fetch(self, block: BlockBuffer, start: int, stop: int) -> Iterator[Bytes]:
        """Bytes `[start, stop)` of a block's object, in order, as they arrive. Raises BlockError or StoreError."""
        left = stop - start
        try:
            found = self._client.get(self._bucket, self._path(block.key, block.parent), options={"range": (start, stop)})
            for chunk in found.stream(min_chunk_size=CHUNK_BYTES):
                view = np.frombuffer(chunk, dtype=np.uint8)
                left -= len(view)
                if left < 0:
                    break
                yield view
        except FileNotFoundError:
            self.counters.add("missing_blocks")
            raise BlockMissingError(block.key, f"block {block.key.hex()} is not in bucket {self.settings.bucket} (any more)") from None
        except Exception as error:
            if self._ends_before(block, stop):  # services answer with an error to a range that begins behind the end
                problem = f"block {block.key.hex()}: truncated: the object ends before byte {stop}"
                raise BlockCorruptError(block.key, problem) from error
            self.counters.add("read_errors")
            raise self._store_error(f"reading block {block.key.hex()}", error) from error
        if left:
            problem = f"block {block.key.hex()}: truncated: {stop - start - left} bytes where {stop - start} are expected"
            raise BlockCorruptError(block.key, problem)

    def _ends_before(self, block: BlockBuffer, stop: int) -> bool:
        try:
            return bool(self._client.head(self._bucket, self._path(block.key, block.parent))["size"] < stop)
        except Exception:
            return False

    @contextlib.contextmanager
    def _guard(self, block: BlockBuffer) -> Iterator[None]:
        """A block that is found damaged inside is counted and removed, so that it can be written anew."""
        try:
            yield
        except BlockCorruptError as error:
            self._remove_corrupt(block, error)
            raise

    def _remove_corrupt(self, block: BlockBuffer, error: BlockCorruptError) -> None:
        self.counters.add("corrupt_blocks")
        log.warning("%s; it is removed", error)
        try:
            self._client.delete(self._bucket, self._path(block.key, block.parent))
            self.counters.add("removed_blocks")
        except Exception as failure:
            log.warning("block %s cannot be removed: %s", block.key.hex(), failure)

    # ---- writing

    def write(self, blocks: Sequence[BlockBuffer]) -> Future[list[Exception | None]]:
        future: Future[list[Exception | None]] = Future()
        future.set_running_or_notify_cancel()
        outcomes: list[Exception | None] = [None] * len(blocks)
        lock = threading.Lock()
        left = len(blocks)

        def put(index: int) -> None:
            nonlocal left
            try:
                with self.counters.busy("write_seconds"):
                    self._put(blocks[index])
            except Exception as error:
                self.counters.add("failed_writes")
                self.budget.give_back(self._object_bytes)
                outcomes[index] = error
            with lock:
                left -= 1
                last = not left
            if last:
                future.set_result(outcomes)

        if not blocks:
            future.set_result([])
            return future
        if not self.budget.take(len(blocks) * self._object_bytes):
            self.counters.add("refused_writes", len(blocks))
            future.set_exception(StoreError(f"{self.where} holds all of storage.capacity_bytes; older blocks are being removed"))
            return future
        try:
            self._writing.submit(0, [lambda i=i: put(i) for i in range(len(blocks))])  # type: ignore[misc]
        except (OverloadedError, StoreError) as error:
            self.budget.give_back(len(blocks) * self._object_bytes)
            future.set_exception(error)
        return future

    def _put(self, block: BlockBuffer) -> None:
        self.reading.wait_idle(self.settings.write_yield_s)
        header = self.format.encode(block.key, block.parent, self.format.checksums(block.data))
        try:
            path, body = self._path(block.key, block.parent), header + block.data.tobytes()
            self._client.put(self._bucket, path, body, mode="create", use_multipart=False)
        except self._exists:
            self.counters.add("existing_blocks")
            self.budget.give_back(self._object_bytes)
            self.touch([block.key])
            return
        except Exception as error:
            raise self._store_error(f"writing block {block.key.hex()}", error) from error
        self.counters.add("written_blocks")
        self.counters.add("written_bytes", self.format.payload_bytes)

    # ---- the rest

    def touch(self, keys: Sequence[bytes]) -> None:
        """Uses are collected, and written down by the writing threads from time to time."""
        with self._uses_lock:
            room = MAX_USES - len(self._uses)
            self._uses.update(keys[:room])
            self.counters.add("unnoted_uses", max(0, len(keys) - room))
            due = time.monotonic() - self._uses_noted > self.settings.use_interval_s
            if due:
                self._uses_noted = time.monotonic()
        if due:
            with contextlib.suppress(OverloadedError, StoreError):
                self._writing.submit(1, [self._note_uses])

    def _note_uses(self) -> None:
        with self._uses_lock:
            keys, self._uses = list(self._uses), set()
        if not keys:
            return
        try:
            self.inventory().note_uses(keys)
        except StoreError as error:
            self.counters.add("unnoted_uses", len(keys))
            log.warning("%s", error)

    def wait_idle(self, timeout_s: float) -> bool:
        return self.reading.wait_idle(timeout_s)

    def inventory(self) -> BucketInventory:
        return BucketInventory(self._client, self._bucket, self.settings.prefix, self.where)

    @property
    def where(self) -> str:
        return f"bucket {self.settings.bucket} at {self.settings.endpoint or 'AWS'}"

    def remove(self, key: bytes) -> None:
        try:
            for page in self._client.list(self._bucket, prefix=f"{self._folder}/{key.hex()}/"):
                for entry in page:
                    self._client.delete(self._bucket, entry["path"])
                    self.counters.add("removed_blocks")
                    self.budget.give_back(self._object_bytes)
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._store_error(f"removing block {key.hex()}", error) from error

    def stats(self) -> dict[str, float]:
        values = self.counters.snapshot()
        values["queued_reads"], values["queued_writes"] = float(self.reading.queued), float(self._writing.queued)
        return values

    def close(self) -> None:
        self.reading.close()
        self._writing.close()
        self._note_uses()

    def _store_error(self, action: str, error: Exception) -> StoreError:
        lines = str(error).splitlines() or [type(error).__name__]
        return StoreError(f"{action} failed: {self.where}: {lines[0][:300]}")


def _split(chunks: Iterator[Bytes], size: int) -> tuple[bytes, Bytes]:
    """The first `size` bytes, and what came after them in the same chunk."""
    head, rest = b"", np.empty(0, dtype=np.uint8)
    for chunk in chunks:
        missing = size - len(head)
        head, rest = head + chunk[:missing].tobytes(), chunk[missing:]
        if len(head) == size:
            break
    return head, rest


def load_client() -> Any:
    try:
        import obstore
    except ImportError:
        raise ConfigError("storage.kind s3 needs the package obstore: pip install 'dualpath-ray[s3]'") from None
    return obstore


def connect(settings: S3Settings) -> Any:
    """The bucket; nothing is sent yet."""
    from obstore.store import S3Store as Bucket

    config: Any = {"region": settings.region, "virtual_hosted_style_request": False, "skip_signature": settings.anonymous}
    if settings.endpoint:
        config["endpoint"] = settings.endpoint
    try:
        return Bucket(
            settings.bucket,
            config=config,
            client_options={
                "allow_http": settings.endpoint.startswith("http://"),
                "timeout": timedelta(seconds=settings.request_timeout_s),
                "connect_timeout": timedelta(seconds=min(5.0, settings.request_timeout_s)),
            },
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=settings.request_timeout_s)},
        )
    except Exception as error:
        raise ConfigError(f"storage.s3 is not usable: {str(error).splitlines()[0]}") from error
