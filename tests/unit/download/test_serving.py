"""Whoever asks for chunks gets those that are here and whole, and nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swarm_protocol.calls import Answer, Call
from swarm_protocol.chunks import CHUNK_BYTES, StateManifest, manifest_of
from swarm_protocol.download import ChunkDesk, Download, InMemory, Partial, PeerSource, StateFile, picking
from swarm_protocol.errors import InvalidDataError, RefusedError, UnreachableError

CALLER = bytes(32)


class Plane:
    """A peer plane on which one desk answers, in memory. `lie` may change an answer."""

    def __init__(self, desk: ChunkDesk, lie: Any = lambda op, answer: answer) -> None:
        self._handlers = desk.handlers
        self._lie = lie
        self.bodies: list[int] = []

    async def call(
        self, peer: bytes, header: dict[str, Any], *, max_answer_bytes: int, timeout_s: float
    ) -> tuple[dict[str, Any], bytes]:
        async def receive(use: Any) -> Any:
            return use(b"")

        answer = self._lie(header["op"], await self._handlers[header["op"]](Call(CALLER, header, 0, receive)))
        if len(answer.body) > max_answer_bytes:
            raise InvalidDataError("an answer beyond its bound")
        self.bodies.append(len(answer.body))
        return dict(answer.header), bytes(answer.body)


@pytest.fixture
def file(state: bytes, tmp_path: Path) -> StateFile:
    (tmp_path / "state").write_bytes(state)
    return StateFile.open(tmp_path / "state")


def desk_of(held: Any, **options: Any) -> ChunkDesk:
    return ChunkDesk(lambda root: held if root == held.manifest.root else None, **options)


def source_of(held: Any, lie: Any = lambda op, answer: answer, **options: Any) -> PeerSource:
    return PeerSource(Plane(desk_of(held, **options), lie), bytes([1]) * 32)  # type: ignore[arg-type]


def test_a_state_is_downloaded_from_a_peer_who_has_it(state: bytes, file: StateFile) -> None:
    sink = asyncio.run(Download(file.manifest.root, len(state), [source_of(file)], InMemory).run())
    assert sink.data == state


def test_several_neighbours_come_in_one_answer_up_to_a_bound(state: bytes, file: StateFile) -> None:
    source = source_of(file)
    assert asyncio.run(source.chunks(file.manifest, 3, 2)) == state[3 * CHUNK_BYTES : 5 * CHUNK_BYTES]
    assert asyncio.run(source.chunks(file.manifest, 9, 2)) == state[9 * CHUNK_BYTES :]
    assert len(asyncio.run(source.chunks(file.manifest, 0, 11))) == picking.MAX_RUN * CHUNK_BYTES


def test_a_file_can_be_served_when_it_is_deleted(state: bytes, file: StateFile, tmp_path: Path) -> None:
    (tmp_path / "state").unlink()
    assert asyncio.run(source_of(file).chunks(file.manifest, 0, 1)) == state[:CHUNK_BYTES]


def test_of_a_download_under_way_only_verified_chunks_are_served(state: bytes, tmp_path: Path) -> None:
    partial = Partial(manifest_of(state), tmp_path / "part")
    for index in (2, 3, 5):
        partial.write(index, memoryview(state)[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
    source = source_of(partial)
    flags = asyncio.run(source.held(partial.manifest))
    assert flags is not None
    assert list(np.flatnonzero(flags)) == [2, 3, 5]
    assert asyncio.run(source.chunks(partial.manifest, 2, 4)) == state[2 * CHUNK_BYTES : 4 * CHUNK_BYTES]
    with pytest.raises(RefusedError, match="not here yet"):
        asyncio.run(source.chunks(partial.manifest, 4, 2))
    partial.close()


def test_a_damaged_disk_makes_nobody_a_liar(
    state: bytes, file: StateFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (tmp_path / "state").open("r+b") as damaged:
        damaged.seek(CHUNK_BYTES)
        damaged.write(bytes([state[CHUNK_BYTES] ^ 1]))
    source = source_of(file)
    with pytest.raises(RefusedError, match="no longer here"):
        asyncio.run(source.chunks(file.manifest, 1, 1))
    assert "cannot be served" in caplog.text
    assert asyncio.run(source.chunks(file.manifest, 0, 1)) == state[:CHUNK_BYTES]


def test_whoever_would_wait_too_long_is_sent_away_for_a_while(file: StateFile) -> None:
    with pytest.raises(UnreachableError, match="busy") as refusal:
        asyncio.run(source_of(file, backlog_s=lambda: 12.5).chunks(file.manifest, 0, 1))
    assert refusal.value.retry_after_s == 12.5
    assert asyncio.run(source_of(file, backlog_s=lambda: 1.0).chunks(file.manifest, 0, 1))


def test_chunks_are_not_urgent(file: StateFile) -> None:
    async def receive(use: Any) -> Any:
        return use(b"")

    header = {"op": "chunks", "root": file.manifest.root, "first": 0, "count": 1}
    answer = asyncio.run(desk_of(file).handlers["chunks"](Call(CALLER, header, 0, receive)))
    assert not answer.urgent
    assert isinstance(answer.body, memoryview), "they go out of the mapped file, not copied"


@pytest.mark.parametrize(
    "header",
    [
        {"root": bytes(32), "first": 0, "count": 1},
        {"root": "text", "first": 0, "count": 1},
        {"first": -1, "count": 1},
        {"first": 11, "count": 1},
        {"first": 0, "count": 0},
        {"first": "x", "count": 1},
        {"count": 1},
    ],
)
def test_what_makes_no_sense_is_refused(file: StateFile, header: dict[str, Any]) -> None:
    async def receive(use: Any) -> Any:
        return use(b"")

    asked = {"op": "chunks", "root": file.manifest.root, **header}
    with pytest.raises((RefusedError, KeyError, ValueError)):  # the plane turns all of them into refusals
        asyncio.run(desk_of(file).handlers["chunks"](Call(CALLER, asked, 0, receive)))


LIES = {
    "a manifest of another state": ("manifest", lambda _: Answer(body=manifest_of(b"x" * 11_010_048).encode())),
    "a manifest that is none": ("manifest", lambda _: Answer(body=b"\0" * 400)),
    "too long a manifest": ("manifest", lambda answer: Answer(body=bytes(answer.body) + bytes(32))),
    "too few flags": ("held", lambda _: Answer({"whole": False}, b"\xff")),
    "too many flags": ("held", lambda _: Answer({"whole": False}, bytes(100))),
    "other bytes": ("chunks", lambda answer: Answer(body=bytes(len(answer.body)))),
    "more bytes": ("chunks", lambda answer: Answer(body=bytes(answer.body) + b"more")),
    "busy for ever": ("chunks", lambda _: Answer({"busy_ms": 1 << 40})),
    "busy for no time": ("chunks", lambda _: Answer({"busy_ms": 0})),
    "busy with words": ("chunks", lambda _: Answer({"busy_ms": "very"})),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_peer_that_lies_is_caught_and_banned(state: bytes, file: StateFile, lie: str) -> None:
    where, change = LIES[lie]
    source = source_of(file, lambda op, answer: change(answer) if op == where else answer)
    banned: set[bytes] = set()
    download = Download(file.manifest.root, len(state), [source], InMemory, banned=banned)
    with pytest.raises(InvalidDataError):
        asyncio.run(download.run())
    assert banned == {source.key}


def test_a_file_that_is_not_as_long_as_its_manifest_says_is_not_opened(file: StateFile, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"short")
    with pytest.raises(OSError, match="has 5 bytes"):
        StateFile.open(tmp_path / "short", StateManifest(file.manifest.size_bytes, file.manifest.hashes))
