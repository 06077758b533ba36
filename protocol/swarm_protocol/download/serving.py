"""Serving chunks of the states that are here, whole or under way, to peers who download them.

Bytes go out of the mapped file as they lie; a thread hashes them just before, so that a damaged disk makes nobody a liar.
Only verified chunks leave. `sources` has the calls.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from swarm_protocol.calls import Answer, Call, Handler
from swarm_protocol.chunks import CHUNK_BYTES, StateManifest, manifest_of
from swarm_protocol.download.partial import Flags, mapped
from swarm_protocol.download.picking import MAX_RUN
from swarm_protocol.errors import HashMismatchError, RefusedError

log = logging.getLogger(__name__)

BUSY_S = 4.0
"""Whoever would wait longer than this for our upload limit is sent away for a while."""

MAX_BUSY_S = 30.0


class Held(Protocol):
    """A state that is here, or some of it."""

    manifest: StateManifest

    @property
    def have(self) -> Flags:
        """Which chunks are there."""

    def view(self, first: int, count: int) -> bytes | memoryview:
        """Chunks that are there: at least the first of them. Blocking; may raise `OSError`."""


class StateFile:
    """A whole state in a file, mapped, so that it can be served even when the file is deleted."""

    def __init__(self, data: memoryview, manifest: StateManifest) -> None:
        self.data = data
        self.manifest = manifest
        self.have = np.ones(len(manifest.hashes), np.bool_)

    @classmethod
    def open(cls, path: Path, manifest: StateManifest | None = None) -> StateFile:
        """Map a file; without its manifest, which is believed, the file is hashed.

        Raises:
            OSError: it cannot be opened, or is not of the manifest's size.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = mapped(descriptor)
        finally:
            os.close(descriptor)
        manifest = manifest_of(data) if manifest is None else manifest
        if len(data) != manifest.size_bytes:
            raise OSError(f"{path} has {len(data)} bytes, not {manifest.size_bytes}")
        return cls(data, manifest)

    def view(self, first: int, count: int) -> memoryview:
        return self.data[first * CHUNK_BYTES : (first + count) * CHUNK_BYTES]


class ChunkDesk:
    """Answers the calls of those who download. `find` says what is here under a root; `backlog_s`, how long answers wait."""

    def __init__(self, find: Callable[[bytes], Held | None], backlog_s: Callable[[], float] = lambda: 0.0) -> None:
        self._find = find
        self._backlog_s = backlog_s

    @property
    def handlers(self) -> dict[str, Handler]:
        return {"held": self._held, "manifest": self._manifest, "chunks": self._chunks}

    async def _held(self, call: Call) -> Answer:
        have = (await self._state(call)).have
        return Answer({"whole": True}) if have.all() else Answer({"whole": False}, np.packbits(have).tobytes())

    async def _manifest(self, call: Call) -> Answer:
        return Answer(body=(await self._state(call)).manifest.encode())

    async def _chunks(self, call: Call) -> Answer:
        state = await self._state(call)
        first, count = int(call.header["first"]), int(call.header["count"])
        if not (0 <= first < len(state.have) and count > 0):
            raise RefusedError("there are no such chunks")
        backlog_s = self._backlog_s()
        if backlog_s > BUSY_S:
            return Answer({"busy_ms": int(1000 * min(backlog_s, MAX_BUSY_S))})
        wanted = state.have[first : first + min(count, MAX_RUN)]
        there = len(wanted) if wanted.all() else int(np.argmin(wanted))
        if not there:
            raise RefusedError("this chunk is not here yet")
        try:
            return Answer(body=await asyncio.to_thread(_verified, state, first, there), urgent=False)
        except (OSError, HashMismatchError) as error:
            log.warning("chunk %d of a checkpoint cannot be served: %s", first, error)
            raise RefusedError("this chunk is no longer here") from error

    async def _state(self, call: Call) -> Held:
        root = call.header["root"]
        state = await asyncio.to_thread(self._find, root) if isinstance(root, bytes) else None
        if state is None:
            raise RefusedError("no such state is here")
        return state


def _verified(state: Held, first: int, count: int) -> bytes | memoryview:
    """The chunks, each hashed. Raises `OSError`, `HashMismatchError`."""
    found = memoryview(state.view(first, count))
    for start in range(0, len(found), CHUNK_BYTES):
        state.manifest.verify_chunk(first + start // CHUNK_BYTES, found[start : start + CHUNK_BYTES])
    return found
