"""Whom chunks are asked of. What a source says is checked by whoever asks; only a manifest is checked here, by its root.

held     {root}                  whole, or one bit per chunk of those that are there, in the body
manifest {root}                  the chunk hashes behind a state root
chunks   {root, first, count}    chunks `first` and following, at least one; or `busy_ms`, for how long to stay away
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from swarm_protocol.calls import Bytes
from swarm_protocol.chunks import StateManifest
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.download.partial import Flags
from swarm_protocol.download.picking import MAX_CALLS, MAX_RUN
from swarm_protocol.errors import HashMismatchError, InvalidDataError, UnreachableError
from swarm_protocol.identity import peer_id
from swarm_protocol.peers import PeerPlane

ASK_S = 10.0
CHUNKS_S = 60.0
MAX_BUSY_MS = 30_000


class Source(Protocol):
    """Somebody who has chunks. All methods raise `UnreachableError`, `RefusedError`, `InvalidDataError`.

    `key` tells sources apart. A `reserve` is asked for what others do not have, or bring too slowly.
    """

    key: bytes
    name: str
    reserve: bool
    max_calls: int
    max_run: int

    async def manifest(self, root: bytes, size_bytes: int) -> StateManifest:
        """The manifest of the state with this root, which has this size."""

    async def held(self, manifest: StateManifest) -> Flags | None:
        """Which chunks it has; None for all."""

    async def chunks(self, manifest: StateManifest, first: int, count: int) -> Bytes:
        """Chunks from `first` on, one after another: at least one whole chunk, at most `count`, not verified."""


class PeerSource:
    """A peer, over the peer plane."""

    max_calls = MAX_CALLS
    max_run = MAX_RUN

    def __init__(self, plane: PeerPlane, key: bytes, *, reserve: bool = False) -> None:
        self.key = key
        self.reserve = reserve
        self.name = peer_id(key)
        self._plane = plane

    async def manifest(self, root: bytes, size_bytes: int) -> StateManifest:
        bound = StateManifest.encoded_bytes(size_bytes)
        _, raw = await self._plane.call(
            self.key, {"op": "manifest", "root": root}, max_answer_bytes=bound, timeout_s=ASK_S
        )
        return checked_manifest(bytes(raw), root, size_bytes)

    async def held(self, manifest: StateManifest) -> Flags | None:
        bound = -(-len(manifest.hashes) // 8)
        answer, raw = await self._plane.call(
            self.key, {"op": "held", "root": manifest.root}, max_answer_bytes=bound, timeout_s=ASK_S
        )
        if answer.get("whole") is True:
            return None
        if len(raw) != bound:
            raise InvalidDataError(f"{len(raw)} bytes say which of {len(manifest.hashes)} chunks are there")
        return np.unpackbits(np.frombuffer(raw, np.uint8), count=len(manifest.hashes)).astype(np.bool_)

    async def chunks(self, manifest: StateManifest, first: int, count: int) -> Bytes:
        bound = sum(manifest.chunk_size(index) for index in range(first, first + count))
        answer, data = await self._plane.call(
            self.key, {"op": "chunks", "root": manifest.root, "first": first, "count": count},
            max_answer_bytes=bound, timeout_s=CHUNKS_S,
        )  # fmt: skip
        match answer.get("busy_ms"):
            case None:
                return data
            case int(pause_ms) if 0 < pause_ms <= MAX_BUSY_MS:
                raise UnreachableError(f"{self.name} is busy", retry_after_s=pause_ms / 1000)
            case _:
                raise InvalidDataError("a peer that is busy says for how many milliseconds")


class CoordinatorSource:
    """The run's coordinator, over HTTP: the last one to ask."""

    key = b"coordinator"
    name = "the coordinator"
    reserve = True
    max_calls = MAX_CALLS
    max_run = 1

    def __init__(self, client: CoordinatorClient) -> None:
        self._client = client

    async def manifest(self, root: bytes, size_bytes: int) -> StateManifest:
        manifest = await self._client.state_manifest(root)
        return checked_manifest(manifest.encode(), root, size_bytes)

    async def held(self, manifest: StateManifest) -> Flags | None:
        return None

    async def chunks(self, manifest: StateManifest, first: int, count: int) -> Bytes:
        return await self._client.chunk(manifest.hashes[first])


def checked_manifest(raw: bytes, root: bytes, size_bytes: int) -> StateManifest:
    """Decode a manifest of a state of known root and size.

    Raises:
        InvalidDataError: it is that of another state.
    """
    manifest = StateManifest.decode(raw, max_size_bytes=size_bytes)
    if manifest.size_bytes != size_bytes:
        raise HashMismatchError(f"a checkpoint of this run has {size_bytes} bytes, not {manifest.size_bytes}")
    if manifest.root != root:
        raise HashMismatchError("the manifest of another checkpoint than the one asked for")
    return manifest
