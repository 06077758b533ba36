"""Sources that lie, die and dawdle, in memory."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from swarm_protocol.chunks import CHUNK_BYTES, StateManifest, manifest_of
from swarm_protocol.download import picking
from swarm_protocol.errors import RefusedError, UnreachableError

_numbers = itertools.count(1)


class Twin:
    """A source in memory. `asked` is what it was asked for, in order; `failing` may raise before it answers."""

    def __init__(
        self,
        data: bytes,
        *,
        name: str = "",
        reserve: bool = False,
        has: Iterable[int] | None = None,
        corrupt: Iterable[int] = (),
        takes_s: float = 0.0,
        fails: Callable[[int], Exception | None] = lambda _: None,
        manifest: StateManifest | None = None,
        max_run: int = picking.MAX_RUN,
    ) -> None:
        self.key = next(_numbers).to_bytes(32, "big")
        self.name = name or f"twin {self.key[-1]}"
        self.reserve = reserve
        self.max_calls = picking.MAX_CALLS
        self.max_run = max_run
        self.asked: list[int] = []
        self._news = asyncio.Event()
        self.at_once = self.most_at_once = 0
        self.has = None if has is None else set(has)
        self._data = data
        self._corrupt = set(corrupt)
        self._takes_s = takes_s
        self._fails = fails
        self._manifest = manifest_of(data) if manifest is None else manifest

    async def manifest(self, root: bytes, size_bytes: int) -> StateManifest:
        from swarm_protocol.download.sources import checked_manifest

        await self._fail()
        return checked_manifest(self._manifest.encode(), root, size_bytes)

    async def held(self, manifest: StateManifest) -> picking.Flags | None:
        await self._fail()
        if self.has is None:
            return None
        flags = np.zeros(len(manifest.hashes), np.bool_)
        flags[sorted(self.has)] = True
        return flags

    async def chunks(self, manifest: StateManifest, first: int, count: int) -> bytes:
        self.asked.extend(range(first, first + count))
        self._news.set()
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self._fail()
            await asyncio.sleep(self._takes_s)
        finally:
            self.at_once -= 1
        pieces = []
        for index in range(first, first + count):
            if self.has is not None and index not in self.has:
                break
            piece = self._data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            pieces.append(bytes([piece[0] ^ 1]) + piece[1:] if index in self._corrupt else piece)
        if not pieces:
            raise RefusedError("not here")
        return b"".join(pieces)

    async def bring(self, chunks: set[int]) -> None:
        """Until it was asked for all of these."""
        while not chunks <= set(self.asked):
            self._news.clear()
            await self._news.wait()

    async def _fail(self) -> None:
        error = self._fails(len(self.asked))
        if isinstance(error, TimeoutError):
            await asyncio.Event().wait()
        if error is not None:
            raise error


def dead(after: int) -> Callable[[int], Exception | None]:
    """A source that answers for so many chunks, and then no more."""
    return lambda asked: UnreachableError("gone") if asked > after else None


def frozen(after: int) -> Callable[[int], Exception | None]:
    """A source that takes calls after so many chunks, and says nothing."""
    return lambda asked: TimeoutError() if asked > after else None


@pytest.fixture(scope="session")
def state() -> bytes:
    """Ten chunks and a half of noise."""
    return np.random.default_rng(3).bytes(10 * CHUNK_BYTES + CHUNK_BYTES // 2)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses after failures are short."""
    monkeypatch.setattr(picking, "FIRST_PAUSE_S", 0.01)
