"""Rounds among real peers on loopback, whose contributions and commitments are made by hand."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import pytest

from swarm_coordinator.selecting import Selecting
from swarm_coordinator.store import Store
from swarm_node import reduction_evidence
from swarm_node.contribution import Contribution
from swarm_node.evidence import Evidence
from swarm_node.exchange import Exchange, ExchangeDesk
from swarm_node.faults import NONE, Faults
from swarm_node.folder import RunFolder
from swarm_protocol import aggregate, chunks, codec, parts
from swarm_protocol.client import Commitments, CoordinatorClient, CountedSketches, SealedRound
from swarm_protocol.errors import HashMismatchError, RefusedError
from swarm_protocol.files import write_atomic
from swarm_protocol.identity import Identity
from swarm_protocol.layout import checkpoint_manifest
from swarm_protocol.peers import Answer, Call, Handler, PeerPlane
from swarm_protocol.records import (
    CommitmentSet,
    Envelope,
    PartReceipt,
    PartRecord,
    RoundManifest,
    RoundPlan,
    Seat,
    Sketches,
    SketchObjection,
    SketchSet,
    SlotHash,
)
from swarm_protocol.signing import SigningLedger
from swarm_protocol.spec import (
    AuditSpec,
    DataSpec,
    ExchangeSpec,
    ModelSpec,
    OuterSpec,
    RoundsSpec,
    RunSpec,
    TrainingSpec,
)

T = TypeVar("T")
NODES = 3
CROWD = 8
PARTS = 3
ROUND = 2
WEIGHTS = [1000, 500, 250, 125]
ZERO = "0" * 64


def _run_spec(codec_name: codec.Name, exchange_s: float, aggregator: aggregate.Name) -> RunSpec:
    return RunSpec(
        name="test",
        seed=1,
        numerics="native",
        coordinator=ZERO,
        checkpoint=ZERO,
        beacon=ZERO,
        model=ModelSpec(vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1),
        data=DataSpec(root=ZERO, tokenizer="bytes", train_tokens=1, held_out_windows=1),
        training=TrainingSpec(),
        exchange=ExchangeSpec(parts=PARTS, codec=codec_name, aggregator=aggregator),
        outer=OuterSpec(),
        rounds=RoundsSpec(exchange_s=exchange_s),
        audit=AuditSpec(),
    )


class Swarm:
    """Planes that know each other, on one event loop; what they serve changes with the test."""

    def __init__(self, runner: asyncio.Runner, folder: Path, nodes: int) -> None:
        self.run = runner.run
        self.served: dict[bytes, dict[str, Handler]] = {}
        self.planes = [self.run(self._start(folder / str(number))) for number in range(nodes)]
        self._folder, self._worker = folder, None
        self.planes.sort(key=lambda plane: plane.identity.peer_id)
        addresses = [self.run(plane.addresses())[0] for plane in self.planes]
        for plane in self.planes:
            self.run(plane.dial([address for address in addresses if plane.identity.peer_id not in address]))

    @property
    def worker(self) -> PeerPlane:
        """The checkpoint worker's plane, which knows everybody."""
        if self._worker is None:
            self._worker = self.run(self._start(self._folder / "200"))
            self.run(self._worker.dial([self.run(plane.addresses())[0] for plane in self.planes]))
        return self._worker

    def close(self) -> None:
        for plane in [*self.planes, *([self._worker] if self._worker else [])]:
            self.run(plane.close())

    async def _start(self, path: Path) -> PeerPlane:
        Identity.from_seed(bytes([10 + int(path.name)]) * 32).save(path)
        plane = await PeerPlane.start(path, bytes(32))
        key = plane.identity.public_key

        def served(op: str) -> Handler:
            async def handle(call: Call) -> Answer:
                return await self.served[key][op](call)

            return handle

        await plane.serve({op: served(op) for op in ("deliver", "get")})
        return plane


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    with asyncio.Runner() as runner:
        made = Swarm(runner, tmp_path_factory.mktemp("identities"), NODES)
        yield made
        made.close()
        gc.collect()  # while there is a loop to close sockets on


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Enough nodes for multi-Krum to leave one out."""
    with asyncio.Runner() as runner:
        made = Swarm(runner, tmp_path_factory.mktemp("identities"), CROWD)
        yield made
        made.close()
        gc.collect()


def _encoded_parts(spec: RunSpec, slot: int) -> list[bytes]:
    """A slot's parts, of a random vector."""
    vector = np.random.default_rng(slot).standard_normal(spec.model.num_parameters, dtype=np.float32)
    return [codec.get(spec.exchange.codec).encode(vector[where]) for where in parts.slices(spec)]


class Node:
    """What one node has in a round, with a contribution made by hand."""

    def __init__(self, round: Round, plane: PeerPlane, slot: int, folder: Path) -> None:
        self.round, self.plane, self.slot = round, plane, slot
        self._folder = RunFolder(folder, round.spec)
        self._ledger_path = folder / "signed.db"
        self.faults: Faults = NONE
        encoded = _encoded_parts(round.spec, slot)
        self.mine = Contribution(
            plan_hash=round.plan.hash,
            slot=slot,
            nonce=bytes([slot]) * 32,
            loss=5.0,
            states=(chunks.manifest_of(b""),),
            part_hashes=tuple(parts.part_hashes(encoded)),
            folder=self._folder.work(ROUND),
        )
        for part, data in enumerate(encoded):
            write_atomic(self.mine.part_path(part), data, durable=False)
        self.start()

    def start(self) -> None:
        """Begin as a process does that knows only what is on disk."""
        self.ledger = SigningLedger(self._ledger_path, self.plane.identity)
        self.evidence = Evidence()
        self.evidence.restore(self.round.spec, self._folder)
        self.evidence.add(ROUND, self.mine)
        self.desk = ExchangeDesk()
        self.round.swarm.served[self.plane.identity.public_key] = {**self.evidence.handlers, **self.desk.handlers}

    def exchange(self) -> Exchange:
        return Exchange(
            self.round.spec,
            self.round.plan,
            self.round.commitments,
            plane=self.plane,
            client=cast(CoordinatorClient, self.round.coordinator),
            ledger=self.ledger,
            folder=self._folder,
            evidence=self.evidence,
            faults=self.faults,
        )

    @property
    def key(self) -> bytes:
        return self.plane.identity.public_key

    def spoil(self, part: int, data: bytes) -> None:
        """Commit to these bytes as our encoded part, and start anew with them."""
        self.mine.part_path(part).write_bytes(data)
        hashes = [*self.mine.part_hashes[:part], chunks.content_hash(data), *self.mine.part_hashes[part + 1 :]]
        object.__setattr__(self.mine, "part_hashes", tuple(hashes))
        self.evidence.add(ROUND, self.mine)
        commitment = self.mine.commitment(self.round.spec, self.round.plan, bytes(32))
        self.round.commitments.by_slot[self.slot] = commitment

    def commit_to(self, vector: np.ndarray) -> None:
        """Commit to this pseudo-gradient, float32[num_parameters]."""
        for part, where in enumerate(parts.slices(self.round.spec)):
            self.spoil(part, codec.get(self.round.spec.exchange.codec).encode(vector[where]))

    def receipts(self) -> list[PartReceipt]:
        """What reducers signed for our parts, as it lies on disk."""
        raw = reduction_evidence.receipts(self._folder.work(ROUND))
        return [Envelope.decode(one).open_as(PartReceipt, run=self.round.spec.run_id) for one in raw]


class Coordinator:
    """What is asked of the coordinator during an exchange: records of all kinds, and chunks as a last source.

    `deaf_to` are the kinds of records that get lost on the way to it.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.posted: list[Envelope] = []
        self.sketches: list[Envelope] = []
        self.sketch_sets: list[Envelope] = []
        self.refused: list[Envelope] = []
        self.deaf_to: set[tuple[str, bytes]] = set()
        self.blobs: dict[bytes, bytes] = {}
        self.asked = 0
        self.news = asyncio.Condition()

    async def post(self, envelope: Envelope) -> None:
        record = envelope.open()
        if (record.kind, envelope.key) in self.deaf_to:
            return
        async with self.news:
            match record:
                case Sketches() | SketchObjection():
                    same = [one for one in self.sketches if one.key == envelope.key and one.open().kind == record.kind]
                    if any(one.open().sequence == record.sequence and one != envelope for one in same):
                        self.refused.append(envelope)
                        raise RefusedError("this identity signed a different one", status=409, code="equivocation")
                    if envelope not in same:
                        self.sketches.append(envelope)
                case SketchSet():
                    self.sketch_sets.append(envelope)
                case _:
                    self.posted.append(envelope)
            self.news.notify_all()

    async def sketch_records(self, round_number: int, *, after: int, wait_s: float) -> list[Envelope]:
        async with self.news:
            await self.news.wait_for(lambda: len(self.sketches) > after)
            return self.sketches[after:]

    async def sketch_set(self, plan: RoundPlan, commitments: Commitments, *, wait_s: float) -> CountedSketches:
        async with self.news:
            await self.news.wait_for(lambda: bool(self.sketch_sets))
        closing = self.sketch_sets[0].open_as(SketchSet, run=self.spec.run_id)
        known = {one.open().hash: one.open() for one in self.sketches}
        counted = {entry.slot: known[entry.hash] for entry in closing.counted}
        return CountedSketches(closing, cast(dict[int, Sketches], counted))

    async def part_records(self, round_number: int, *, after: int, wait_s: float) -> list[Envelope]:
        async with self.news:
            await self.news.wait_for(lambda: len(self.posted) > after)
            return self.posted[after:]

    async def chunk(self, digest: bytes, *, max_bytes: int) -> bytes:
        self.asked += 1
        if digest not in self.blobs:
            raise HashMismatchError("the coordinator has other bytes")
        assert len(self.blobs[digest]) <= max_bytes
        return self.blobs[digest]


def _beacon(keys: list[bytes]) -> bytes:
    """One under which the parts have different first reducers, the last of `keys` among them."""
    for number in range(256):
        beacon = bytes([number]) * 32
        first = {parts.rendezvous(beacon, part, keys)[0] for part in range(PARTS)}
        if len(first) == PARTS and len(keys) - 1 in first:
            return beacon
    raise AssertionError("no such beacon")


class Round:
    """A round whose commitments are closed, whose parts have different first reducers.

    With `ghost` a further slot has committed, is the first reducer of a part, and is not there any more.
    """

    def __init__(self, swarm: Swarm, folder: Path, spec: RunSpec, *, ghost: bool = False) -> None:
        self.swarm, self.spec, self.nodes_count = swarm, spec, len(swarm.planes)
        self.coordinator = Coordinator(spec)
        self._folder = folder
        self._worker_ledger: SigningLedger | None = None
        keys = [plane.identity.public_key for plane in swarm.planes]
        if ghost:
            keys.append(Identity.from_seed(bytes([99]) * 32).public_key)
        roster = tuple(Seat(peer=key, steps=1, weight=WEIGHTS[slot % 4], reducer=True) for slot, key in enumerate(keys))
        self.plan = RoundPlan(
            run=spec.run_id,
            round=ROUND,
            base=bytes(32),
            roster=roster,
            cursor=0,
            commit_by_ms=0,
            exchange_by_ms=0,
            previous_beacon=_beacon(keys),
            log_size=0,
            log_root=bytes(32),
        )
        self.nodes = [Node(self, plane, slot, folder / str(slot)) for slot, plane in enumerate(swarm.planes)]
        by_slot = {node.slot: node.mine.commitment(spec, self.plan, bytes(32)) for node in self.nodes}
        for slot in range(self.nodes_count, len(roster)):
            by_slot[slot] = by_slot[0].model_copy(update={"slot": slot})
        named = tuple(SlotHash(slot=slot, hash=record.hash) for slot, record in by_slot.items())
        closing = CommitmentSet(run=spec.run_id, round=ROUND, plan=self.plan.hash, commitments=named)
        self.commitments = Commitments(closing, by_slot)

    def mean(self, part: int, *slots: int) -> bytes:
        """The encoded average that a reducer has to come to, computed without one."""
        encoded = [(slot, _encoded_parts(self.spec, slot)[part]) for slot in slots]
        decoded = ((slot, WEIGHTS[slot], parts.decode_part(self.spec, part, data)) for slot, data in encoded)
        return codec.get(self.spec.exchange.codec).encode(aggregate.mean(decoded))

    @property
    def posted(self) -> list[Envelope]:
        return self.coordinator.posted

    async def published(self, count: int) -> dict[int, tuple[bytes, PartRecord]]:
        """Once `count` records were posted: by part, who signed and what."""
        async with asyncio.timeout(20), self.coordinator.news:
            await self.coordinator.news.wait_for(lambda: len(self.posted) >= count)
        records = [(envelope.key, envelope.open_as(PartRecord, run=self.spec.run_id)) for envelope in self.posted]
        return {record.part: (key, record) for key, record in records}

    def worker(self) -> Selecting:
        """The checkpoint worker's part in the sketches, with a ledger that outlives it."""
        worker = self.swarm.worker
        if self._worker_ledger is None:
            self._worker_ledger = SigningLedger(self._folder / "worker.db", worker.identity)
        store = Store(self._folder / "store")
        client = cast(CoordinatorClient, self.coordinator)
        return Selecting(client, worker, store, self._worker_ledger, self.plan, self.commitments)

    def close(self) -> None:
        for node in self.nodes:
            node.ledger.close()
        if self._worker_ledger is not None:
            self._worker_ledger.close()

    @property
    def sketch_set(self) -> SketchSet:
        (envelope,) = self.coordinator.sketch_sets
        return envelope.open_as(SketchSet, run=self.spec.run_id, key=self.swarm.worker.identity.public_key)

    def selected_mean(self, part: int, *left_out: int) -> bytes:
        """The encoded average of the slots that the sketch set selects, but for some, with its weights."""
        weights = {one.slot: one.weight for one in self.sketch_set.selected if one.slot not in left_out}
        encoded = {slot: self.nodes[slot].mine.part(part) for slot in weights}
        decoded = [(slot, weights[slot], parts.decode_part(self.spec, part, data)) for slot, data in encoded.items()]
        return codec.get(self.spec.exchange.codec).encode(aggregate.mean(decoded))

    def go(self, *senders: int, until: Callable[[], Awaitable[T]], worker: bool = False) -> T:
        """All nodes take part, the senders with their contributions, until something has happened.

        With `worker` the checkpoint worker closes the sketches.
        """
        umpire = [self.worker()] if worker else []

        async def main() -> T:
            closing = [asyncio.create_task(one.close()) for one in umpire]
            opened = [node.exchange() for node in self.nodes]
            for node, exchange in zip(self.nodes, opened, strict=True):
                await node.desk.open(exchange)
            running = [
                asyncio.create_task(exchange.run(node.mine if node.slot in senders else None))
                for node, exchange in zip(self.nodes, opened, strict=True)
            ]
            try:
                return await until()
            finally:
                for task in [*running, *closing]:
                    task.cancel()
                await asyncio.gather(*closing, return_exceptions=True)
                outcomes = await asyncio.gather(*running, return_exceptions=True)
                assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes), outcomes
                for node in self.nodes:
                    await node.desk.open(None)

        return self.swarm.run(main())

    def exchange_everything(self) -> dict[int, tuple[bytes, PartRecord]]:
        return self.go(*range(self.nodes_count), until=lambda: self.published(PARTS))

    def sealed(self, published: dict[int, tuple[bytes, PartRecord]]) -> SealedRound:
        names = tuple(published[part][1].hash if part in published else None for part in range(PARTS))
        manifest = RoundManifest(
            run=self.spec.run_id,
            round=ROUND,
            plan=self.plan.hash,
            commitment_set=self.commitments.closing.hash,
            parts=names,
            base=bytes(32),
            root=bytes(32),
        )
        named = {record.hash: (record, key) for key, record in published.values()}
        return SealedRound(manifest, named, checkpoint_manifest(self.spec, ROUND + 1, manifest.root, manifest.base))


@pytest.fixture
def begin(swarm: Swarm, tmp_path: Path) -> Iterator[Callable[..., Round]]:
    """`begin(codec_name="int4", exchange_s=60.0, ghost=False)` closes the commitments of a round among three nodes."""
    yield from _rounds(swarm, tmp_path)


@pytest.fixture
def begin_crowded(crowd: Swarm, tmp_path: Path) -> Iterator[Callable[..., Round]]:
    """`begin` among eight nodes."""
    yield from _rounds(crowd, tmp_path)


def _rounds(swarm: Swarm, tmp_path: Path) -> Iterator[Callable[..., Round]]:
    rounds: list[Round] = []

    def make(
        codec_name: codec.Name = "int4",
        exchange_s: float = 60.0,
        *,
        ghost: bool = False,
        aggregator: aggregate.Name = "multi_krum",
    ) -> Round:
        folder = tmp_path / f"round-{len(rounds)}"
        rounds.append(Round(swarm, folder, _run_spec(codec_name, exchange_s, aggregator), ghost=ghost))
        return rounds[-1]

    yield make
    for made in rounds:
        made.close()
