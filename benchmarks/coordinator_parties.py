"""Synthetic parties for a real coordinator: real keys, real signed records, no training.

Nodes register, send heartbeats, long-poll, commit, reduce and open nonces; a checkpoint worker and auditors do what their
office asks for. Each has one connection (`coordinator_connection`). What depends on nothing that
the coordinator says is signed before the clock starts. The averages, roots and verdicts are made up: nobody looks at them.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from coordinator_connection import Answer, Connection

from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.store import Store
from swarm_protocol import PROTOCOL_VERSION, parts
from swarm_protocol.draw import chain_end, nonce_hash
from swarm_protocol.encoding import decode
from swarm_protocol.identity import Identity
from swarm_protocol.records import (
    CheckpointReport,
    Commitment,
    CommitmentSet,
    Comparison,
    Envelope,
    Evaluation,
    NonceOpening,
    Outcome,
    PartHeld,
    PartRecord,
    PartVerdict,
    Ready,
    Record,
    Registration,
    RoundPlan,
    Verdict,
    decode_list,
)
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

TIMEOUT_S = 30.0
MAX_LIST_BYTES = 64 << 20
REDUCERS = 16
AUDITORS = 2
FINGERPRINT = b"f" * 32
CONNECTION_ERRORS = (OSError, EOFError, TimeoutError, ValueError)


@dataclass(frozen=True)
class Shape:
    """A run's size, and its times as they pass on this machine, in seconds."""

    nodes: int
    slots: int
    rounds: int
    parts: int = 8
    presence_s: float = 30.0
    assemble_s: float = 5.0
    train_s: float = 40.0
    exchange_s: float = 10.0
    open_s: float = 10.0
    spread: float = 0.5
    audited: float = 0.02
    joins_per_s: float = 200.0

    @property
    def heartbeat_s(self) -> float:
        return self.presence_s / 3


def key(name: str, number: int = 0) -> Identity:
    """A key that is the same in every run of this script."""
    return Identity.from_seed(blake3(f"{name} {number}".encode()).digest())


def make_run(folder: Path, shape: Shape, database: str | None = None) -> RunSpec:
    """Write a run directory for a model that is next to nothing, with its database at this URL, or in it."""
    home = RunDirectory(folder)
    coordinator = key("coordinator")
    coordinator.save(home.coordinator_key)
    if database is not None:
        home.config_file.write_text(f"[database]\nurl = {json.dumps(database)}\n")
    key("worker").save(home.worker_key)
    for number in range(AUDITORS):
        key("auditor", number).save(home.auditor_key(number))
    seed = blake3(b"beacon").digest()
    home.beacon_seed_file.write_bytes(seed)
    model = ModelSpec(
        vocab_size=256,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=8,
    )
    state = np.zeros(2 * model.num_parameters, dtype=np.float32)
    spec = RunSpec(
        name="load",
        seed=7,
        numerics="native",
        coordinator=coordinator.public_key.hex(),
        checkpoint=Store(home.objects).put_state(state).root.hex(),
        beacon=chain_end(seed, shape.rounds).hex(),
        model=model,
        data=DataSpec(root="00" * 32, tokenizer="bytes", train_tokens=1000, held_out_windows=4),
        training=TrainingSpec(batch_sequences=2, micro_sequences=2, steps=2, segment_steps=1),
        exchange=ExchangeSpec(parts=shape.parts, aggregator="mean"),
        outer=OuterSpec(),
        rounds=RoundsSpec(
            count=shape.rounds,
            min_nodes=shape.slots,
            max_nodes=shape.slots,
            presence_s=max(1.0, shape.presence_s),
            assemble_s=shape.assemble_s,
            train_s=max(1.0, shape.train_s),
            exchange_s=max(1.0, shape.exchange_s),
            open_s=shape.open_s,
        ),
        audit=AuditSpec(probation=0, floor=shape.audited, budget=max(shape.audited, 1e-6), reductions=0.05),
    )
    home.spec_file.write_bytes(spec.encode())
    return spec


class Meter:
    """What was measured, in seconds: answers that did not wait, by kind, and wake-ups of those who waited."""

    def __init__(self) -> None:
        self.answers: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
        self.wakes: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
        self.expired = array("d")
        self.errors: Counter[str] = Counter()
        self.requests = 0


@dataclass
class Document:
    """What a long-poll found: when the first answer with it came, and what it says, once somebody read it."""

    first_s: float
    value: Any = None


@dataclass
class Swarm:
    """What the parties share. `persistent` parties try again until there is an answer, and see every body."""

    spec: RunSpec
    shape: Shape
    host: str
    port: int
    persistent: bool = False
    meter: Meter = field(default_factory=Meter)
    documents: dict[str, Document] = field(default_factory=dict)
    acknowledged: Callable[[Envelope, dict[str, Any]], None] | None = None
    received: Callable[[list[Envelope]], None] | None = None
    progress: Counter[str] = field(default_factory=Counter)

    @property
    def run(self) -> bytes:
        return self.spec.run_id

    def root(self, round_number: int) -> bytes:
        """The checkpoint that a round starts from."""
        return blake3(b"root %d" % round_number).digest() if round_number else bytes.fromhex(self.spec.checkpoint)

    def plan(self, round_number: int) -> tuple[RoundPlan, dict[bytes, int]]:
        """A round's plan, and the slots by key."""
        found: tuple[RoundPlan, dict[bytes, int]] = self.documents[f"plan:{round_number}"].value
        return found

    def closing(self, round_number: int) -> CommitmentSet:
        found: CommitmentSet = self.documents[f"commitments:{round_number}"].value
        return found

    def reducer_of(self, round_number: int, part: int) -> int:
        """The slot that averages a part: reducers that committed, in turn."""
        plan, _ = self.plan(round_number)
        able = [one.slot for one in self.closing(round_number).commitments if plan.roster[one.slot].reducer]
        return able[part % len(able)] if able else -1


def parsed(topic: str, body: bytes) -> tuple[Any, list[Envelope]]:
    """What an answer says, as parties use it, and the records in it."""
    kind = topic.split(":")[0]
    if kind in ("plan", "beacon"):
        envelope = Envelope.decode(body)
        record = envelope.open()
        if isinstance(record, RoundPlan):
            return (record, {seat.peer: slot for slot, seat in enumerate(record.roster)}), [envelope]
        return record, [envelope]
    if kind == "sealing":
        return decode(body, max_bytes=MAX_LIST_BYTES), []
    envelopes = decode_list(body, max_bytes=MAX_LIST_BYTES)
    if kind == "part-records":
        return [one.open() for one in envelopes], envelopes
    return envelopes[0].open(), envelopes


class Party:
    """A key, a connection, and requests that are measured."""

    def __init__(self, swarm: Swarm, identity: Identity) -> None:
        self.swarm = swarm
        self.identity = identity
        self.connection = Connection(swarm.host, swarm.port)
        self._path = f"/v1/runs/{swarm.run.hex()}"

    async def call(
        self, method: str, path: str, body: bytes = b"", wait_s: float = 0.0, topic: str = ""
    ) -> Answer | None:
        """An answer, or None for an error, which is counted; a persistent party has none of these."""
        swarm, pause_s = self.swarm, 0.02

        def want() -> bool:
            known = swarm.documents.get(topic)
            return swarm.persistent or known is None or known.value is None

        while True:
            swarm.meter.requests += 1
            try:
                return await self.connection.request(method, self._path + path, body, wait_s + TIMEOUT_S, want)
            except CONNECTION_ERRORS as error:
                if not swarm.persistent:
                    swarm.meter.errors[type(error).__name__] += 1
                    return None
                await asyncio.sleep(pause_s)
                pause_s = min(0.5, 2 * pause_s)

    async def post(self, record: Record | bytes, kind: str) -> bool:
        """Hand in a record, or an encoded Envelope that was signed ahead; whether it was accepted."""
        data = record if isinstance(record, bytes) else Envelope.sign(self.identity, record).encode()
        answer = await self.call("POST", "/records", data)
        if answer is None:
            return False
        if answer.status not in (200, 201):
            self._refused(kind, answer)
            return False
        self.swarm.meter.answers[kind].append(answer.ended_s - answer.began_s)
        if self.swarm.acknowledged is not None:
            self.swarm.acknowledged(Envelope.decode(data), json.loads(answer.body))
        return True

    async def ask(self, path: str, kind: str) -> Any:
        """JSON that is there at once; None for an error."""
        answer = await self.call("GET", path)
        if answer is None or answer.status != 200:
            if answer is not None:
                self._refused(kind, answer)
            return None
        self.swarm.meter.answers[kind].append(answer.ended_s - answer.began_s)
        return json.loads(answer.body)

    async def poll(self, kind: str, round_number: int, wait_s: float, suffix: str = "") -> Any:
        """What a round's document says; None if it is not there within `wait_s`."""
        topic = f"{kind}:{round_number}{suffix}"
        path = f"/rounds/{round_number}/{kind}?wait_s={wait_s:.3f}{suffix}"
        answer = await self.call("GET", path, wait_s=wait_s, topic=topic)
        meter = self.swarm.meter
        if answer is None:
            await asyncio.sleep(0.1)
            return None
        if answer.status == 204:
            meter.expired.append(max(0.0, answer.ended_s - answer.began_s - wait_s))
            return None
        if answer.status != 200:
            self._refused(kind, answer)
            await asyncio.sleep(0.1)
            return None
        document = self.swarm.documents.get(topic)
        if document is None:
            document = self.swarm.documents[topic] = Document(answer.ended_s)
        elif answer.began_s < document.first_s:
            meter.wakes[kind].append(answer.ended_s - document.first_s)
        else:
            meter.answers[f"get {kind}"].append(answer.ended_s - answer.began_s)
        if answer.body and (document.value is None or self.swarm.persistent):
            document.value, envelopes = parsed(topic, answer.body)
            if self.swarm.received is not None:
                self.swarm.received(envelopes)
        return document.value

    async def until(self, kind: str, round_number: int, suffix: str = "") -> Any:
        """Long-poll until it is there."""
        while (found := await self.poll(kind, round_number, 10.0, suffix)) is None:
            pass
        return found

    def _refused(self, kind: str, answer: Answer) -> None:
        try:
            code = json.loads(answer.body)["code"]
        except (ValueError, KeyError):
            code = "?"
        self.swarm.meter.errors[f"{kind} {answer.status} {code}"] += 1


Action = tuple[float, Callable[[], Awaitable[object]]]


class Node(Party):
    """A volunteer that trains nothing."""

    def __init__(self, swarm: Swarm, number: int) -> None:
        super().__init__(swarm, key("node", number))
        shape = swarm.shape
        self.key = self.identity.public_key
        self.number = number
        self._chance = random.Random(number)
        self._sequence = 0
        self._heartbeats: dict[int, list[bytes]] = {}
        self._beat_at_s = 0.0
        self._registration = Envelope.sign(
            self.identity,
            Registration(
                run=swarm.run,
                round=0,
                protocol=PROTOCOL_VERSION,
                name=f"node-{number}",
                agent="load",
                device="cpu",
                fingerprint=FINGERPRINT,
            ),
        ).encode()
        beats = 2 + round((shape.train_s + shape.exchange_s + shape.open_s) / shape.heartbeat_s)
        for round_number in range(shape.rounds):
            self._heartbeats[round_number] = [self._sign_ready(round_number) for _ in range(beats)]

    def _sign_ready(self, round_number: int) -> bytes:
        self._sequence += 1
        record = Ready(
            run=self.swarm.run,
            round=round_number,
            sequence=self._sequence,
            base=self.swarm.root(round_number),
            tokens_per_s=1000.0,
            can_reduce=self.number < REDUCERS,
            upload_bytes_per_s=1 << 20,
        )
        return Envelope.sign(self.identity, record).encode()

    async def run(self) -> None:
        shape = self.swarm.shape
        await asyncio.sleep(self.number / shape.joins_per_s)
        await self.post(self._registration, "registration")
        self.swarm.progress["registered"] += 1
        await self._beat(0)
        for number in range(shape.rounds):
            await self._round(number)
            self.swarm.progress[f"round {number}"] += 1
        self.connection.close()

    async def _round(self, number: int) -> None:
        swarm, shape = self.swarm, self.swarm.shape
        await self._follow("plan", number, [])
        plan, slots = swarm.plan(number)
        slot = slots.get(self.key)
        todo: list[Action] = []
        if slot is not None:
            commitment = self._commitment(plan, slot)
            due_s = time.monotonic() + self._chance.uniform(0.1, 0.85) * shape.train_s
            todo.append((due_s, lambda: self.post(commitment, "commitment")))
        await self._follow("commitments", number, todo)
        if slot is not None:
            for part in range(parts.part_count(swarm.spec)):
                if swarm.reducer_of(number, part) == slot:
                    await self.post(self._part_record(number, part), "part-record")
        await self._follow("manifest", number, [])
        todo = []
        if slot is not None and any(one.slot == slot for one in swarm.closing(number).commitments):
            opening = NonceOpening(run=swarm.run, round=number, slot=slot, nonce=self._nonce(number))
            signed = Envelope.sign(self.identity, opening).encode()
            delay_s = self._chance.uniform(0.0, shape.spread) * shape.open_s
            todo.append((time.monotonic() + delay_s, lambda: self.post(signed, "opening")))
        if number + 1 < shape.rounds:
            delay_s = self._chance.uniform(0.0, shape.spread) * shape.open_s
            self._beat_at_s = time.monotonic() + delay_s
        await self._follow("beacon", number, todo, beats_for=number + 1)

    async def _follow(self, kind: str, number: int, todo: list[Action], beats_for: int | None = None) -> None:
        """Long-poll until it is there; meanwhile, and to the end, do what is due, and send heartbeats."""
        target = number if beats_for is None else beats_for
        there = False
        todo.sort(key=lambda action: action[0])
        while not there or (todo and kind == "beacon"):
            now_s = time.monotonic()
            if todo and todo[0][0] <= now_s:
                await todo.pop(0)[1]()
                continue
            if target < self.swarm.shape.rounds and self._beat_at_s <= now_s:
                await self._beat(target)
                continue
            next_s = min([self._beat_at_s, *(at for at, _ in todo)]) if target < self.swarm.shape.rounds else now_s + 10
            next_s = min([next_s, *(at for at, _ in todo[:1])])
            if there:
                await asyncio.sleep(max(0.0, next_s - now_s))
                continue
            there = await self.poll(kind, number, min(20.0, max(0.02, next_s - now_s))) is not None

    async def _beat(self, round_number: int) -> None:
        self._beat_at_s = time.monotonic() + self.swarm.shape.heartbeat_s * self._chance.uniform(0.9, 1.1)
        ahead = self._heartbeats.get(round_number)
        await self.post(ahead.pop(0) if ahead else self._sign_ready(round_number), "heartbeat")

    def _nonce(self, round_number: int) -> bytes:
        return blake3(self.key + b"nonce %d" % round_number).digest()

    def _commitment(self, plan: RoundPlan, slot: int) -> Commitment:
        return Commitment(
            run=self.swarm.run,
            round=plan.round,
            plan=plan.hash,
            slot=slot,
            tokens=plan.roster[slot].steps * self.swarm.spec.tokens_per_step,
            trace_root=self.key,
            parts_root=self.key,
            nonce_hash=nonce_hash(self._nonce(plan.round)),
            fingerprint=FINGERPRINT,
            train_loss=5.5,
        )

    def _part_record(self, number: int, part: int) -> PartRecord:
        closing = self.swarm.closing(number)
        return PartRecord(
            run=self.swarm.run,
            round=number,
            sequence=part,
            part=part,
            commitment_set=closing.hash,
            result=blake3(b"average %d %d" % (number, part)).digest(),
            size_bytes=parts.encoded_part_bytes(self.swarm.spec, part),
            slots=tuple(one.slot for one in closing.commitments),
        )


class Worker(Party):
    """A checkpoint worker that holds whatever is published, and makes up roots."""

    def __init__(self, swarm: Swarm) -> None:
        super().__init__(swarm, key("worker"))
        self._held = 0

    async def run(self) -> None:
        await self._evaluate(0)
        for number in range(self.swarm.shape.rounds):
            await self.until("plan", number)
            await self.until("commitments", number)
            await self._hold(number)
            chosen = await self.until("sealing", number)
            plan, _ = self.swarm.plan(number)
            root = self.swarm.root(number + 1)
            report = CheckpointReport(run=self.swarm.run, round=number, base=plan.base, parts=tuple(chosen), root=root)
            await self.post(report, "report")
            await self.until("manifest", number)
            await self._evaluate(number + 1)
        self.connection.close()

    async def _hold(self, number: int) -> None:
        """Say of every part record that its bytes are held, until the exchange is closed."""
        seen: set[bytes] = set()
        after = 0
        while await self.poll("sealing", number, 0.0) is None:
            found = await self.poll("part-records", number, 1.0, f"&after={after}")
            for record in found or []:
                after += 1
                if record.hash not in seen:
                    seen.add(record.hash)
                    self._held += 1
                    held = PartHeld(run=self.swarm.run, round=number, sequence=self._held, part_record=record.hash)
                    await self.post(held, "held")

    async def _evaluate(self, number: int) -> None:
        root = self.swarm.root(number)
        await self.post(Evaluation(run=self.swarm.run, round=number, root=root, loss=5.0, tokens=512), "evaluation")


class Auditor(Party):
    """An auditor that accepts everything when it is its turn. Until cancelled."""

    def __init__(self, swarm: Swarm, number: int) -> None:
        super().__init__(swarm, key("auditor", number))

    async def run(self) -> None:
        mine = self.identity.public_key.hex()
        while True:
            answer = await self.call("GET", f"/audits?auditor={mine}&wait_s=10", wait_s=10)
            found = json.loads(answer.body) if answer is not None and answer.status == 200 else []
            turns = [audit for audit in found if audit["turn"] == mine]
            for audit in turns:
                await self.post(self._verdict(audit), "verdict")
            if found and not turns:
                await asyncio.sleep(0.5)

    def _verdict(self, audit: dict[str, Any]) -> Record:
        run, audited, part = self.swarm.run, bytes.fromhex(audit["audited"]), audit["part"]
        if part is not None:
            return PartVerdict(
                run=run, round=audit["round"], sequence=part, part=part, slot=audit["slot"], part_record=audited,
                outcome=Outcome.ACCEPTED, reason="equal",
            )  # fmt: skip
        return Verdict(
            run=run, round=audit["round"], sequence=audit["slot"], slot=audit["slot"], commitment=audited,
            outcome=Outcome.ACCEPTED, comparison=Comparison.EQUAL, statistic=0.0, reason="equal", steps_replayed=1,
            fingerprint=FINGERPRINT,
        )  # fmt: skip


async def play(swarm: Swarm, nodes: list[Node], *beside: Coroutine[Any, Any, None], timeout_s: float) -> None:
    """Let everybody take part until the last round's beacon; `beside` and the auditors run until then.

    Raises:
        TimeoutError: the run did not end in time.
    """
    others = [asyncio.create_task(one) for one in beside]
    others += [asyncio.create_task(Auditor(swarm, number).run()) for number in range(AUDITORS)]
    try:
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as tasks:
            tasks.create_task(Worker(swarm).run())
            for node in nodes:
                tasks.create_task(node.run())
    finally:
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
