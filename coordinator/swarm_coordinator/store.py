"""Content-addressed blobs of a run: checkpoint chunks, data shards, results of rounds; and manifests of checkpoints.

In a folder, or in a bucket of S3 or what speaks like it. A blob is the object `chunks/<hash>`; in a folder this is also one
that `swarm_protocol.data.Dataset` maps. Objects are whole or not there; several processes may write at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

from swarm_protocol.chunks import Buffer, StateManifest, chunks, content_hash, manifest_of
from swarm_protocol.errors import ConfigurationError, HashMismatchError


class Store:
    """Thread-safe. `folder` is that of a local store, which is made on first use; None for a bucket."""

    def __init__(self, where: Path | str) -> None:
        """Open a store: a folder, `file:///PATH`, or `s3://BUCKET/PREFIX`, with the usual AWS_* variables.

        Raises:
            ConfigurationError: it cannot be opened.
        """
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
        return {root for root in roots if self._size_bytes(_checkpoint_path(root)) is not None}

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
