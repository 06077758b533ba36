"""Who has a checkpoint, through a real DHT; and the upload limit, over real connections."""

from __future__ import annotations

import asyncio
import gc
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swarm_protocol.chunks import CHUNK_BYTES
from swarm_protocol.dht import BUCKETS
from swarm_protocol.download import ChunkDesk, Download, InMemory, PeerSource, StateFile
from swarm_protocol.errors import RefusedError
from swarm_protocol.identity import Identity
from swarm_protocol.peers import Answer, Call, PeerPlane
from swarm_protocol.records import Envelope, Holding

# hivemind's ways, as in test_peers.py.
pytestmark = [
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

RUN = bytes([1]) * 32


class Planes:
    """Two peers in this process."""

    def __init__(self, runner: asyncio.Runner, folder: Path) -> None:
        self.run = runner.run
        self._folder = folder
        self.first = self._start()
        self.second = self._start(*self.run(self.first.addresses())[:1])
        self.held: StateFile | None = None
        desk = ChunkDesk(lambda _: self.held)
        self.run(self.first.serve({"large": _large, "refuse": _refuse, **desk.handlers}))

    def _start(self, *initial_peers: str) -> PeerPlane:
        path = self._folder / secrets.token_hex(4)
        Identity.generate().save(path)
        return self.run(PeerPlane.start(path, RUN, initial_peers=initial_peers))


async def _large(_: Call) -> Answer:
    return Answer({}, bytes(CHUNK_BYTES), urgent=False)


async def _refuse(_: Call) -> Answer:
    raise RefusedError("not wanted")


@pytest.fixture(scope="module")
def planes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planes]:
    with asyncio.Runner() as runner:
        made = Planes(runner, tmp_path_factory.mktemp("identities"))
        yield made
        for plane in (made.second, made.first):
            runner.run(plane.close())
        gc.collect()  # while there is a loop to close sockets on


def holding(identity: Identity, root: bytes, run: bytes = RUN) -> Envelope:
    return Envelope.sign(identity, Holding(run=run, round=0, root=root))


async def stored(plane: PeerPlane, key: str, value: object, subkey: object) -> bool:
    future = plane._dht.store(key, value, time.time() + 60, subkey=subkey, return_future=True)
    return bool(await asyncio.to_thread(future.result, 10))


def test_who_announces_a_checkpoint_is_found_by_its_root(planes: Planes) -> None:
    root = secrets.token_bytes(32)
    first, second = planes.first, planes.second
    assert planes.run(second.directory.holders(root, 8)) == []
    assert planes.run(first.directory.hold(root, holding(first.identity, root)))
    assert planes.run(second.directory.holders(root, 8)) == [first.identity.public_key]
    assert planes.run(first.directory.holders(root, 8)) == [], "not we ourselves"
    assert planes.run(second.directory.hold(root, holding(second.identity, root)))
    assert planes.run(first.directory.holders(root, 8)) == [second.identity.public_key]


def test_what_is_forged_is_not_even_stored(planes: Planes) -> None:
    root, forger, victim = secrets.token_bytes(32), planes.second, Identity.generate()
    for bucket in range(BUCKETS):
        key = forger.directory.holders_key(root, bucket)
        for value in (holding(forger.identity, root).encode(), b"garbage", bytes(5000), "text"):
            assert not planes.run(stored(forger, key, value, victim.public_key))
    assert planes.run(planes.first.directory.holders(root, 8)) == []
    assert planes.run(planes.first.directory.hold(root, holding(planes.first.identity, root)))
    assert planes.run(forger.directory.holders(root, 8)) == [planes.first.identity.public_key]


@pytest.mark.parametrize("direct", [True, False])
def test_what_a_peer_sends_keeps_to_its_limit(planes: Planes, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def take() -> float:
        first, second = planes.first, planes.second
        monkeypatch.setattr(second, "_direct_wanted", direct)
        options: Any = {"max_answer_bytes": CHUNK_BYTES, "timeout_s": 20}
        await second.call(first.identity.public_key, {"op": "large"}, **options)
        first.limit_upload(4 * CHUNK_BYTES)
        started = time.monotonic()
        await asyncio.gather(*(second.call(first.identity.public_key, {"op": "large"}, **options) for _ in range(3)))
        return time.monotonic() - started

    try:
        assert planes.run(take()) > 0.6
    finally:
        planes.first._direct.upload = None


def test_a_limited_peer_still_hears_that_a_body_is_not_wanted(planes: Planes) -> None:
    async def ask() -> None:
        first, second = planes.first, planes.second
        second.limit_upload(64 * CHUNK_BYTES)
        with pytest.raises(RefusedError, match="not wanted"):
            await second.call(
                first.identity.public_key, {"op": "refuse"}, bytes(8 * CHUNK_BYTES), max_answer_bytes=0, timeout_s=20
            )

    try:
        planes.run(ask())
    finally:
        planes.second._direct.upload = None


def test_a_checkpoint_comes_over_the_peer_plane(planes: Planes, tmp_path: Path) -> None:
    data = np.random.default_rng(5).bytes(3 * CHUNK_BYTES + 1)
    (tmp_path / "state").write_bytes(data)
    planes.held = StateFile.open(tmp_path / "state")
    manifest = planes.held.manifest

    async def fetch() -> bytearray:
        source = PeerSource(planes.second, planes.first.identity.public_key)
        return (await Download(manifest.root, len(data), [source], InMemory).run()).data

    assert planes.run(fetch()) == data
