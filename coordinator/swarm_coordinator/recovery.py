"""A coordinator that was restored from a backup signs nothing until it has asked: has it signed more than the backup knows?

For as long as a node may take to be heard of (`presence_s`), nodes hand in the newest records of the coordinator's that they
hold. One that the backup does not have means that going on would sign a second history: the run stops, for good, until a
newer backup is restored. This finds only what somebody still holds and hands in; it is no proof that nothing is missing.

A restore leaves an order of the kind `recover` in the database. It is done once the time has passed.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.tables import OrderRow
from swarm_protocol.errors import ConfigurationError, RefusedError
from swarm_protocol.records import BeaconReveal, CommitmentSet, Envelope, Record, RoundManifest, RoundPlan

RECOVER = "recover"
EVIDENCE = (RoundPlan, CommitmentSet, RoundManifest, BeaconReveal)


class Recovery:
    """The time after a restore. `failure` says why the run cannot go on, once that is known."""

    def __init__(self, engine: Engine, run: bytes, owner: bytes, order: int, until_ms: int) -> None:
        self._engine = engine
        self._run = run
        self._owner = owner
        self._order = order
        self.until_ms = until_ms
        self.failure: str | None = None

    @classmethod
    def begin(cls, session: Session, engine: Engine, run: bytes, owner: bytes, until_ms: int) -> Recovery | None:
        """What is to be waited for, or None where the run was not restored.

        Raises:
            ConfigurationError: it is known that the backup is too old.
        """
        query = select(OrderRow).filter_by(run=run, kind=RECOVER, done_ms=None).order_by(OrderRow.id.desc()).limit(1)
        order = session.scalar(query)
        if order is None:
            return None
        if order.answer is not None:
            raise ConfigurationError(order.answer)
        return cls(engine, run, owner, order.id, until_ms)

    def compare(self, envelope: Envelope, record: Record) -> RefusedError | None:
        """Look at a record that somebody hands in, whose signature was checked; None if the backup has it."""
        if self.failure is not None:
            return RefusedError(self.failure, status=409, code="backup-too-old")
        if envelope.key != self._owner or record.run != self._run or not isinstance(record, EVIDENCE):
            return RefusedError(
                "the coordinator was restored from a backup, and asks its nodes for what it signed last; try again soon",
                status=409,
                code="recovering",
            )
        with Session(self._engine) as session, session.begin():
            known = Archive(session, self._run).find(record.kind, record.round, record.sequence, envelope.key)
            if known is not None and known.hash == record.hash:
                return None
            self.failure = (
                f"the backup is older than what was signed: a node holds the {record.kind} of round {record.round}, which "
                "the backup does not have. Going on would sign a second history; restore a newer backup, or start a new run"
            )
            session.get_one(OrderRow, self._order).answer = self.failure
        return RefusedError(self.failure, status=409, code="backup-too-old")

    def end(self, session: Session, now_ms: int) -> None:
        """Nobody held anything newer: the run goes on."""
        order = session.get_one(OrderRow, self._order)
        order.done_ms, order.answer = now_ms, "nobody held anything newer than the backup"
