"""A run's state and its records in one place, changed by one transaction at a time.

A record that was acknowledged is on disk together with everything that follows from it; a restart at any point finds the
same state and signs nothing a second time. Synchronous and for one caller at a time: `service` sees to that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from swarm_coordinator import orders
from swarm_coordinator.admission import Applicant, admit
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.engine import open_database
from swarm_coordinator.db.machine_codec import decode_event, decode_state
from swarm_coordinator.db.tables import EventRow, RecordRow, RunRow, SnapshotRow
from swarm_coordinator.entry import Entry, Office
from swarm_coordinator.entrance import Entrance
from swarm_coordinator.recovery import Recovery
from swarm_coordinator.round_events import Resumed, Tick
from swarm_coordinator.rounds import Policy, State, advance
from swarm_coordinator.run_directory import RunDirectory
from swarm_protocol import parts
from swarm_protocol.errors import ConfigurationError, RefusedError
from swarm_protocol.identity import Identity
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.records import (
    Envelope,
    Equivocation,
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

T = TypeVar("T")


@dataclass(frozen=True)
class Receipt:
    """What an accepted record is answered with; `new` is False if it had been accepted before."""

    hash: bytes
    kind: str
    leaf: int | None
    new: bool


class Journal:
    """Open it with `open`. `state` and `log_head` are those after the last commit."""

    def __init__(self, engine: Engine, office: Office, entrance: Entrance) -> None:
        self._engine = engine
        self._office = office
        self._entrance = entrance
        self._recovery: Recovery | None = None
        self._alive_ms = 0
        self.spec = office.spec
        self.log = Log()
        self.log_head: tuple[int, bytes] = (0, self.log.root())
        self.state = initial_state(office.spec)

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

    def submit(
        self, envelope: Envelope, record: Record, token: str | None, now_ms: int
    ) -> tuple[Receipt | RefusedError, set[str]]:
        """Accept a record whose signature was checked; returns the receipt, and the topics to wake.

        In place of the receipt an equivocation gets the refusal: the proof is stored, and others are to hear of it.

        Raises:
            RefusedError: says why; nothing was stored.
        """
        if self._recovery is not None:
            refusal = self._recovery.compare(envelope, record)
            return refusal or Receipt(record.hash, record.kind, None, new=False), set()
        with self._entry(now_ms) as entry:
            known = entry.archive.find(record.kind, record.round, record.sequence, envelope.key)
            if known is not None and known.hash != record.hash:
                entry.expose(Envelope.decode(known.envelope), envelope)
                refusal = RefusedError(
                    f"this identity signed a different {record.kind} of round {record.round}, sequence {record.sequence}",
                    status=409,
                    code="equivocation",
                )
                return refusal, entry.topics
            # Anything repeated but a heartbeat may come from somebody else, and says nothing new.
            if known is not None and not isinstance(record, Ready):
                return Receipt(known.hash, known.kind, known.leaf, new=False), entry.topics
            event = admit(entry.archive, self.spec, entry.state, Applicant(envelope.key), record)
            invite = None
            if isinstance(record, Registration):
                invite = self._entrance.admit(entry.archive, envelope.key, token, now_ms)
            row = known or entry.append(envelope, record)
            entry.heard(envelope.key)
            if isinstance(record, Registration):
                assert row.leaf is not None
                entry.register(envelope.key, record, row.leaf, invite)
            elif isinstance(record, Verdict | PartVerdict):
                entry.note_verdict(envelope.key, record)
            elif isinstance(record, Equivocation):
                entry.note_equivocation(record)
            if event is not None:
                entry.apply(event)
            entry.topics |= {f"{topic}:{record.round}" for kind, topic in WOKEN.items() if isinstance(record, kind)}
            return Receipt(row.hash, row.kind, row.leaf, new=known is None), entry.topics

    def tick(self, now_ms: int) -> set[str]:
        """Let time pass; returns the topics to wake."""
        if self._recovery is not None:
            return self._recovered(now_ms)
        if advance(self.state, Tick(), now_ms)[0] is self.state:
            return set()
        with self._entry(now_ms) as entry:
            entry.apply(Tick())
            return entry.topics

    def carry_out_orders(self, now_ms: int) -> set[str]:
        """Do what the run owner has ordered since, each in a transaction of its own; returns the topics to wake."""
        topics: set[str] = set()
        if self._recovery is not None:
            return topics
        for number in self.read(lambda archive: orders.open_orders(archive.session, archive.run)):
            with self._entry(now_ms) as entry:
                orders.carry_out(entry, number, now_ms)
                topics |= entry.topics
        return topics

    def appoint(self, role: Role, key: bytes, now_ms: int) -> bool:
        """Give a key an office, once. False if that has to wait: after a restore nothing is signed for a while."""
        if self._recovery is not None:
            return self.read(lambda archive: archive.holds_office(key, role))
        with self._entry(now_ms) as entry:
            if not entry.archive.holds_office(key, role):
                entry.appoint(role, key)
        return True

    def mark_alive(self, now_ms: int) -> None:
        """Note that the coordinator is up: only what comes after is down time."""
        if self._recovery is None:
            with self._entry(now_ms):
                pass

    @property
    def recovering(self) -> bool:
        """Whether the run was restored, and nodes are asked for what was signed last."""
        return self._recovery is not None

    @property
    def failure(self) -> str | None:
        """Why this run cannot be served any more, if that is so."""
        return None if self._recovery is None else self._recovery.failure

    def _recovered(self, now_ms: int) -> set[str]:
        """Go on after a restore, if the time to hear of newer records has passed, and none came."""
        recovery = self._recovery
        if recovery is None or recovery.failure is not None or now_ms < recovery.until_ms:
            return set()
        with self._entry(now_ms) as entry:
            recovery.end(entry.archive.session, now_ms)
            entry.apply(Resumed(now_ms - self._alive_ms))
            log.info("nobody held anything newer than the backup; the run goes on")
        self._recovery = None
        return entry.topics

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
                session.get_one(RunRow, self.spec.run_id).alive_ms = now_ms
                entry = Entry(session, self._office, self.state, self.log, now_ms)
                yield entry
        except BaseException:
            if self.log.size != size:
                self.log = Log(self.log.leaf(index) for index in range(size))
            raise
        self.state = entry.state
        if self.log.size != size:
            self.log_head = (self.log.size, self.log.root())

    def _load(self, now_ms: int) -> None:
        run = self.spec.run_id
        with Session(self._engine) as session, session.begin():
            row = session.get(RunRow, run)
            if row is None:
                if session.scalar(select(RunRow.id).limit(1)) is not None:
                    raise ConfigurationError("the database belongs to another run; restore the right one from a backup")
                row = RunRow(id=run, spec=self.spec.encode(), created_ms=now_ms, alive_ms=now_ms)
                session.add(row)
            self._alive_ms = row.alive_ms
            away_ms = now_ms - row.alive_ms
            self.state = restored_state(session, self.spec)
            self.log = Log(_leaf_hashes(session, run))
            self.log_head = (self.log.size, self.log.root())
            until_ms = now_ms + self.state.policy.presence_ms
            owner = bytes.fromhex(self.spec.coordinator)
            self._recovery = Recovery.begin(session, self._engine, run, owner, until_ms)
        if away_ms and self._recovery is None:
            with self._entry(now_ms) as entry:
                entry.apply(Resumed(away_ms))


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
