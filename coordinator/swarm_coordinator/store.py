"""Content-addressed blobs of a run: checkpoint chunks, data shards, results of rounds; and manifests of checkpoints.

In a folder, or in a bucket of S3 or what speaks like it. A blob is the object `chunks/<hash>`; in a folder this is also one
that `swarm_protocol.data.Dataset` maps. Objects are whole or not there; several processes may write at once. The object
`run` says whose store it is: what several runs share is deleted by none of them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

from swarm_protocol.chunks import Buffer, StateManifest, chunks, content_hash, manifest_of
from swarm_protocol.errors import ConfigurationError, HashMismatchError

DELETED_AT_ONCE = 256
SHARED = b"several"


@dataclass(frozen=True)
class Found:
    """An object that a listing has: its size, and when it was written, in Unix seconds."""

    size_bytes: int
    written_s: float


class Store:
    """Thread-safe. `folder` is that of a local store, which is made on first use; None for a bucket."""

    def __init__(self, where: Path | str) -> None:
        """Open a store: a folder, `file:///PATH`, or `s3://BUCKET/PREFIX`, with the usual AWS_* variables.

        Raises:
            ConfigurationError: it cannot be opened.
        """
        self._put_lock = threading.Lock()
        self._put: set[bytes] = set()
        url = where if isinstance(where, str) else where.absolute().as_uri()
        parts = urlsplit(url)
        self.folder: Path | None = None
        self._store: LocalStore | S3Store
        if parts.scheme == "file":
            self.folder = Path(unquote(parts.path))
            try:
                (self.folder / "chunks").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigurationError(f"the object store {self.folder} cannot be made: {error.strerror}") from error
            self._store = LocalStore(str(self.folder))
        elif parts.scheme == "s3":
            self._store = _bucket(url)
        else:
            raise ConfigurationError(f"{url} is neither file:///PATH nor s3://BUCKET/PREFIX")

    def put(self, digest: bytes, data: bytes) -> None:
        """Store a blob under its hash; one that is there already, whole, stays.

        Raises:
            HashMismatchError: the bytes do not have this hash.
        """
        if content_hash(data) != digest:
            raise HashMismatchError(f"a blob that does not hash to {digest.hex()} is not stored under that name")
        with self._put_lock:
            self._put.add(digest)
        if self.size_bytes(digest) != len(data):
            obstore.put(self._store, _chunk_path(digest), data)

    def get(self, digest: bytes) -> bytes | None:
        """The whole blob, or None if it is not there."""
        return self._get(_chunk_path(digest))

    def get_range(self, digest: bytes, start: int, end: int) -> bytes | None:
        """Bytes [start, end) of a blob, 0 <= start < end <= its size; None if it is not there."""
        try:
            return bytes(obstore.get_range(self._store, _chunk_path(digest), start=start, end=end))
        except FileNotFoundError:
            return None

    def exists(self, digest: bytes) -> bool:
        return self.size_bytes(digest) is not None

    def size_bytes(self, digest: bytes) -> int | None:
        """The size of a blob, or None if it is not there."""
        return self._size_bytes(_chunk_path(digest))

    def put_state(self, *buffers: Buffer) -> StateManifest:
        """Store a checkpoint: its chunks first, then its manifest, so that a manifest promises its chunks."""
        manifest = manifest_of(*buffers)
        for digest, chunk in zip(manifest.hashes, chunks(*buffers), strict=True):
            self.put(digest, chunk)
        self.put_checkpoint(manifest)
        return manifest

    def put_checkpoint(self, manifest: StateManifest) -> None:
        """Store a checkpoint's manifest under its root."""
        obstore.put(self._store, _checkpoint_path(manifest.root), manifest.encode())

    def get_checkpoint(self, root: bytes) -> bytes | None:
        """The encoded `StateManifest` of a checkpoint, or None if it is not there."""
        return self._get(_checkpoint_path(root))

    def whole(self, roots: Iterable[bytes]) -> set[bytes]:
        """Which of these checkpoints have their manifest here."""
        return set(roots) & set(self.states())

    # What there is, and what goes

    def claim(self, run: bytes) -> bool:
        """Say that this store is of this run; False if it is of another one too, which is noted for ever."""
        owner = self._get("run")
        if owner is None:
            obstore.put(self._store, "run", run.hex().encode())
        elif owner not in (run.hex().encode(), SHARED):
            obstore.put(self._store, "run", SHARED)
        return owner in (None, run.hex().encode())

    def blobs(self) -> dict[bytes, Found]:
        """Every blob, by its hash; from now on `delete_blobs` spares what is put."""
        with self._put_lock:
            self._put.clear()
        return self.listed()

    def listed(self) -> dict[bytes, Found]:
        """Every blob, by its hash."""
        return dict(self._list("chunks"))

    def states(self) -> dict[bytes, Found]:
        """The manifests of checkpoints, by their root."""
        return dict(self._list("checkpoints"))

    def delete_states(self, roots: Iterable[bytes]) -> None:
        """Delete manifests of checkpoints; their chunks stay."""
        self._delete([_checkpoint_path(root) for root in roots])

    def delete_blobs(self, digests: Iterable[bytes]) -> int:
        """Delete blobs, but for those that this process has put since `blobs` was asked; how many."""
        deleted, names = 0, list(digests)
        for start in range(0, len(names), DELETED_AT_ONCE):
            with self._put_lock:  # whoever puts one of these waits, and then finds it gone
                some = [digest for digest in names[start : start + DELETED_AT_ONCE] if digest not in self._put]
                self._delete([_chunk_path(digest) for digest in some])
            deleted += len(some)
        return deleted

    def discard(self, digest: bytes) -> None:
        """Delete a blob that is not what its name says."""
        self._delete([_chunk_path(digest)])

    def _list(self, prefix: str) -> Iterator[tuple[bytes, Found]]:
        for page in obstore.list(self._store, prefix):
            for one in page:
                name = one["path"].rpartition("/")[2]
                with contextlib.suppress(ValueError):
                    if len(name) == 64:
                        yield bytes.fromhex(name), Found(int(one["size"]), one["last_modified"].timestamp())

    def _delete(self, paths: Sequence[str]) -> None:
        if self.folder is None and paths:
            obstore.delete(self._store, list(paths))
            return
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, path)

    def _size_bytes(self, path: str) -> int | None:
        try:
            return int(obstore.head(self._store, path)["size"])
        except FileNotFoundError:
            return None

    def _get(self, path: str) -> bytes | None:
        try:
            return bytes(obstore.get(self._store, path).bytes())
        except FileNotFoundError:
            return None


def _chunk_path(digest: bytes) -> str:
    return f"chunks/{digest.hex()}"


def _checkpoint_path(root: bytes) -> str:
    return f"checkpoints/{root.hex()}"


def _bucket(url: str) -> S3Store:
    """Amazon's, or another's that AWS_ENDPOINT_URL names; http only where that says so."""
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    try:
        store = S3Store.from_url(url, client_options={"allow_http": plain, "timeout": "60s", "connect_timeout": "10s"})
        obstore.list_with_delimiter(store)
    except (BaseError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"the bucket {url} cannot be opened: {first:.300}. Set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and "
            "AWS_ENDPOINT_URL where it is not Amazon's"
        ) from error
    return store
