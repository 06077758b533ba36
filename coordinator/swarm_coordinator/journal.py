"""A run's state and its records in one place, changed by one transaction at a time.

A record that was acknowledged is on disk together with everything that follows from it; a restart at any point finds the
same state and signs nothing a second time. Synchronous and for one caller at a time: `service` sees to that.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from uuid import uuid4

from sqlalchemy import func, select, update
from sqlalchemy.engine import CursorResult, Engine
from sqlalchemy.orm import Session

from swarm_coordinator import orders
from swarm_coordinator.admission import Applicant, admit
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.engine import open_database
from swarm_coordinator.db.leadership import notify
from swarm_coordinator.db.machine_codec import decode_event, decode_state
from swarm_coordinator.db.tables import EventRow, RecordRow, RunRow, SnapshotRow
from swarm_coordinator.entrance import Entrance
from swarm_coordinator.entry import Entry, Office
from swarm_coordinator.recovery import Recovery
from swarm_coordinator.round_events import NodeReady, Resumed, Tick
from swarm_coordinator.rounds import Policy, State, advance
from swarm_coordinator.run_directory import RunDirectory
from swarm_protocol import parts
from swarm_protocol.errors import ConfigurationError, RefusedError, SwarmError
from swarm_protocol.identity import Identity
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.records import (
    Commitment,
    Envelope,
    Equivocation,
    Evidence,
    LogHead,
    NonceOpening,
    PartHeld,
    PartRecord,
    PartVerdict,
    Ready,
    Record,
    Registration,
    Role,
    Sketches,
    SketchObjection,
    SketchSet,
    Verdict,
)
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

WOKEN = {PartRecord: "part-records", Sketches: "sketches", SketchObjection: "sketches", SketchSet: "sketch-set"}
"""What long-polls wait for of the records that others sign, by the topic of their round."""

ONE_BY_ONE = (Registration, Commitment, NonceOpening, PartRecord, PartHeld)
"""What is checked against nothing that could come in the same transaction, but through the state."""

LOST = "another process drives this run now; this one ends"

T = TypeVar("T")


class LostOfficeError(SwarmError):
    """Another process drives the run: nothing was written."""


@dataclass(frozen=True)
class Receipt:
    """What an accepted record is answered with; `new` is False if it had been accepted before.

    `signed` is the encoded Envelope that promises the record's place in the log; None for what is not in it.
    """

    hash: bytes
    kind: str
    leaf: int | None
    new: bool
    signed: bytes | None = None


@dataclass(frozen=True)
class Change:
    """Something to do in a transaction, and the key of whom it concerns, if anybody. It either refuses, or does its work."""

    carry_out: Callable[[Entry], object]
    key: bytes | None = None


class Journal:
    """Open it with `open`. `state` and `log_head` are those after the last commit."""

    def __init__(self, engine: Engine, office: Office, entrance: Entrance) -> None:
        self._engine = engine
        self._office = office
        self._entrance = entrance
        self._recovery: Recovery | None = None
        self._driver = uuid4().hex
        self._lost = False
        self._alive_ms = 0
        self.spec = office.spec
        self.log = Log()
        self.log_head: tuple[int, bytes] = (0, self.log.root())
        self.state = initial_state(office.spec)
        self._seq = 0
        self._seen_ms: dict[bytes, int] = {}

    @classmethod
    def open(cls, directory: RunDirectory, now_ms: int) -> Journal:
        """Open the run in a directory where it stopped; the time that it was down for is given back to the phase.

        Raises:
            ConfigurationError: no run there, or one whose files do not belong together.
        """
        spec = directory.spec()
        identity = Identity.load(directory.coordinator_key)
        if identity.public_key.hex() != spec.coordinator:
            raise ConfigurationError(f"{directory.coordinator_key} is not the key that the run was made with")
        office = Office(spec, identity, directory.beacon_seed())
        entrance = Entrance(directory.admission_mode(), directory.token())
        journal = cls(open_database(directory.database_url()), office, entrance)
        try:
            journal._load(now_ms)
        except BaseException:
            journal.close()
            raise
        return journal

    def close(self) -> None:
        self._engine.dispose()

    def offer(self, envelope: Envelope, record: Record, token: str | None) -> Change:
        """The change that a record brings about whose signature was checked; its result is a Receipt.

        It is refused with a `RefusedError` that says why; then nothing was stored. An equivocation is refused as well, by a
        result: the proof is stored, and others are to hear of it.
        """
        return Change(lambda entry: self._accept(entry, envelope, record, token), envelope.key)

    def commit(self, changes: Sequence[Change], now_ms: int) -> tuple[list[object], set[str]]:
        """Carry out changes, in their order, in one transaction; returns their results, and the topics to wake.

        In place of a result stands the exception of a change that failed. One that failed half-way costs the others nothing.
        """
        try:
            with self._entry(now_ms) as entry:
                entry.archive.prefetch({change.key for change in changes if change.key is not None})
                results = [_carried_out(change, entry) for change in changes]
        except Exception as error:  # noqa: BLE001  # handed on to whom it concerns
            if len(changes) == 1:
                return [error], set()
            log.warning("a group of %d changes is carried out one by one: %s", len(changes), error)
            results, topics = [], set[str]()
            for change in changes:
                result, woken = self.commit([change], now_ms)
                results += result
                topics |= woken
            return results, topics
        return results, entry.topics

    def submit(
        self, envelope: Envelope, record: Record, token: str | None, now_ms: int
    ) -> tuple[Receipt | RefusedError, set[str]]:
        """Accept one record by itself.

        Raises:
            RefusedError: says why; nothing was stored.
        """
        (result,), topics = self.commit([self.offer(envelope, record, token)], now_ms)
        if isinstance(result, Receipt) or (isinstance(result, RefusedError) and topics):
            return result, topics
        assert isinstance(result, Exception)
        raise result

    def _accept(self, entry: Entry, envelope: Envelope, record: Record, token: str | None) -> Receipt | RefusedError:
        if self._recovery is not None:
            self._recovery.compare(entry.archive, envelope, record)
            return Receipt(record.hash, record.kind, None, new=False)
        applicant = Applicant(envelope.key)
        if isinstance(record, Ready):
            event = admit(entry.archive, self.spec, entry.state, applicant, record)
            assert isinstance(event, NodeReady)
            entry.present(event)
            return Receipt(record.hash, record.kind, None, new=True)
        known = entry.find(record, envelope.key)
        if known is not None and known.hash != record.hash:
            entry.expose(Envelope.decode(known.envelope), envelope)
            return RefusedError(
                f"this identity signed a different {record.kind} of round {record.round}, sequence {record.sequence}",
                status=409,
                code="equivocation",
            )
        if known is not None:
            return Receipt(known.hash, known.kind, known.leaf, new=False, signed=known.receipt)
        if not isinstance(record, ONE_BY_ONE):
            entry.flush()  # what it is checked against may be in this group
        admitted = admit(entry.archive, self.spec, entry.state, applicant, record)
        invite = None
        if isinstance(record, Registration):
            invite = self._entrance.admit(entry.archive, envelope.key, token, entry.now_ms)
        stored = entry.append(envelope, record)
        entry.heard.add(envelope.key)
        if isinstance(record, Registration):
            assert stored.leaf is not None
            entry.register(envelope.key, record, stored.leaf, invite)
        elif isinstance(record, Evidence):
            entry.note_evidence(envelope.key, record)
        elif isinstance(record, Verdict | PartVerdict):
            entry.note_verdict(envelope.key, record, stored)
        elif isinstance(record, Equivocation):
            entry.note_equivocation(record, stored)
        if admitted is not None:
            entry.apply(admitted)
        entry.topics |= {f"{topic}:{record.round}" for kind, topic in WOKEN.items() if isinstance(record, kind)}
        return Receipt(stored.hash, stored.kind, stored.leaf, new=True, signed=stored.receipt)

    def tick(self, now_ms: int) -> set[str]:
        """Let time pass; returns the topics to wake."""
        if self._recovery is not None:
            return self._recovered(now_ms)
        if advance(self.state, Tick(), now_ms)[0] is self.state:
            return set()
        return self._alone(lambda entry: entry.apply(Tick()), now_ms)

    def carry_out_orders(self, now_ms: int) -> set[str]:
        """Do what the run owner has ordered since, each in a transaction of its own; returns the topics to wake."""
        topics: set[str] = set()
        if self._recovery is None:
            for number in self.read(lambda archive: orders.open_orders(archive.session, archive.run)):
                topics |= self._alone(functools.partial(orders.carry_out, number=number), now_ms)
        return topics

    def appoint(self, role: Role, key: bytes, now_ms: int) -> bool:
        """Give a key an office, once. False if that has to wait: after a restore nothing is signed for a while."""
        if self._recovery is not None:
            return self.read(lambda archive: archive.holds_office(key, role))

        def change(entry: Entry) -> None:
            if not entry.archive.holds_office(key, role) and not entry.archive.dismissed(key):
                entry.appoint(role, key)

        self._alone(change, now_ms)
        return True

    def signed_head(self, size: int) -> Envelope:
        """The head of the log when it had so many committed leaves. It follows from the log alone: always the same bytes."""
        head = LogHead(run=self.spec.run_id, round=0, sequence=size, root=self.log.root(size))
        return Envelope.sign(self._office.identity, head)

    def mark_alive(self, now_ms: int) -> None:
        """Note that the coordinator is up, and who was heard of: only what comes after is down time."""
        seen, self._seen_ms = self._seen_ms, {}

        def change(entry: Entry) -> None:
            entry.archive.note_seen(seen)

        if self._recovery is None:
            self._alone(change, now_ms)

    @property
    def recovering(self) -> bool:
        """Whether the run was restored, and nodes are asked for what was signed last."""
        return self._recovery is not None

    @property
    def failure(self) -> str | None:
        """Why this run cannot be served any more, if that is so."""
        if self._lost:
            return LOST
        return None if self._recovery is None else self._recovery.failure

    def _recovered(self, now_ms: int) -> set[str]:
        """Go on after a restore, if the time to hear of newer records has passed, and none came."""
        recovery = self._recovery
        if recovery is None or recovery.failure is not None or now_ms < recovery.until_ms:
            return set()

        def change(entry: Entry) -> None:
            recovery.end(entry.archive.session, now_ms)
            entry.begin()
            entry.apply(Resumed(now_ms - self._alive_ms))

        topics = self._alone(change, now_ms)
        self._recovery = None
        log.info("nobody held anything newer than the backup; the run goes on")
        return topics

    def _alone(self, carry_out: Callable[[Entry], object], now_ms: int) -> set[str]:
        (result,), topics = self.commit([Change(carry_out)], now_ms)
        if isinstance(result, Exception):
            raise result
        return topics

    def read(self, query: Callable[[Archive], T]) -> T:
        """Run a query on what is committed. From any thread."""
        with Session(self._engine) as session:
            return query(Archive(session, self.spec.run_id))

    @contextmanager
    def _entry(self, now_ms: int) -> Iterator[Entry]:
        """A transaction: all of it is kept, or nothing."""
        size = self.log.size
        try:
            with Session(self._engine) as session, session.begin():
                self._drive(session, now_ms if self._recovery is None else self._alive_ms)
                entry = Entry(session, self._office, self.state, self.log, self._seq, now_ms)
                yield entry
                entry.finish()
                notify(session.connection(), self.spec.run_id, entry.topics)
        except BaseException:
            if self.log.size != size:
                self.log = Log(self.log.leaf(index) for index in range(size))
            raise
        self.state, self._seq = entry.state, entry.seq
        self._seen_ms |= dict.fromkeys(entry.heard, now_ms)
        if self.log.size != size:
            self.log_head = (self.log.size, self.log.root())

    def _drive(self, session: Session, now_ms: int) -> None:
        """Note that we are here. Raises `LostOfficeError` if another process has taken the run over."""
        ours = update(RunRow).where(RunRow.id == self.spec.run_id, RunRow.driver == self._driver)
        done = session.execute(ours.values(alive_ms=now_ms), execution_options={"synchronize_session": False})
        assert isinstance(done, CursorResult)
        if done.rowcount != 1:
            self._lost = True
            raise LostOfficeError(LOST)

    def _load(self, now_ms: int) -> None:
        run = self.spec.run_id
        with Session(self._engine) as session, session.begin():
            row = session.get(RunRow, run)
            if row is None:
                own = self._engine.dialect.name == "sqlite"
                if own and session.scalar(select(RunRow.id).limit(1)) is not None:
                    raise ConfigurationError("the database belongs to another run; restore the right one from a backup")
                row = RunRow(id=run, spec=self.spec.encode(), created_ms=now_ms, alive_ms=now_ms)
                session.add(row)
            row.driver = self._driver
            self._alive_ms = row.alive_ms
            away_ms = now_ms - row.alive_ms
            self.state = restored_state(session, self.spec)
            self._seq = session.scalar(select(func.max(EventRow.seq)).filter_by(run=run)) or 0
            self.log = Log(_leaf_hashes(session, run))
            self.log_head = (self.log.size, self.log.root())
            until_ms = now_ms + self.state.policy.presence_ms
            owner = bytes.fromhex(self.spec.coordinator)
            self._recovery = Recovery.begin(session, run, owner, self.log, until_ms)
        if self._recovery is None:
            self._alone(lambda entry: entry.begin(), now_ms)
        if away_ms and self._recovery is None:
            self._alone(lambda entry: entry.apply(Resumed(away_ms)), now_ms)


def _carried_out(change: Change, entry: Entry) -> object:
    try:
        return change.carry_out(entry)
    except RefusedError as error:
        return error


def initial_state(spec: RunSpec) -> State:
    """Before anybody came."""
    return State(Policy.of(spec, parts.part_count(spec)), bytes.fromhex(spec.checkpoint))


def restored_state(session: Session, spec: RunSpec) -> State:
    """The newest snapshot, with the events after it replayed. What followed from them is stored already."""
    run = spec.run_id
    snapshot = session.scalar(select(SnapshotRow).filter_by(run=run).order_by(SnapshotRow.round.desc()).limit(1))
    state = initial_state(spec) if snapshot is None else decode_state(snapshot.state)
    since = 0 if snapshot is None else snapshot.seq
    query = select(EventRow).where(EventRow.run == run, EventRow.seq > since).order_by(EventRow.seq)
    for row in session.scalars(query):
        state, _ = advance(state, decode_event(row.payload), row.at_ms)
    return state


def _leaf_hashes(session: Session, run: bytes) -> Iterable[bytes]:
    query = select(RecordRow.envelope).where(RecordRow.run == run, RecordRow.leaf.is_not(None)).order_by(RecordRow.leaf)
    return (leaf_hash(envelope) for envelope in session.scalars(query.execution_options(yield_per=1000)))
