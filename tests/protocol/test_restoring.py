"""What the object store has lost comes back from volunteers, every byte checked; nobody is believed."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swarm_coordinator import restoring
from swarm_coordinator.restoring import Restoring
from swarm_coordinator.store import Store
from swarm_node.evidence import Evidence
from swarm_protocol import chunks
from swarm_protocol.calls import Call
from swarm_protocol.chunks import content_hash
from swarm_protocol.data import DatasetManifest, Shard
from swarm_protocol.errors import RefusedError, UnreachableError
from swarm_protocol.files import write_atomic
from swarm_protocol.identity import Identity, peer_id
from swarm_protocol.layout import layout

MakeChain = Callable[..., Any]
NODES = [Identity.from_seed(bytes([number]) * 32).public_key for number in range(1, 4)]
SHARDS = b"one shard" * 100, b"another shard" * 100


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, so that checkpoints of a tiny model consist of several, and short pauses."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr("swarm_node.evidence.CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(restoring, "RETRY_S", 0.0)


class Plane:
    """Volunteers that answer as their evidence does; who is not in `here` is away, who is in `liars` serves other bytes."""

    def __init__(self, folder: Path) -> None:
        self.identity = Identity.from_seed(bytes(32))
        self.nodes = {key: Evidence(shards=folder / key.hex()[:8]) for key in NODES}
        self.folder = folder
        self.here = set(NODES)
        self.liars: set[bytes] = set()

    def give(self, key: bytes, *files: bytes, checkpoint: Any = None, averages: tuple[bytes, ...] = ()) -> None:
        folder = self.folder / key.hex()[:8]
        for data in files:
            write_atomic(folder / content_hash(data).hex(), data)
        for data in averages:
            self.nodes[key].keep(0, content_hash(data), data, folder / "average")
        if checkpoint is not None:
            write_atomic(folder / "checkpoint", *checkpoint.buffers)
            self.nodes[key].hold(checkpoint.manifest, folder / "checkpoint")

    async def call(self, peer: bytes, header: dict[str, Any], **bounds: Any) -> tuple[dict[str, Any], bytes]:
        if peer not in self.here:
            raise UnreachableError("away")
        answer = await self.nodes[peer].handlers[header["op"]](Call(b"", header, 0, None))  # type: ignore[arg-type]
        body = bytes(answer.body)
        assert len(body) <= bounds["max_answer_bytes"]
        return {}, body[:-1] + bytes([body[-1] ^ 1]) if peer in self.liars else body


class Scene:
    """A chain of five rounds, what is in the coordinator's store, and volunteers."""

    def __init__(self, chain: Any, folder: Path) -> None:
        for number in range(5):
            chain.seal({number % 3})
        self.chain, self.plane = chain, Plane(folder / "nodes")
        shards = [Shard(content_hash(one), 1 << 10) for one in SHARDS]
        self.dataset = DatasetManifest("bytes", 256, 1 << 10, (shards[0],), (shards[1],))
        data = chain.spec.data.model_copy(update={"root": self.dataset.root.hex()})
        chain.spec = chain.spec.model_copy(update={"data": data})
        self.folder = folder / "objects"
        self.store = Store(self.folder)
        self.put_everything()

    def put_everything(self) -> None:
        for blob in (*SHARDS, self.dataset.encode(), layout(self.chain.spec), *self.chain.blobs.values()):
            self.store.put(content_hash(blob), blob)
        for number in (0, 5):
            self.store.put_state(*self.chain.checkpoints[number].buffers)

    def wipe(self) -> None:
        shutil.rmtree(self.folder)
        self.store = Store(self.folder)

    def restored(self) -> Any:
        newest = self.chain.checkpoints[5]
        found = asyncio.run(self.restoring().checkpoint(5, newest.root))
        assert [one.tobytes() for one in found.buffers] == [one.tobytes() for one in newest.buffers]
        return found

    def restoring(self) -> Restoring:
        scene = self

        class Client:
            """The chain's answers; chunks are those of the store."""

            spec = self.chain.spec
            plan, manifest = staticmethod(self.chain.plan), staticmethod(self.chain.manifest)

            async def json(self, *args: Any, **options: Any) -> Any:
                scene.chain.whole = set(scene.store.states())
                return await scene.chain.json(*args, **options)

            async def chunk(self, digest: bytes, **bounds: Any) -> bytes:
                data = scene.store.get(digest)
                if data is None:
                    raise RefusedError("not here", status=404)
                return data

            async def status(self) -> dict[str, Any]:
                return {"nodes": [{"peer": peer_id(key), "last_seen_ms": at} for at, key in enumerate(NODES)]}

        return Restoring(Client(), self.plane, self.store)  # type: ignore[arg-type]

    def is_whole(self) -> bool:
        newest = self.chain.checkpoints[5]
        return self.store.whole([newest.root]) == {newest.root} and all(
            (data := self.store.get(digest)) is not None and content_hash(data) == digest
            for digest in newest.manifest.hashes
        )


@pytest.fixture
def scene(make_chain: MakeChain, tmp_path: Path) -> Scene:
    return Scene(make_chain(keep_rounds=2), tmp_path)


def test_what_is_whole_is_read_from_the_store_and_nobody_is_asked(scene: Scene) -> None:
    scene.plane.here.clear()
    scene.restored()


def test_a_wiped_store_gets_the_newest_checkpoint_from_a_volunteer_who_is_honest(scene: Scene) -> None:
    scene.wipe()
    newest, older = scene.chain.checkpoints[5], scene.chain.checkpoints[4]
    for key, one in zip(NODES, (newest, older, newest), strict=True):
        scene.plane.give(key, checkpoint=one)
    scene.plane.liars = {NODES[2]}
    scene.restored()
    assert scene.is_whole()


@pytest.mark.parametrize("damage", ["gone", "changed", "cut"])
def test_a_damaged_chunk_is_asked_for_alone_and_put_right(scene: Scene, damage: str) -> None:
    scene.store.delete_states([scene.chain.checkpoints[0].root])
    newest = scene.chain.checkpoints[5]
    path = scene.folder / "chunks" / newest.manifest.hashes[1].hex()
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    scene.plane.give(NODES[0], checkpoint=newest)
    scene.restored()
    assert scene.is_whole()


def test_what_no_volunteer_has_is_made_from_a_snapshot_and_averages(scene: Scene) -> None:
    scene.plane.here.clear()
    newest = scene.chain.checkpoints[5]
    scene.store.delete_states([newest.root])
    scene.store.blobs()
    scene.store.delete_blobs(newest.manifest.hashes)
    scene.restored()
    assert scene.is_whole()


def test_it_waits_for_somebody_who_has_the_checkpoint(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.wipe()
    scene.plane.give(NODES[0], checkpoint=scene.chain.checkpoints[5])
    scene.plane.here.clear()
    asked = 0

    async def sleep(_: float) -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            scene.plane.here = {NODES[0]}

    monkeypatch.setattr(restoring.asyncio, "sleep", sleep)
    scene.restored()
    assert (asked, scene.is_whole()) == (3, True)


def test_data_and_recent_averages_come_back_too(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.wipe()
    recent = tuple(scene.chain.blobs[one] for number in (3, 4) for one in scene.chain.results(number))
    scene.plane.give(NODES[0], SHARDS[0], averages=recent)
    scene.plane.give(NODES[1], SHARDS[1])
    for number in (4, 5):
        path = scene.plane.folder / f"checkpoint-{number}"
        write_atomic(path, *scene.chain.checkpoints[number].buffers)
        scene.plane.nodes[NODES[1]].hold(scene.chain.checkpoints[number].manifest, path)
    root = bytes.fromhex(scene.chain.spec.data.root)
    write_atomic(scene.plane.folder / NODES[1].hex()[:8] / f"manifest-{root.hex()}", scene.dataset.encode())
    scene.plane.liars = {NODES[2]}
    asyncio.run(scene.restoring().rest(5))
    wanted = {content_hash(one) for one in (*SHARDS, *recent, layout(scene.chain.spec))} | {root}
    before = scene.chain.checkpoints[4].manifest  # audits of the last round start from it
    assert set(scene.store.states()) == {before.root}
    assert set(scene.store.blobs()) == wanted | set(before.hashes)
    assert "no volunteer has" not in caplog.text


def test_what_nobody_has_is_named_and_asked_for_no_longer_than_is_of_use(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(restoring, "ATTEMPTS", 3)
    monkeypatch.setattr(restoring, "LONGEST_RETRY_S", 0.0)
    scene.store.blobs()
    scene.store.delete_blobs([content_hash(SHARDS[1])])
    asyncio.run(scene.restoring().rest(5))
    said = [record.message for record in caplog.records if "no volunteer has" in record.message]
    assert said == [f"the object store lacks 1 blobs that no volunteer has: a shard {content_hash(SHARDS[1]).hex()}"]
    assert "restore it from a backup" in caplog.records[-1].message
