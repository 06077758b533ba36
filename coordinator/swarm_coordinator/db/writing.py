"""What a transaction adds to the history: records with their leaves, and events, inserted together when somebody looks.

A group of hundreds of records costs two statements. Whoever queries records within the transaction flushes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from swarm_coordinator.db.machine_codec import encode_event
from swarm_coordinator.db.tables import EventRow, RecordRow
from swarm_coordinator.round_events import Event
from swarm_protocol.identity import Identity
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.records import Envelope, Receipt, Record

Name = tuple[str, int, int, bytes]
"""Kind, round, sequence and signer: at most one record has it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A record that is in the database, or will be by the end of the transaction; `receipt` is an encoded Envelope."""

    hash: bytes
    kind: str
    leaf: int | None
    envelope: bytes
    receipt: bytes | None

    @classmethod
    def of(cls, row: RecordRow) -> Stored:
        return cls(row.hash, row.kind, row.leaf, row.envelope, row.receipt)


class Writing:
    """One transaction's additions. Its log is the journal's own: who rolls back has to load it anew.

    `seq` is that of the newest event, `grew` says whether the log has new leaves.
    """

    def __init__(self, session: Session, run: bytes, log: Log, seq: int, now_ms: int) -> None:
        self.seq = seq
        self.grew = False
        self._session = session
        self._run = run
        self._log = log
        self._now_ms = now_ms
        self._records: dict[Name, Stored] = {}
        self._rows: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []

    def record(
        self, envelope: Envelope, record: Record, *, logged: bool, signer: Identity | None = None, due_round: int = 0
    ) -> Stored:
        """Add a record, as a leaf of the log if it is `logged`, with a receipt by `signer` that promises it by a round."""
        data = envelope.encode()
        leaf = receipt = None
        if logged:
            digest = leaf_hash(data)
            leaf = self._log.append(digest)
            self.grew = True
            if signer is not None:
                promise = Receipt(run=self._run, round=due_round, sequence=leaf, record=record.hash, leaf_hash=digest)
                receipt = Envelope.sign(signer, promise).encode()
        stored = Stored(record.hash, record.kind, leaf, data, receipt)
        self._records[record.kind, record.round, record.sequence, envelope.key] = stored
        self._rows.append(
            {
                "run": self._run,
                "kind": record.kind,
                "round": record.round,
                "sequence": record.sequence,
                "signer": envelope.key,
                "hash": record.hash,
                "envelope": data,
                "leaf": leaf,
                "received_ms": self._now_ms,
                "receipt": receipt,
            }
        )
        return stored

    def event(self, event: Event, round_number: int) -> None:
        """Add an event that the state machine was given in a round."""
        self.seq += 1
        self._events.append(
            {
                "run": self._run,
                "seq": self.seq,
                "round": round_number,
                "at_ms": self._now_ms,
                "payload": encode_event(event),
            }
        )

    def find(self, name: Name) -> Stored | None:
        """The record of this name, if this transaction added it."""
        return self._records.get(name)

    def flush(self) -> None:
        """Insert what was added so far."""
        self._session.flush()
        if self._rows:
            self._session.execute(insert(RecordRow), self._rows)
        if self._events:
            self._session.execute(insert(EventRow), self._events)
        self._rows, self._events = [], []
