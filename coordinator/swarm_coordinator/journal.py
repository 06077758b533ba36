"""A run's state and its records in one place, changed by one transaction at a time.

A record that was acknowledged is on disk together with everything that follows from it; a restart at any point finds the
same state and signs nothing a second time. Synchronous and for one caller at a time: `service` sees to that.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from swarm_coordinator.admission import Applicant, admit
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.engine import open_database
from swarm_coordinator.db.machine_codec import decode_event, decode_state
from swarm_coordinator.db.tables import EventRow, RecordRow, RunRow, SnapshotRow
from swarm_coordinator.entry import Entry, Office
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
    LogHead,
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

    def __init__(self, engine: Engine, office: Office, token: str | None) -> None:
        self._engine = engine
        self._office = office
        self._token = token
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
        journal = cls(open_database(directory.database_url()), office, directory.token())
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
        has_token = self._token is None or hmac.compare_digest((token or "").encode(), self._token.encode())
        applicant = Applicant(envelope.key, has_token)
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
            event = admit(entry.archive, self.spec, entry.state, applicant, record)
            row = known or entry.append(envelope, record)
            entry.heard(envelope.key)
            if isinstance(record, Registration):
                entry.register(envelope.key, record)
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
        if advance(self.state, Tick(), now_ms)[0] is self.state:
            return set()
        with self._entry(now_ms) as entry:
            entry.apply(Tick())
            return entry.topics

    def appoint(self, role: Role, key: bytes, now_ms: int) -> None:
        """Give a key an office, once."""
        with self._entry(now_ms) as entry:
            if not entry.archive.holds_office(key, role):
                entry.appoint(role, key)

    def signed_head(self, size: int) -> Envelope:
        """The head of the log when it had so many committed leaves. It follows from the log alone: always the same bytes."""
        head = LogHead(run=self.spec.run_id, round=0, sequence=size, root=self.log.root(size))
        return Envelope.sign(self._office.identity, head)

    def mark_alive(self, now_ms: int) -> None:
        """Note that the coordinator is up: only what comes after is down time."""
        with self._entry(now_ms):
            pass

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
            away_ms = now_ms - row.alive_ms
            self.state = restored_state(session, self.spec)
            self.log = Log(_leaf_hashes(session, run))
            self.log_head = (self.log.size, self.log.root())
        if away_ms:
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
