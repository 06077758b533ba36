"""Content-addressed blobs of a run: checkpoint chunks, data shards, results of rounds; and manifests of checkpoints.

A blob is a file `chunks/<hash>`, so that its folder is also one that `swarm_protocol.data.Dataset` maps. Files are whole or
not there; several processes may write at once.
"""

from __future__ import annotations

from pathlib import Path

import obstore
from obstore.store import LocalStore

from swarm_protocol.chunks import Buffer, StateManifest, chunks, content_hash, manifest_of
from swarm_protocol.errors import ConfigurationError, HashMismatchError


class Store:
    """Thread-safe. Its folder is made on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chunks_folder = folder / "chunks"
        try:
            self.chunks_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"the object store {folder} cannot be made: {error.strerror}") from error
        self._store = LocalStore(str(folder))

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
        try:
            return int(obstore.head(self._store, _chunk_path(digest))["size"])
        except FileNotFoundError:
            return None

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

    def _get(self, path: str) -> bytes | None:
        try:
            return bytes(obstore.get(self._store, path).bytes())
        except FileNotFoundError:
            return None


def _chunk_path(digest: bytes) -> str:
    return f"chunks/{digest.hex()}"


def _checkpoint_path(root: bytes) -> str:
    return f"checkpoints/{root.hex()}"
