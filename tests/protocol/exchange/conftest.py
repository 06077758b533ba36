"""Rounds among real peers on loopback, whose contributions and commitments are made by hand."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import pytest

from swarm_node.contribution import Contribution
from swarm_node.evidence import Evidence
from swarm_node.exchange import Exchange, ExchangeDesk
from swarm_node.folder import RunFolder
from swarm_protocol import aggregate, chunks, codec, parts
from swarm_protocol.client import Commitments, CoordinatorClient, SealedRound
from swarm_protocol.errors import HashMismatchError
from swarm_protocol.files import write_atomic
from swarm_protocol.identity import Identity
from swarm_protocol.peers import Answer, Call, Handler, PeerPlane
from swarm_protocol.records import (
    CommitmentSet,
    Envelope,
    PartReceipt,
    PartRecord,
    RoundManifest,
    RoundPlan,
    Seat,
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
PARTS = 3
ROUND = 2
WEIGHTS = [1000, 500, 250, 125]
ZERO = "0" * 64


def _run_spec(codec_name: codec.Name, exchange_s: float) -> RunSpec:
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
        exchange=ExchangeSpec(parts=PARTS, codec=codec_name),
        outer=OuterSpec(),
        rounds=RoundsSpec(exchange_s=exchange_s),
        audit=AuditSpec(),
    )


class Swarm:
    """Planes that know each other, on one event loop; what they serve changes with the test."""

    def __init__(self, runner: asyncio.Runner, folder: Path) -> None:
        self.run = runner.run
        self.served: dict[bytes, dict[str, Handler]] = {}
        self.planes = [self.run(self._start(folder / str(number))) for number in range(NODES)]
        self.planes.sort(key=lambda plane: plane.identity.peer_id)
        addresses = [self.run(plane.addresses())[0] for plane in self.planes]
        for plane in self.planes:
            self.run(plane.dial([address for address in addresses if plane.identity.peer_id not in address]))

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
        made = Swarm(runner, tmp_path_factory.mktemp("identities"))
        yield made
        for plane in made.planes:
            runner.run(plane.close())
        gc.collect()  # while there is a loop to close sockets on


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
        encoded = _encoded_parts(round.spec, slot)
        self.mine = Contribution(
            plan_hash=round.plan.hash,
            slot=slot,
            nonce=bytes([slot]) * 32,
            loss=5.0,
            state_roots=(bytes(32),),
            final_manifest=chunks.manifest_of(b""),
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
        )

    def receipts(self) -> list[PartReceipt]:
        """What reducers signed for our parts, as it lies on disk."""
        path, found = self._folder.work(ROUND) / "receipts", []
        raw = path.read_bytes() if path.exists() else b""
        while raw:
            size = int.from_bytes(raw[1:3], "big") if raw[0] == 0x59 else raw[1]
            start = 3 if raw[0] == 0x59 else 2
            found.append(Envelope.decode(raw[start : start + size]).open_as(PartReceipt, run=self.round.spec.run_id))
            raw = raw[start + size :]
        return found


class Coordinator:
    """What nodes ask of the coordinator during an exchange: part records, and chunks as a last source."""

    def __init__(self) -> None:
        self.posted: list[Envelope] = []
        self.blobs: dict[bytes, bytes] = {}
        self.asked = 0
        self.news = asyncio.Condition()

    async def post(self, envelope: Envelope) -> None:
        async with self.news:
            self.posted.append(envelope)
            self.news.notify_all()

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
        self.swarm, self.spec = swarm, spec
        self.coordinator = Coordinator()
        keys = [plane.identity.public_key for plane in swarm.planes]
        if ghost:
            keys.append(Identity.from_seed(bytes([99]) * 32).public_key)
        roster = tuple(Seat(peer=key, steps=1, weight=WEIGHTS[slot], reducer=True) for slot, key in enumerate(keys))
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
        for slot in range(NODES, len(roster)):
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

    def go(self, *senders: int, until: Callable[[], Awaitable[T]]) -> T:
        """All nodes take part, the senders with their contributions, until something has happened."""

        async def main() -> T:
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
                for task in running:
                    task.cancel()
                outcomes = await asyncio.gather(*running, return_exceptions=True)
                assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes), outcomes
                for node in self.nodes:
                    await node.desk.open(None)

        return self.swarm.run(main())

    def exchange_everything(self) -> dict[int, tuple[bytes, PartRecord]]:
        return self.go(*range(NODES), until=lambda: self.published(PARTS))

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
        return SealedRound(manifest, {record.hash: (record, key) for key, record in published.values()})


@pytest.fixture
def begin(swarm: Swarm, tmp_path: Path) -> Iterator[Callable[..., Round]]:
    """`begin(codec_name="int4", exchange_s=60.0, ghost=False)` closes the commitments of a round among three nodes."""
    rounds: list[Round] = []

    def make(codec_name: codec.Name = "int4", exchange_s: float = 60.0, *, ghost: bool = False) -> Round:
        folder = tmp_path / f"round-{len(rounds)}"
        rounds.append(Round(swarm, folder, _run_spec(codec_name, exchange_s), ghost=ghost))
        return rounds[-1]

    yield make
    for made in rounds:
        for node in made.nodes:
            node.ledger.close()
