"""One peer of the benchmark of our exchange: a process with a real peer plane, signing ledger and disk.

The parent stands for the coordinator: it collects commitments and part records and passes them on, never a tensor.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import resource
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import psutil
from exchange_rivals import cpu_s, values

from swarm_node.contribution import Contribution
from swarm_node.evidence import Evidence
from swarm_node.exchange import Exchange, ExchangeDesk
from swarm_node.folder import RunFolder
from swarm_node.measured import Measured
from swarm_protocol import chunks, codec, parts, processes
from swarm_protocol.client import Commitments, CoordinatorClient, SealedRound
from swarm_protocol.identity import Identity
from swarm_protocol.layout import checkpoint_manifest
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Commitment, CommitmentSet, Envelope, PartRecord, RoundManifest, RoundPlan, SlotHash
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

ZERO = "0" * 64
HIDDEN = 64


def run_spec(numel: int, codec_name: Any, part_count: int) -> RunSpec:
    """A run whose model has about `numel` parameters."""
    small = ModelSpec(vocab_size=2, hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=1)
    rows = max(2, (numel - small.num_parameters) // HIDDEN + 2)
    return RunSpec(
        name="exchange",
        seed=1,
        numerics="native",
        coordinator=ZERO,
        checkpoint=ZERO,
        beacon=ZERO,
        model=ModelSpec(vocab_size=rows, hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=1),
        data=DataSpec(root=ZERO, tokenizer="bytes", train_tokens=1, held_out_windows=1),
        training=TrainingSpec(),
        exchange=ExchangeSpec(codec=codec_name, parts=part_count, aggregator="mean"),
        outer=OuterSpec(),
        rounds=RoundsSpec(exchange_s=60.0),
        audit=AuditSpec(),
    )


def peer(pipe: Connection, parent: int, number: int, folder: Path, bootstrap: list[str], direct: bool) -> None:
    """The process."""
    processes.die_with_parent(parent)
    processes.reuse_freed_memory()
    folder.mkdir(parents=True)
    asyncio.run(_peer(pipe, number, folder, bootstrap, direct))


class Coordinator:
    """What a node asks of the coordinator during an exchange, over the pipe to the parent."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._records: list[Envelope] = []
        self._news = asyncio.Event()

    async def post(self, envelope: Envelope) -> None:
        self._pipe.send(envelope.encode())

    async def part_records(self, round_number: int, *, after: int, wait_s: float) -> list[Envelope]:
        while len(self._records) <= after:
            self._news.clear()
            await self._news.wait()
        return self._records[after:]

    async def listen(self) -> None:
        """Receive part records until the parent says that these were all."""
        while (raw := await asyncio.to_thread(self._pipe.recv)) is not None:
            self._records.append(Envelope.decode(raw))
            self._news.set()

    @property
    def records(self) -> list[Envelope]:
        return self._records


async def _peer(pipe: Connection, number: int, folder: Path, bootstrap: list[str], direct: bool) -> None:
    identity = Identity.load_or_create(folder / "identity")
    plane = await PeerPlane.start(folder / "identity", bytes(32), initial_peers=bootstrap, direct=direct)
    evidence, desk = OwnParts(), ExchangeDesk()
    await plane.serve({**evidence.handlers, **desk.handlers})
    gc.collect()
    gc.freeze()  # as `swarm-node join` does: the modules of torch and hivemind need no collecting
    pipe.send((identity.public_key, await plane.addresses()))
    try:
        with SigningLedger(folder / "signed.db", identity) as ledger:
            while (message := await asyncio.to_thread(pipe.recv)) is not None:
                node = _Node(pipe, number, folder, plane, ledger, evidence, desk)
                await node.round(*message)
    finally:
        await plane.close()


@dataclass(frozen=True)
class InMemory(Contribution):
    """A contribution that is not on disk: its encoded parts, or with the codec `none` what they are copies of."""

    tensor: npt.NDArray[np.float32]
    spec: RunSpec
    encoded: dict[int, bytes]

    def part(self, part: int) -> bytes:
        where = parts.slices(self.spec)[part]
        return self.encoded.get(part) or codec.get("none").encode(self.tensor[where])


class OwnParts(Evidence):
    """Evidence that has our own parts, too."""

    mine: InMemory | None = None

    def find(self, digest: bytes) -> bytes | bytearray | None:
        if self.mine is not None and digest in self.mine.part_hashes:
            return self.mine.part(self.mine.part_hashes.index(digest))
        return super().find(digest)

    def view(self, digest: bytes) -> memoryview | None:
        found = self.find(digest) if self.mine is not None and digest in self.mine.part_hashes else None
        return super().view(digest) if found is None else memoryview(found)


class _Node:
    """One round of one peer."""

    def __init__(
        self, pipe: Connection, number: int, folder: Path, plane: PeerPlane, ledger: SigningLedger,
        evidence: OwnParts, desk: ExchangeDesk,
    ) -> None:  # fmt: skip
        self._pipe = pipe
        self._number = number
        self._folder = folder
        self._plane = plane
        self._ledger = ledger
        self._evidence = evidence
        self._desk = desk

    async def round(self, spec: RunSpec, plan: RoundPlan) -> None:
        tensor = values(self._number, spec.model.num_parameters)
        _result(spec.model.num_parameters)
        idle = _idle(spec.model.num_parameters)
        work = RunFolder(self._folder / spec.exchange.codec, spec)
        self._evidence.forget(range(plan.round))  # not earlier: others may still fetch from us
        work.forget(range(plan.round))
        slot = plan.slot_of(self._plane.identity.public_key)
        assert slot is not None
        _forget_peak()
        self._pipe.send("ready")
        await asyncio.to_thread(self._pipe.recv)
        start, cpu = time.monotonic(), cpu_s()
        mine = await asyncio.to_thread(self._encode, spec, plan, slot, tensor)
        self._evidence.mine = mine
        encoded_at = time.monotonic()
        self._pipe.send(mine.commitment(spec, plan, bytes(32)))
        closing, by_slot = await asyncio.to_thread(self._pipe.recv)
        coordinator, measured = Coordinator(self._pipe), Measured()
        exchange = Exchange(
            spec, plan, Commitments(closing, by_slot), plane=self._plane, client=cast(CoordinatorClient, coordinator),
            ledger=self._ledger, folder=work, evidence=self._evidence, vector=_result(spec.model.num_parameters),
            measured=measured,
        )  # fmt: skip
        await self._desk.open(exchange)
        moving = asyncio.create_task(exchange.run(mine))
        await coordinator.listen()
        reduced_at = time.monotonic()
        await exchange.averages.complete.wait()
        whole = await exchange.averages.finish(_sealed(spec, plan, closing, coordinator.records))
        end = time.monotonic()
        peak, cpu = _peak(), cpu_s() - cpu
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)
        await self._desk.open(None)
        gc.collect()  # as a node does after its exchange
        stages = {"encode": encoded_at - start, "reduce": reduced_at - encoded_at, "fetch": end - reduced_at}
        self._pipe.send((start, end, chunks.content_hash(whole), peak - idle, cpu, stages))

    def _encode(self, spec: RunSpec, plan: RoundPlan, slot: int, tensor: Any) -> InMemory:
        """Encode everything once and hash it, as the commitment needs it."""
        encoded: dict[int, bytes] = {}
        hashes = []
        for part, where in enumerate(parts.slices(spec)):
            data = codec.get(spec.exchange.codec).encode(tensor[where])
            hashes.append(chunks.content_hash(data))
            if spec.exchange.codec != "none":
                encoded[part] = data
        return InMemory(
            plan_hash=plan.hash, slot=slot, nonce=bytes(32), loss=0.0, states=(),
            part_hashes=tuple(hashes), folder=Path(), tensor=tensor, spec=spec,
            encoded=encoded,
        )  # fmt: skip


def _sealed(spec: RunSpec, plan: RoundPlan, closing: CommitmentSet, envelopes: list[Envelope]) -> SealedRound:
    found = {}
    for envelope in envelopes:
        record = envelope.open_as(PartRecord, run=spec.run_id, round=plan.round)
        found[record.hash] = (record, envelope.key)
    by_part = {record.part: name for name, (record, _) in found.items()}
    manifest = RoundManifest(
        run=spec.run_id, round=plan.round, plan=plan.hash, commitment_set=closing.hash,
        parts=tuple(by_part[part] for part in range(parts.part_count(spec))), base=plan.base, root=bytes(32),
    )  # fmt: skip
    return SealedRound(manifest, found, checkpoint_manifest(spec, plan.round + 1, manifest.root, manifest.base))


def close(plan: RoundPlan, commitments: dict[int, Commitment]) -> CommitmentSet:
    """The commitment set over all of these."""
    entries = tuple(SlotHash(slot=slot, hash=commitments[slot].hash) for slot in sorted(commitments))
    return CommitmentSet(run=plan.run, round=plan.round, plan=plan.hash, commitments=entries)


@functools.lru_cache(maxsize=1)
def _result(numel: int) -> npt.NDArray[np.float32]:
    """What averages are decoded into; a node has one for all rounds, as hivemind has its averaged tensors."""
    return np.zeros(numel, np.float32) + np.float32(0)


@functools.lru_cache(maxsize=1)
def _idle(numel: int) -> int:
    """Resident bytes before the first exchange of this size, with the tensor and what averages are decoded into."""
    return int(psutil.Process().memory_info().rss)


def _forget_peak() -> None:
    """Let the peak of resident memory be the one from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The peak of resident memory since it was reset, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
