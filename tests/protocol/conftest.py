"""A run whose parties are written out by hand: real keys, real signed records, no training."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swarm_coordinator.db.archive import Archive, opened
from swarm_coordinator.db.tables import AuditRow, CreditRow, LedgerRow
from swarm_coordinator.journal import Journal
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.store import Store
from swarm_protocol import PROTOCOL_VERSION, aggregate, parts
from swarm_protocol.chunks import content_hash
from swarm_protocol.draw import chain_end, nonce_hash
from swarm_protocol.errors import RefusedError
from swarm_protocol.identity import Identity
from swarm_protocol.ledger import Balance
from swarm_protocol.records import (
    CheckpointReport,
    Commitment,
    CommitmentSet,
    Comparison,
    Envelope,
    Evaluation,
    Evidence,
    EvidenceItem,
    NonceOpening,
    Outcome,
    PartHeld,
    PartRecord,
    PartVerdict,
    Ready,
    Record,
    Registration,
    Role,
    RoundPlan,
    Verdict,
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

Api = Any
MODEL = ModelSpec(
    vocab_size=256,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    max_position_embeddings=8,
)
BEACON_SEED = bytes(range(32))


def identity(number: int) -> Identity:
    return Identity.from_seed(bytes([number]) * 32)


@dataclass
class Cast:
    """The parties of a run in `home`, what they sign, and the clock that they share with its coordinator."""

    home: RunDirectory
    spec: RunSpec
    nodes: list[Identity]
    worker: Identity
    auditors: list[Identity]
    now_ms: int = 1_800_000_000_000
    held: int = 0
    fingerprint: bytes = field(default=b"f" * 32)

    def clock(self) -> int:
        return self.now_ms

    @property
    def run(self) -> bytes:
        return self.spec.run_id

    def registration(self, node: Identity, sequence: int = 0, protocol: int = PROTOCOL_VERSION) -> Envelope:
        record = Registration(
            run=self.run,
            round=0,
            sequence=sequence,
            protocol=protocol,
            name=f"node-{node.peer_id[-4:]}",
            agent="tests",
            device="cpu",
            fingerprint=self.fingerprint,
        )
        return Envelope.sign(node, record)

    def ready(self, node: Identity, round_number: int, base: bytes, sequence: int = 0) -> Envelope:
        record = Ready(
            run=self.run,
            round=round_number,
            sequence=sequence,
            base=base,
            tokens_per_s=1000.0,
            can_reduce=True,
            upload_bytes_per_s=0,
        )
        return Envelope.sign(node, record)

    def commitment(self, plan: RoundPlan, slot: int, **changes: object) -> Envelope:
        record = Commitment(
            run=self.run,
            round=plan.round,
            plan=plan.hash,
            slot=slot,
            tokens=plan.roster[slot].steps * self.spec.tokens_per_step,
            trace_root=bytes([slot]) * 32,
            parts_root=bytes([slot]) * 32,
            nonce_hash=nonce_hash(self.nonce(slot)),
            fingerprint=self.fingerprint,
            train_loss=5.5,
        )
        return self.changed(self.holder(plan, slot), record, **changes)

    def part_record(self, plan: RoundPlan, closing: CommitmentSet, part: int, slot: int = 0) -> Envelope:
        record = PartRecord(
            run=self.run,
            round=plan.round,
            sequence=part,
            part=part,
            commitment_set=closing.hash,
            result=content_hash(self.average(plan.round, part)),
            size_bytes=parts.encoded_part_bytes(self.spec, part),
            slots=tuple(entry.slot for entry in closing.commitments),
        )
        return Envelope.sign(self.holder(plan, slot), record)

    def part_held(self, part_record: Envelope) -> Envelope:
        record = part_record.open()
        self.held += 1
        held = PartHeld(run=self.run, round=record.round, sequence=self.held, part_record=record.hash)
        return Envelope.sign(self.worker, held)

    def report(self, plan: RoundPlan, chosen: tuple[bytes | None, ...], root: bytes) -> Envelope:
        record = CheckpointReport(run=self.run, round=plan.round, base=plan.base, parts=chosen, root=root)
        return Envelope.sign(self.worker, record)

    def opening(self, plan: RoundPlan, slot: int, nonce: bytes | None = None) -> Envelope:
        record = NonceOpening(run=self.run, round=plan.round, slot=slot, nonce=nonce or self.nonce(slot))
        return Envelope.sign(self.holder(plan, slot), record)

    def verdict(self, auditor: Identity, commitment: Envelope, outcome: Outcome = Outcome.ACCEPTED) -> Envelope:
        committed = commitment.open_as(Commitment, run=self.run)
        record = Verdict(
            run=self.run,
            round=committed.round,
            sequence=committed.slot,
            slot=committed.slot,
            commitment=committed.hash,
            outcome=outcome,
            comparison=Comparison.EQUAL if outcome is Outcome.ACCEPTED else Comparison.OUTSIDE,
            statistic=0.0 if outcome is Outcome.ACCEPTED else 1.4,
            reason="the replay says so",
            steps_replayed=2,
            fingerprint=self.fingerprint,
        )
        return Envelope.sign(auditor, record)

    def evidence(self, auditor: Identity, audited: Envelope, *pieces: bytes, slot: int | None = None) -> Envelope:
        """What an auditor says that it judged by, of a commitment or, with the reducer's `slot`, of a part record."""
        judged = audited.open()
        part = judged.part if isinstance(judged, PartRecord) else None
        slot = judged.slot if isinstance(judged, Commitment) else slot
        assert slot is not None
        record = Evidence(
            run=self.run,
            round=judged.round,
            sequence=Evidence.sequence_of(slot, part),
            slot=slot,
            part=part,
            audited=judged.hash,
            segment=None if part is not None else 1,
            items=tuple(
                EvidenceItem(name=f"part-{number}", size_bytes=len(piece), chunks=(content_hash(piece),))
                for number, piece in enumerate(pieces)
            ),
        )
        return Envelope.sign(auditor, record)

    def part_verdict(
        self, auditor: Identity, part_record: Envelope, slot: int, outcome: Outcome = Outcome.ACCEPTED
    ) -> Envelope:
        judged = part_record.open_as(PartRecord, run=self.run)
        reason = "equal in every bit" if outcome is Outcome.ACCEPTED else f"wrong average of part {judged.part}"
        record = PartVerdict(
            run=self.run,
            round=judged.round,
            sequence=judged.part,
            part=judged.part,
            slot=slot,
            part_record=judged.hash,
            outcome=outcome,
            reason=reason,
        )
        return Envelope.sign(auditor, record)

    def evaluation(self, round_number: int, root: bytes, sample: str | None = None) -> Envelope:
        record = Evaluation(run=self.run, round=round_number, root=root, loss=5.4, tokens=512, sample=sample)
        return Envelope.sign(self.worker, record)

    def changed(self, signer: Identity, record: Record, **changes: object) -> Envelope:
        """The record with other fields; a copy would keep the old body."""
        return Envelope.sign(signer, type(record)(**{**record.model_dump(), **changes}))

    def holder(self, plan: RoundPlan, slot: int) -> Identity:
        return next(node for node in self.nodes if node.public_key == plan.roster[slot].peer)

    def nonce(self, slot: int) -> bytes:
        return bytes([100 + slot]) * 32

    def average(self, round_number: int, part: int) -> bytes:
        return bytes([round_number, part]) * 40


MakeCast = Callable[..., Cast]


def cast_in(
    root: Path,
    nodes: int = 2,
    rounds: int = 2,
    token: str | None = None,
    aggregator: aggregate.Name = "multi_krum",
    reductions: float = 0.0,
    url: str | None = None,
) -> Cast:
    """A run's directory, whose database is at `url` if that is given, and who takes part in it."""
    home = RunDirectory(root)
    coordinator, worker, auditors = identity(1), identity(2), [identity(3), identity(4)]
    coordinator.save(home.coordinator_key)
    worker.save(home.worker_key)
    for number, auditor in enumerate(auditors):
        auditor.save(home.auditor_key(number))
    home.beacon_seed_file.write_bytes(BEACON_SEED)
    if url is not None:
        home.config_file.write_text(f"[database]\nurl = {json.dumps(url)}\n")
    if token is not None:
        home.token_file.write_text(token)
    state = np.zeros(2 * MODEL.num_parameters, dtype=np.float32)
    spec = RunSpec(
        name="test",
        seed=7,
        numerics="native",
        coordinator=coordinator.public_key.hex(),
        checkpoint=Store(home.objects).put_state(state).root.hex(),
        beacon=chain_end(BEACON_SEED, rounds).hex(),
        model=MODEL,
        data=DataSpec(root="00" * 32, tokenizer="bytes", train_tokens=1000, held_out_windows=4),
        training=TrainingSpec(batch_sequences=80, micro_sequences=2, steps=2, segment_steps=1),
        exchange=ExchangeSpec(parts=2, aggregator=aggregator),
        outer=OuterSpec(),
        rounds=RoundsSpec(count=rounds, min_nodes=nodes, max_nodes=nodes, assemble_s=0.0),
        audit=AuditSpec(reductions=reductions),
    )
    home.spec_file.write_bytes(spec.encode())
    return Cast(home, spec, [identity(10 + number) for number in range(nodes)], worker, auditors)


@pytest.fixture
def make_cast(tmp_path: Path, request: pytest.FixtureRequest) -> MakeCast:
    """`make_cast(nodes=2, rounds=2, token=None, ...)`: a run's directory, and who takes part in it.

    Averages are audited only where `reductions` is given. Tests that use `database_url` too run on every kind of database.
    """
    url = request.getfixturevalue("database_url") if "database_url" in request.fixturenames else None
    return partial(cast_in, tmp_path / "run", url=url)


class Stage:
    """A run of two parts, played by hand; whoever stands takes part."""

    def __init__(self, cast: Cast) -> None:
        self.cast = cast
        self.journal = Journal.open(cast.home, cast.now_ms)
        self.journal.appoint(Role.CHECKPOINT_WORKER, cast.worker.public_key, cast.now_ms)
        for auditor in cast.auditors:
            self.journal.appoint(Role.AUDITOR, auditor.public_key, cast.now_ms)
        self.standing = list(cast.nodes)
        self.submit(*(cast.registration(node) for node in cast.nodes))
        self.silent: set[bytes] = set()
        self.absent: set[bytes] = set()

    def submit(self, *envelopes: Envelope) -> None:
        for envelope in envelopes:
            answer, _ = self.journal.submit(envelope, envelope.open(), None, self.cast.now_ms)
            if isinstance(answer, RefusedError) and answer.code != "equivocation":
                raise answer

    def play(self, number: int) -> None:
        """A round up to its draw. Who is in `absent` does not commit, who is in `silent` does not open its nonce."""
        cast, journal = self.cast, self.journal
        self.submit(*(cast.ready(node, number, journal.state.base) for node in self.standing))
        self.plan = plan = self.newest(RoundPlan)
        self.commitments = [cast.commitment(plan, slot) for slot in range(len(plan.roster))]
        self.submit(*(one for one in self.commitments if one.key not in self.absent))
        self.later(0 if not self.absent else 121_000)
        self.averages = [cast.part_record(plan, self.newest(CommitmentSet), part, slot=part) for part in range(2)]
        for average in self.averages:
            self.submit(average, cast.part_held(average))
        self.submit(cast.report(plan, journal.state.parts, bytes([50 + number]) * 32))
        for slot, seat in enumerate(plan.roster):
            if seat.peer not in self.silent | self.absent:
                self.submit(cast.opening(plan, slot))
        self.later(11_000)

    def later(self, passed_ms: int) -> None:
        self.cast.now_ms += passed_ms
        self.journal.tick(self.cast.now_ms)

    def judge(self, slot: int, *outcomes: Outcome) -> None:
        """Verdicts on a contribution of the last round, as far as it was drawn."""
        if self.audit(slot, -1) is not None:
            for auditor, outcome in zip(self.cast.auditors, outcomes, strict=False):
                self.submit(self.cast.verdict(auditor, self.commitments[slot], outcome))

    def judge_average(self, part: int, *outcomes: Outcome) -> None:
        if self.audit(part, part) is not None:
            for auditor, outcome in zip(self.cast.auditors, outcomes, strict=False):
                self.submit(self.cast.part_verdict(auditor, self.averages[part], part, outcome))

    def audit(self, slot: int, part: int) -> AuditRow | None:
        return self.journal.read(lambda archive: archive.audit(self.plan.round, slot, part))

    def balances(self) -> dict[bytes, Balance]:
        """Of everybody who earned, by the coordinator's sums; its ledger and its contributions have to say the same."""
        accounts = ("pending", "settled", "forfeited")

        def query(archive: Archive) -> dict[bytes, Balance]:
            kept = {one.key: Balance(one.key, one.pending, one.settled, one.forfeited) for one in archive.nodes()}
            booked, moved = dict[bytes, Counter[str]](), dict[bytes, Counter[str]]()
            for row in archive.session.query(CreditRow):
                booked.setdefault(row.peer, Counter())[row.status] += row.megaflops
            for entry in archive.session.query(LedgerRow):
                sums = moved.setdefault(entry.peer, Counter())
                sums[entry.credit] += entry.megaflops
                sums[entry.debit] -= entry.megaflops
            for found in (booked, moved):
                assert kept == {
                    key: Balance(key, *(found.get(key, Counter())[one] for one in accounts)) for key in kept
                }
            return {key: one for key, one in kept.items() if key in moved}

        return self.journal.read(query)

    def newest(self, kind: Any) -> Any:
        return self.journal.read(lambda archive: opened(archive.newest(kind.kind, 1)[0]))

    def log(self) -> list[Envelope]:
        rows = self.journal.read(lambda archive: archive.leaves(0, 1 << 20))
        return [Envelope.decode(row.envelope) for row in rows]


MakeStage = Callable[..., Stage]


@pytest.fixture
def make_stage(make_cast: MakeCast) -> Iterator[MakeStage]:
    """`make_stage(nodes=5, rounds=8, reductions=0.5, horizon=20)`: with a short probation; after it draws are by chance."""
    made: list[Stage] = []

    def make(nodes: int = 5, rounds: int = 8, reductions: float = 0.5, horizon: int = 20, **audit: Any) -> Stage:
        cast = make_cast(nodes=nodes, rounds=rounds, reductions=reductions)
        audit = {"probation": 1, "floor": 0.4, "max_unavailable": 2, "horizon": horizon, **audit}
        pace = cast.spec.rounds.model_copy(update={"min_nodes": 1, "assemble_s": 5.0})
        changes = {"audit": cast.spec.audit.model_copy(update=audit), "rounds": pace}
        cast.spec = cast.spec.model_copy(update=changes)
        cast.home.spec_file.write_bytes(cast.spec.encode())
        made.append(Stage(cast))
        return made[-1]

    yield make
    for stage in made:
        stage.journal.close()


@pytest.fixture
def stage(make_stage: MakeStage) -> Stage:
    return make_stage()


@pytest.fixture(scope="module")
def cast(tmp_path_factory: pytest.TempPathFactory) -> Cast:
    """One cast for all tests of a module."""
    return cast_in(tmp_path_factory.mktemp("cast") / "run")


def _module(name: str) -> Any:
    """What is in a file beside this one."""
    specification = importlib.util.spec_from_file_location(f"tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


_serving, _listening = (getattr(_module("serving"), name) for name in ("serving", "listening"))


@pytest.fixture(scope="session")
def listening() -> Callable[..., AbstractAsyncContextManager[str]]:
    """`listening(app)`: an application at a port of this machine; its URL."""
    return _listening


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractAsyncContextManager[Api]]:
    """`serving(cast, **options)`: the cast's coordinator, with the options of `play`."""
    return _serving


@pytest.fixture
def play() -> Callable[..., None]:
    """`play(cast, script, **options)`: runs `script(api)` against the cast's coordinator, within half a minute or `within_s`.

    In process, or with `listen=True` through a port of this machine. The other options are those of the application, and
    the client's `address` in process.
    """

    def play(cast: Cast, script: Callable[[Api], Awaitable[None]], *, within_s: float = 30.0, **options: Any) -> None:
        async def run() -> None:
            async with asyncio.timeout(within_s), _serving(cast, **options) as api:
                await script(api)

        asyncio.run(run())

    return play
