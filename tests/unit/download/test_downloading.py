"""A download ends with the right bytes, whatever its sources do, and leaves those alone who are of no use."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swarm_protocol.chunks import CHUNK_BYTES, StateManifest, manifest_of
from swarm_protocol.download import Download, InMemory, downloading
from swarm_protocol.errors import (
    ConfigurationError,
    HashMismatchError,
    InvalidDataError,
    RefusedError,
    UnreachableError,
)
from swarm_protocol.throttle import TokenBucket

from .conftest import Twin, dead, frozen

pytestmark = pytest.mark.usefixtures("quick")


def fetch(state: bytes, sources: Iterable[Twin], **options: Any) -> Download[InMemory]:
    """Run a download to its end and check what came."""
    manifest = manifest_of(state)
    download = Download(manifest.root, manifest.size_bytes, sources, options.pop("sink", InMemory), **options)
    sink = asyncio.run(download.run())
    assert sink.data == state
    return download


def test_every_source_brings_a_share(state: bytes) -> None:
    sources = [Twin(state, takes_s=0.05, max_run=1) for _ in range(3)]
    download = fetch(state, sources)
    assert sum(download.bytes_by_source.values()) == len(state)
    assert all(len(source.asked) >= 2 for source in sources)
    assert sorted(index for source in sources for index in source.asked) == list(range(11)), "nothing comes twice"


def test_two_who_join_together_ask_for_different_chunks_first(state: bytes) -> None:
    orders = []
    for seed in (1, 2):
        source = Twin(state, max_run=1)
        fetch(state, [source], rng=np.random.default_rng(seed))
        orders.append(source.asked)
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_chunks_that_few_have_come_first(state: bytes) -> None:
    rare = {4, 7}
    whole = Twin(state, takes_s=0.01, max_run=1)
    fetch(state, [whole, *(Twin(state, has=set(range(11)) - rare, takes_s=0.01, max_run=1) for _ in range(2))])
    assert set(whole.asked[:2]) == rare


def test_a_source_that_is_fast_is_asked_for_more_at_once(state: bytes) -> None:
    fast = Twin(state, takes_s=0.005)
    fetch(state, [fast])
    assert fast.most_at_once > 2


def test_a_source_of_wrong_bytes_is_dropped_and_not_asked_in_the_next_download(state: bytes) -> None:
    liar, honest = Twin(state, corrupt=range(11), takes_s=0.0), Twin(state, takes_s=0.01)
    banned: set[bytes] = set()
    download = fetch(state, [liar, honest], banned=banned)
    assert banned == {liar.key}
    assert liar.name not in download.bytes_by_source
    liar.asked.clear()
    fetch(state, [liar, honest], banned=banned)
    assert not liar.asked


def test_what_came_before_a_wrong_chunk_is_kept_and_the_wrong_one_asked_elsewhere(state: bytes) -> None:
    liar = Twin(state, corrupt=[5])
    honest = Twin(state, takes_s=0.05)
    fetch(state, [liar, honest])
    assert 5 in honest.asked


def test_bytes_that_are_no_whole_chunk_are_wrong_bytes(state: bytes) -> None:
    class Half(Twin):
        async def chunks(self, manifest: StateManifest, first: int, count: int) -> bytes:
            return (await super().chunks(manifest, first, count))[: CHUNK_BYTES // 3]

    class Nothing(Twin):
        async def chunks(self, manifest: StateManifest, first: int, count: int) -> bytes:
            return b""

    class TooMuch(Twin):
        async def chunks(self, manifest: StateManifest, first: int, count: int) -> bytes:
            return (await super().chunks(manifest, first, count)) + b"more"

    banned: set[bytes] = set()
    liars = [Half(state), Nothing(state), TooMuch(state)]
    fetch(state, [*liars, Twin(state, takes_s=0.02)], banned=banned)
    assert banned == {liar.key for liar in liars}


def test_a_peer_that_gives_the_manifest_of_another_state_is_dropped(state: bytes) -> None:
    other = manifest_of(state[:-1] + b"!")
    liar = Twin(state, manifest=other)
    banned: set[bytes] = set()
    download = fetch(state, [liar, Twin(state, reserve=True)], banned=banned)
    assert banned == {liar.key}
    assert not liar.asked
    assert download.sink is not None


def test_a_state_of_another_size_is_refused_before_anything_is_allocated(state: bytes) -> None:
    def never(manifest: StateManifest) -> InMemory:
        raise AssertionError("allocated")

    manifest = manifest_of(state)
    for size in (manifest.size_bytes - 1, manifest.size_bytes + 1, 8):
        download = Download(manifest.root, size, [Twin(state)], never)
        with pytest.raises(InvalidDataError, match="bytes"):
            asyncio.run(download.run())


@pytest.mark.parametrize("fails", [dead(4), frozen(4)])
def test_a_source_that_goes_away_in_the_middle_holds_nothing_up(state: bytes, fails: Any) -> None:
    gone, other = Twin(state, fails=fails, takes_s=0.005), Twin(state, takes_s=0.01)
    download = fetch(state, [gone, other])
    assert download.bytes_by_source[other.name] >= len(state) // 3


def test_a_source_that_is_too_slow_is_left_alone_and_then_dropped(state: bytes) -> None:
    slow = Twin(state, takes_s=60.0)
    reserve = Twin(state, reserve=True, fails=lambda _: RefusedError("no"))
    manifest = manifest_of(state)
    download = Download(manifest.root, manifest.size_bytes, [slow, reserve], InMemory, call_s=0.02)
    with pytest.raises(UnreachableError, match="takes longer than"):
        asyncio.run(download.run())
    assert len(slow.asked) <= 6, "two at first, then one at a time"


def test_one_that_is_busy_is_asked_again_when_it_said(state: bytes) -> None:
    busy = [UnreachableError("busy", retry_after_s=0.02)] * 6
    source = Twin(state, fails=lambda asked: busy.pop() if asked and busy else None)
    fetch(state, [source])
    assert not busy, "more often than a source may fail"


def test_at_the_end_chunks_that_are_late_are_asked_of_a_second_source(state: bytes) -> None:
    last = [5]
    slow = Twin(state, has=last, takes_s=30.0)
    fast = Twin(state, takes_s=0.01)
    manifest = manifest_of(state)
    download = Download(manifest.root, manifest.size_bytes, [slow, fast], InMemory)

    async def run() -> float:
        started = asyncio.get_running_loop().time()
        await download.run()
        return asyncio.get_running_loop().time() - started

    assert asyncio.run(run()) < 10
    assert slow.asked == last
    assert last[0] in fast.asked


def test_the_coordinator_is_asked_only_for_what_no_peer_has(state: bytes) -> None:
    peer, coordinator = Twin(state, has=range(9), takes_s=0.01), Twin(state, reserve=True)
    download = fetch(state, [peer, coordinator])
    assert set(coordinator.asked) == {9, 10}
    assert download.bytes_by_source[peer.name] == 9 * CHUNK_BYTES


def test_the_coordinator_is_asked_for_everything_where_there_is_nobody_else(state: bytes) -> None:
    coordinator = Twin(state, reserve=True)
    fetch(state, [Twin(state, fails=dead(0), name="gone"), Twin(state, fails=dead(-1)), coordinator])
    assert len(coordinator.asked) >= 10


def test_the_coordinator_helps_where_the_peers_are_slow(state: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "RATE_S", 0.05)
    coordinator = Twin(state, reserve=True)
    fetch(state, [Twin(state, takes_s=2.0), coordinator])
    assert len(coordinator.asked) >= 7


def test_a_peer_that_is_still_downloading_gives_what_it_has_by_and_by(
    state: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloading, "REFRESH_S", 0.05)
    growing = Twin(state, has=[0, 3])
    manifest = manifest_of(state)
    download = Download(manifest.root, manifest.size_bytes, [growing], InMemory)

    async def run() -> InMemory:
        running = asyncio.create_task(download.run())
        await growing.bring({0, 3})
        growing.has = None
        return await running

    assert asyncio.run(run()).data == state


def test_sources_that_are_found_later_are_used(state: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "MORE_S", 0.02)
    first, later = Twin(state, has=range(5)), Twin(state)

    async def more() -> list[Twin]:
        return [first, later]

    fetch(state, [first], more=more)
    assert set(later.asked) >= set(range(5, 11))


def test_a_source_that_lost_a_chunk_gives_the_others(state: bytes) -> None:
    class Lost(Twin):
        async def chunks(self, manifest: StateManifest, first: int, count: int) -> bytes:
            if first == 2:
                self.asked.append(2)
                raise RefusedError("this chunk is no longer here")
            return await super().chunks(manifest, first, count)

    lost, coordinator = Lost(state, max_run=1), Twin(state, reserve=True)
    fetch(state, [lost, coordinator])
    assert coordinator.asked == [2]


def test_where_nobody_is_left_the_error_says_what_can_be_done(state: bytes) -> None:
    manifest = manifest_of(state)

    def run(*sources: Twin) -> None:
        asyncio.run(Download(manifest.root, manifest.size_bytes, sources, InMemory).run())

    with pytest.raises(UnreachableError, match="nobody serves"):
        run()
    with pytest.raises(UnreachableError, match="gone"):
        run(Twin(state, fails=dead(-1)), Twin(state, fails=lambda _: RefusedError("no such state")))
    with pytest.raises(RefusedError, match="no such state"):
        run(Twin(state, fails=lambda _: RefusedError("no such state")))
    with pytest.raises(HashMismatchError):
        run(Twin(state, corrupt=range(11)))


def test_a_download_without_any_progress_ends(state: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "STALL_S", 0.1)
    manifest = manifest_of(state)
    nothing = Twin(state, has=[])
    with pytest.raises(UnreachableError, match="no chunk"):
        asyncio.run(Download(manifest.root, manifest.size_bytes, [nothing], InMemory).run())


def test_a_disk_that_takes_no_more_ends_the_download(state: bytes) -> None:
    class Full(InMemory):
        def write(self, index: int, data: memoryview) -> None:
            raise ConfigurationError("no space left")

    manifest = manifest_of(state)
    with pytest.raises(ConfigurationError, match="no space"):
        asyncio.run(Download(manifest.root, manifest.size_bytes, [Twin(state)], Full).run())


def test_what_is_asked_for_is_taken_from_the_download_limit(state: bytes) -> None:
    now = [0.0]
    bucket = TokenBucket(1e12, 0, clock=lambda: now[0])
    fetch(state, [Twin(state)], limit=bucket)
    assert bucket.backlog_s() == pytest.approx(len(state) / 1e12)


def test_a_limit_that_is_low_is_no_reason_to_give_up(state: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "STALL_S", 1.5)
    limit = TokenBucket(10 * CHUNK_BYTES / 2.0, 0)
    source = Twin(state)
    started = time.monotonic()
    fetch(state, [source, Twin(state)], limit=limit)
    assert time.monotonic() - started > 1.0
    assert limit.backlog_s() < 0.7, "nothing was asked for far ahead"


def test_an_empty_state_needs_no_chunk(tmp_path: Path) -> None:
    fetch(b"", [Twin(b"")])
