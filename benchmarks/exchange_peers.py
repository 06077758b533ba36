"""One peer of the benchmark of our exchange: a process with a real peer plane, signing ledger and disk.

The parent stands for the coordinator: it collects commitments and part records and passes them on, never a tensor.
"""

from __future__ import annotations

import asyncio
import resource
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from exchange_rivals import values

from swarm_node.contribution import Contribution
from swarm_node.evidence import Evidence
from swarm_node.exchange import Exchange, ExchangeDesk, fetch_averages
from swarm_node.folder import RunFolder
from swarm_protocol import chunks, codec, draw, parts, processes
from swarm_protocol import checkpoint as checkpoints
from swarm_protocol.chunks import StateManifest
from swarm_protocol.client import Commitments, SealedRound
from swarm_protocol.files import write_atomic
from swarm_protocol.identity import Identity
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
        exchange=ExchangeSpec(codec=codec_name, parts=part_count),
        outer=OuterSpec(),
        rounds=RoundsSpec(exchange_s=60.0),
        audit=AuditSpec(),
    )


def peer(pipe: Connection, parent: int, number: int, folder: Path, bootstrap: list[str]) -> None:
    """The process."""
    processes.die_with_parent(parent)
    asyncio.run(_peer(pipe, number, folder, bootstrap))


async def _peer(pipe: Connection, number: int, folder: Path, bootstrap: list[str]) -> None:
    folder.mkdir(parents=True)
    identity = Identity.load_or_create(folder / "identity")
    plane = await PeerPlane.start(folder / "identity", bytes(32), initial_peers=bootstrap)
    evidence, desk = Evidence(), ExchangeDesk()
    await plane.serve({**evidence.handlers, **desk.handlers})
    pipe.send((identity.public_key, await plane.addresses()))
    try:
        with SigningLedger(folder / "signed.db", identity) as ledger:
            while (message := await asyncio.to_thread(pipe.recv)) is not None:
                node = _Node(pipe, number, folder, plane, ledger, evidence, desk)
                await node.round(*message)
    finally:
        await plane.close()


class _Node:
    """One round of one peer."""

    def __init__(
        self, pipe: Connection, number: int, folder: Path, plane: PeerPlane, ledger: SigningLedger,
        evidence: Evidence, desk: ExchangeDesk,
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
        work = RunFolder(self._folder / spec.exchange.codec, spec)
        slot = plan.slot_of(self._plane.identity.public_key)
        assert slot is not None
        idle, reset = _resident(), Path("/proc/self/clear_refs")
        reset.write_text("5")  # the peak from here on
        self._pipe.send("ready")
        await asyncio.to_thread(self._pipe.recv)
        start, cpu = time.monotonic(), _cpu_s()
        mine = await asyncio.to_thread(self._encode, spec, plan, slot, tensor, work.work(plan.round))
        encoded_at = time.monotonic()
        self._pipe.send(mine.commitment(spec, plan, bytes(32)))
        closing, by_slot = await asyncio.to_thread(self._pipe.recv)
        exchange = Exchange(
            spec, plan, Commitments(closing, by_slot), plane=self._plane, ledger=self._ledger, folder=work,
            evidence=self._evidence, post=self._post,
        )  # fmt: skip
        await self._desk.open(exchange)
        moving = asyncio.create_task(exchange.run(mine))
        records = [Envelope.decode(raw) for raw in await asyncio.to_thread(self._pipe.recv)]
        reduced_at = time.monotonic()
        averages = await fetch_averages(
            spec, _sealed(spec, plan, closing, records), plane=self._plane, client=None, evidence=self._evidence
        )
        fetched_at = time.monotonic()
        whole = np.empty(spec.model.num_parameters, np.float32)
        for part, where in enumerate(parts.slices(spec)):
            whole[where] = checkpoints.decode_average(spec, part, averages[part])
            averages[part] = None
        end = time.monotonic()
        peak = _peak()
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)
        await self._desk.open(None)
        stages = {"encode": encoded_at - start, "reduce": reduced_at - encoded_at, "fetch": fetched_at - reduced_at,
                  "decode": end - fetched_at}  # fmt: skip
        self._pipe.send((start, end, chunks.content_hash(whole), peak - idle, _cpu_s() - cpu, stages))

    def _encode(self, spec: RunSpec, plan: RoundPlan, slot: int, tensor: Any, folder: Path) -> Contribution:
        encode = codec.get(spec.exchange.codec).encode
        hashes = []
        for part, where in enumerate(parts.slices(spec)):
            encoded = encode(tensor[where])
            hashes.append(chunks.content_hash(encoded))
            write_atomic(folder / f"part-{part}", encoded, durable=False)
        empty = StateManifest(0, ())
        return Contribution(plan.hash, slot, bytes(32), 0.0, (), empty, tuple(hashes), folder)

    async def _post(self, envelope: Envelope) -> None:
        self._pipe.send(envelope.encode())


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
    return SealedRound(manifest, found)


def close(plan: RoundPlan, commitments: dict[int, Commitment]) -> CommitmentSet:
    """The commitment set over all of these."""
    entries = tuple(SlotHash(slot=slot, hash=commitments[slot].hash) for slot in sorted(commitments))
    return CommitmentSet(run=plan.run, round=plan.round, plan=plan.hash, commitments=entries)


def nonce_hash() -> bytes:
    return draw.nonce_hash(bytes(32))


def _resident() -> int:
    return psutil.Process().memory_info().rss


def _peak() -> int:
    """The peak of resident memory since it was reset, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu_s() -> float:
    """Processor time of this peer, its daemon included."""
    times = [process.cpu_times() for process in (psutil.Process(), *psutil.Process().children(recursive=True))]
    return sum(time.user + time.system for time in times)
