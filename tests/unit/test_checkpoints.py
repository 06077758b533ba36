"""A node's checkpoint: kept, loaded, repaired, fetched from peers, and served to them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from swarm_node.checkpoints import CheckpointKeeper
from swarm_node.evidence import Evidence
from swarm_node.folder import RunFolder
from swarm_protocol import fetch
from swarm_protocol.calls import Call, Handler
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import CHUNK_BYTES, StateManifest, chunks, content_hash, manifest_of
from swarm_protocol.download import picking
from swarm_protocol.errors import RefusedError, SwarmError, UnreachableError
from swarm_protocol.identity import Identity
from swarm_protocol.records import Envelope, Holding
from swarm_protocol.signing import SigningLedger
from swarm_protocol.spec import ModelSpec, RunSpec, TrainableSpec


@pytest.fixture(scope="module")
def spec(run_spec: RunSpec) -> RunSpec:
    """A run whose checkpoints have four chunks and a bit."""
    model = ModelSpec(vocab_size=8192, hidden_size=64, intermediate_size=24, num_hidden_layers=1)
    return run_spec.model_copy(update={"model": model})


def make(spec: RunSpec, round_number: int) -> Checkpoint:
    values = np.random.default_rng(round_number).random((2, spec.num_trainable), np.float32)
    return Checkpoint(round_number, values[0], values[1])


class Coordinator:
    """What a keeper asks of the coordinator: the checkpoints that it was given."""

    def __init__(self, spec: RunSpec, *checkpoints: Checkpoint) -> None:
        self.spec = spec
        self.checkpoints = list(checkpoints)
        self.asked = 0
        self.away = False

    async def latest_checkpoint(self) -> tuple[int, bytes]:
        newest = self.checkpoints[-1]
        return newest.round, newest.root

    async def peers(self) -> tuple[list[str], bool]:
        return [], False

    async def json(self, path: str, *, before: int, limit: int) -> dict[str, Any]:
        """The list of checkpoints, all of which it has whole."""
        found = [one for one in self.checkpoints if one.round < before]
        return {"checkpoints": [self._entry(one) for one in reversed(found)][:limit]}

    def _entry(self, one: Checkpoint) -> dict[str, Any]:
        return {
            "round": one.round,
            "root": one.root.hex(),
            "size_bytes": one.manifest.size_bytes,
            "whole": True,
            "delta_bytes": None,
        }

    async def state_manifest(self, root: bytes) -> StateManifest:
        self._answer()
        return next(one.manifest for one in self.checkpoints if one.root == root)

    async def chunk(self, digest: bytes) -> bytes:
        self._answer()
        self.asked += 1
        return next(
            piece for one in self.checkpoints for piece in chunks(*one.buffers) if content_hash(piece) == digest
        )

    def _answer(self) -> None:
        if self.away:
            raise UnreachableError("away")


class Network:
    """Peers in memory, and a DHT."""

    def __init__(self) -> None:
        self.handlers: dict[bytes, dict[str, Handler]] = {}
        self.holdings: dict[bytes, dict[bytes, Envelope]] = {}

    def plane(self, key: bytes) -> Any:
        async def call(
            peer: bytes, header: dict[str, Any], body: bytes = b"", *, max_answer_bytes: int, timeout_s: float
        ) -> tuple[dict[str, Any], bytes]:
            try:
                answer = await self.handlers[peer][header["op"]](Call(key, header, 0, cast(Any, None)))
            except SwarmError as error:
                raise RefusedError(str(error)) from error
            return dict(answer.header), bytes(answer.body)

        async def hold(root: bytes, envelope: Envelope) -> bool:
            self.holdings.setdefault(root, {})[key] = envelope
            return True

        async def holders(root: bytes, count: int) -> list[bytes]:
            return [peer for peer in self.holdings.get(root, {}) if peer != key][:count]

        return SimpleNamespace(
            call=call, upload=None, reachable=True, directory=SimpleNamespace(hold=hold, holders=holders)
        )


class Nodes:
    """Makes keepers, each with a folder and a key of its own."""

    def __init__(self, folder: Path, coordinator: Coordinator, network: Network) -> None:
        self._folder = folder
        self._coordinator = coordinator
        self._network = network
        self._ledgers: list[SigningLedger] = []
        self.said: list[str] = []

    def keeper(self, name: str) -> CheckpointKeeper:
        (self._folder / name).mkdir(exist_ok=True)
        ledger = SigningLedger(self._folder / f"{name}.db", Identity.from_seed(content_hash(name.encode())))
        self._ledgers.append(ledger)
        keeper = CheckpointKeeper(
            cast(Any, self._coordinator), self._network.plane(ledger.identity.public_key), ledger, self.folder(name),
            Evidence(), say=self.said.append, fetching=lambda _: None,
        )  # fmt: skip
        self._network.handlers[ledger.identity.public_key] = keeper.handlers
        return keeper

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self._folder / name, self._coordinator.spec)

    def close(self) -> None:
        for ledger in self._ledgers:
            ledger.close()


@pytest.fixture
def coordinator(spec: RunSpec) -> Coordinator:
    return Coordinator(spec, make(spec, 0))


@pytest.fixture
def nodes(tmp_path: Path, coordinator: Coordinator) -> Iterator[Nodes]:
    made = Nodes(tmp_path, coordinator, Network())
    yield made
    made.close()


async def announced(keeper: CheckpointKeeper) -> None:
    """Let the keeper announce what it has."""
    announcing = asyncio.create_task(keeper.announce())
    await asyncio.sleep(0.05)
    announcing.cancel()
    await asyncio.gather(announcing, return_exceptions=True)


def test_the_first_node_fetches_from_the_coordinator_and_the_second_from_the_first(
    nodes: Nodes, coordinator: Coordinator
) -> None:
    async def run() -> None:
        first, second = nodes.keeper("first"), nodes.keeper("second")
        held = await first.catch_up()
        assert held.root == coordinator.checkpoints[0].root
        assert coordinator.asked == len(held.manifest.hashes)
        await announced(first)
        assert (await second.catch_up()).root == held.root
        assert coordinator.asked == len(held.manifest.hashes), "not one chunk more"
        assert await second.catch_up() is second.current, "nothing is fetched twice"

    asyncio.run(run())
    said = f"Fetched checkpoint 0 ({coordinator.checkpoints[0].root.hex()[:12]}), every chunk verified"
    assert [line.split(":")[0] for line in nodes.said] == [said] * 2


def test_what_is_announced_is_signed_for_the_run(nodes: Nodes, coordinator: Coordinator) -> None:
    keeper = nodes.keeper("a")
    asyncio.run(keeper.catch_up())
    asyncio.run(announced(keeper))
    root = coordinator.checkpoints[0].root
    [(key, envelope)] = nodes._network.holdings[root].items()
    assert envelope.open_as(Holding, run=coordinator.spec.run_id, round=0, key=key).root == root


def test_the_newest_two_are_kept_and_served(nodes: Nodes, spec: RunSpec) -> None:
    keeper, held = nodes.keeper("a"), [make(spec, number) for number in range(3)]
    for checkpoint in held:
        asyncio.run(keeper.hold(checkpoint))
    names = sorted(path.name for path in nodes.folder("a").root.glob("checkpoint-*"))
    assert names == sorted(f"checkpoint-{one.root.hex()}" for one in held[1:])
    for one in held[1:]:
        call = Call(bytes(32), {"root": one.root, "first": 0, "count": 1}, 0, cast(Any, None))
        assert asyncio.run(keeper.handlers["chunks"](call)).body == one.parameters.tobytes()[:CHUNK_BYTES]
    assert keeper.current is held[2]


def test_the_next_start_holds_what_was_there(nodes: Nodes, coordinator: Coordinator) -> None:
    asyncio.run(nodes.keeper("a").catch_up())
    again = nodes.keeper("a")
    asyncio.run(again.restore())
    assert again.current is not None
    assert again.current.root == coordinator.checkpoints[0].root
    assert np.array_equal(again.current.momentum, coordinator.checkpoints[0].momentum)
    coordinator.away = True
    asyncio.run(again.catch_up())


@pytest.mark.parametrize(
    ("keep_bytes", "wrong_at", "fetched"), [(3 * CHUNK_BYTES + 5, None, 2), (None, 1, 1), (0, None, 5)]
)
def test_a_damaged_checkpoint_is_repaired_chunk_by_chunk(
    nodes: Nodes, coordinator: Coordinator, keep_bytes: int | None, wrong_at: int | None, fetched: int
) -> None:
    checkpoint = coordinator.checkpoints[0]
    asyncio.run(nodes.keeper("a").hold(checkpoint))
    path = nodes.folder("a").checkpoint_path(checkpoint.root)
    state = bytearray(path.read_bytes())
    if wrong_at is not None:
        state[wrong_at] ^= 1
    path.write_bytes(state[:keep_bytes])
    keeper = nodes.keeper("a")
    asyncio.run(keeper.restore())
    assert keeper.current is None
    assert asyncio.run(keeper.catch_up()).root == checkpoint.root
    assert coordinator.asked == fetched
    assert path.read_bytes() == b"".join(checkpoint.buffers)
    assert not list(nodes.folder("a").root.glob("download-*"))


def test_a_pointer_that_is_damaged_is_as_good_as_none(nodes: Nodes, coordinator: Coordinator) -> None:
    asyncio.run(nodes.keeper("a").hold(coordinator.checkpoints[0]))
    for content in (b"", b"{", b"[]", b'{"round": "x", "root": ""}', json.dumps({"round": 0, "root": "zz"}).encode()):
        (nodes.folder("a").root / "checkpoint.json").write_bytes(content)
        assert nodes.folder("a").load_checkpoint() is None


def test_a_download_goes_on_when_the_coordinator_is_back(
    nodes: Nodes, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picking, "FIRST_PAUSE_S", 0.01)

    class Leaving(Coordinator):
        async def chunk(self, digest: bytes) -> bytes:
            self.away = self.asked == 2
            return await super().chunk(digest)

    checkpoint = coordinator.checkpoints[0]
    leaving = Leaving(coordinator.spec, checkpoint)
    nodes._coordinator = leaving
    with pytest.raises(UnreachableError):
        asyncio.run(asyncio.wait_for(nodes.keeper("a").catch_up(), 20))
    nodes._coordinator = coordinator
    assert asyncio.run(nodes.keeper("a").catch_up()).root == checkpoint.root
    assert coordinator.asked == len(checkpoint.manifest.hashes) - 2


def test_what_is_there_of_a_download_is_served_and_announced(nodes: Nodes, coordinator: Coordinator) -> None:
    class Halting(Coordinator):
        async def chunk(self, digest: bytes) -> bytes:
            if self.asked == 2:
                halted.set()
                await asyncio.Event().wait()
            return await super().chunk(digest)

    checkpoint, halted = coordinator.checkpoints[0], asyncio.Event()
    nodes._coordinator = Halting(coordinator.spec, checkpoint)

    async def run() -> bytes:
        keeper = nodes.keeper("a")
        announcing, fetching = asyncio.create_task(keeper.announce()), asyncio.create_task(keeper.catch_up())
        await halted.wait()
        await asyncio.sleep(0.05)
        call = Call(bytes(32), {"root": checkpoint.root}, 0, cast(Any, None))
        answer = await keeper.handlers["held"](call)
        for task in (fetching, announcing):
            task.cancel()
        await asyncio.gather(fetching, announcing, return_exceptions=True)
        assert answer.header == {"whole": False}
        return bytes(answer.body)

    assert int.from_bytes(asyncio.run(run()), "big").bit_count() == 2
    assert list(nodes._network.holdings) == [checkpoint.root]


def test_a_download_of_an_older_checkpoint_is_thrown_away(nodes: Nodes, spec: RunSpec) -> None:
    folder = nodes.keeper("a") and nodes.folder("a")
    folder.download_path(bytes(32)).write_bytes(b"begun")
    newer = folder.download_path(bytes([1]) * 32)
    assert not folder.download_path(bytes([1]) * 32).exists()
    newer.write_bytes(b"begun")
    asyncio.run(nodes.keeper("a").hold(make(spec, 1)))
    assert not newer.exists()


def test_a_checkpoint_comes_into_memory_from_the_coordinator_alone(coordinator: Coordinator) -> None:
    checkpoint = coordinator.checkpoints[0]
    found = asyncio.run(fetch.checkpoint(cast(Any, coordinator), 0, checkpoint.root))
    assert found.root == checkpoint.root
    assert np.array_equal(found.parameters, checkpoint.parameters)


def test_the_trunk_comes_from_a_node_that_has_it_and_is_read_from_disk_at_the_next_start(
    nodes: Nodes, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_trunks", {})  # every node is a process of its own
    trunk = np.random.default_rng(3).random(spec.model.num_parameters, np.float32)
    manifest = manifest_of(trunk)
    lora = TrainableSpec(kind="lora", r=1)
    adapted = spec.model_copy(update={"trainable": lora, "trunk": manifest.root.hex()})
    whole = SimpleNamespace(root=manifest.root, manifest=manifest, buffers=(trunk,))
    coordinator = Coordinator(adapted, cast(Any, whole))
    nodes._coordinator = coordinator

    async def fetched(name: str) -> CheckpointKeeper:
        keeper = nodes.keeper(name)
        found = await keeper.trunk()
        assert found is not None
        assert np.array_equal(found, trunk)
        fetch._trunks.clear()
        return keeper

    async def run() -> None:
        first = await fetched("first")
        assert coordinator.asked == len(manifest.hashes)
        await announced(first)
        await fetched("second")
        coordinator.away = True
        await fetched("first")
        assert coordinator.asked == len(manifest.hashes), "not one chunk more"

    asyncio.run(run())
    names = {path.name for path in nodes.folder("second").root.iterdir()}
    assert names == {f"trunk-{manifest.root.hex()}", "shards"}
