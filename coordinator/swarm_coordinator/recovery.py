"""A coordinator that was restored from a backup signs nothing until it has asked: has it signed more than the backup knows?

For as long as a node may take to be heard of (`presence_s`), nodes hand in the newest records of the coordinator's that they
hold. One that the backup does not have means that going on would sign a second history: the run stops, for good, until a
newer backup is restored. This finds only what somebody still holds and hands in; it is no proof that nothing is missing.

A restore leaves an order of the kind `recover` in the database. It is done once the time has passed.
"""

from __future__ import annotations

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.tables import OrderRow
from swarm_protocol.errors import ConfigurationError, RefusedError
from swarm_protocol.log import Log
from swarm_protocol.records import (
    BeaconReveal,
    CommitmentSet,
    Envelope,
    LogHead,
    Receipt,
    Record,
    RoundManifest,
    RoundPlan,
)

RECOVER = "recover"
EVIDENCE = (RoundPlan, CommitmentSet, RoundManifest, BeaconReveal)
OF_THE_LOG = (Receipt, LogHead)


class Recovery:
    """The time after a restore. `failure` says why the run cannot go on, once that is known."""

    def __init__(self, run: bytes, owner: bytes, log: Log, order: int, until_ms: int) -> None:
        self._run = run
        self._log = log
        self._owner = owner
        self._order = order
        self.until_ms = until_ms
        self.failure: str | None = None

    @classmethod
    def begin(cls, session: Session, run: bytes, owner: bytes, log: Log, until_ms: int) -> Recovery | None:
        """What is to be waited for, or None where the run was not restored.

        Raises:
            ConfigurationError: it is known that the backup is too old.
        """
        order = session.scalar(_pending(run))
        if order is None:
            return None
        if order.answer is not None:
            raise ConfigurationError(order.answer)
        return cls(run, owner, log, order.id, until_ms)

    def compare(self, archive: Archive, envelope: Envelope, record: Record) -> None:
        """Look at a record that somebody hands in, whose signature was checked; the backup has it, or this raises.

        Raises:
            RefusedError: `recovering`, it is none that is asked for now; `backup-too-old`, the run cannot go on.
        """
        if self.failure is None and self._is_evidence(envelope, record):
            if self._has(archive, envelope, record):
                return
            what = f"{record.kind} {record.sequence}" if isinstance(record, OF_THE_LOG) else record.kind
            self.failure = (
                f"the backup is older than what was signed: a node holds the {what} of round {record.round}, which the "
                "backup does not have. Going on would sign a second history; restore a newer backup, or start a new run"
            )
            archive.session.get_one(OrderRow, self._order).answer = self.failure
        if self.failure is not None:
            raise RefusedError(self.failure, status=409, code="backup-too-old")
        raise RefusedError(
            "the coordinator was restored from a backup, and asks its nodes for what it signed last; try again soon",
            status=409,
            code="recovering",
        )

    def _is_evidence(self, envelope: Envelope, record: Record) -> bool:
        return envelope.key == self._owner and record.run == self._run and isinstance(record, EVIDENCE + OF_THE_LOG)

    def _has(self, archive: Archive, envelope: Envelope, record: Record) -> bool:
        size = record.sequence
        if isinstance(record, Receipt):
            return size < self._log.size and self._log.leaf(size) == record.leaf_hash
        if isinstance(record, LogHead):
            return size <= self._log.size and self._log.root(size) == record.root
        known = archive.find(record.kind, record.round, record.sequence, envelope.key)
        return known is not None and known.hash == record.hash

    def end(self, session: Session, now_ms: int) -> None:
        """Nobody held anything newer: the run goes on."""
        order = session.get_one(OrderRow, self._order)
        order.done_ms, order.answer = now_ms, "nobody held anything newer than the backup"


def is_pending(archive: Archive) -> bool:
    """Whether a run was restored, and has not gone on since."""
    return archive.session.scalar(_pending(archive.run)) is not None


def _pending(run: bytes) -> Select[OrderRow]:
    return select(OrderRow).filter_by(run=run, kind=RECOVER, done_ms=None).order_by(OrderRow.id.desc()).limit(1)
