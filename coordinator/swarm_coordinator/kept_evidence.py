"""Which objects archived evidence consists of. They come in after the record that names them, and are never deleted.

Whoever deletes objects asks `objects` and `checkpoints` first.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from swarm_coordinator.db.tables import CONTRIBUTION, EvidenceRow, RecordRow, RoundRow
from swarm_coordinator.store import Store
from swarm_protocol import evidence
from swarm_protocol.records import Envelope, Evidence, RoundPlan

AT_ONCE = 16


def note(session: Session, run: bytes, auditor: bytes, record: Evidence) -> None:
    """Pin what an accepted record names."""
    part = CONTRIBUTION if record.part is None else record.part
    where = {"run": run, "round": record.round, "slot": record.slot, "part": part, "auditor": auditor}
    rows = [{**where, "hash": digest, "size_bytes": size} for digest, size in evidence.sizes(record).items()]
    session.execute(insert(EvidenceRow), rows)


def size_bytes(session: Session, run: bytes, digest: bytes) -> int | None:
    """How long an object is by the evidence that names it; None if none does."""
    query = select(EvidenceRow.size_bytes).where(EvidenceRow.run == run, EvidenceRow.hash == digest)
    return session.scalar(query.limit(1))


def objects(session: Session, run: bytes) -> set[bytes]:
    """The names of all objects that evidence consists of."""
    return set(session.scalars(select(EvidenceRow.hash).where(EvidenceRow.run == run).distinct()))


def checkpoints(session: Session, run: bytes) -> set[bytes]:
    """The roots of the checkpoints that contributions with archived evidence began from: a replay needs them."""
    rounds = select(EvidenceRow.round).where(EvidenceRow.run == run, EvidenceRow.part == CONTRIBUTION)
    plans = select(RecordRow.envelope).join(
        RoundRow, (RoundRow.run == RecordRow.run) & (RoundRow.plan == RecordRow.hash)
    )
    found = session.scalars(plans.where(RoundRow.run == run, RoundRow.round.in_(rounds)))
    return {Envelope.decode(envelope).open_as(RoundPlan, run=run).base for envelope in found}


def missing(store: Store, record: Evidence) -> int:
    """How many of the pieces that a record names are not in the store. Blocking."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(not there for there in pool.map(store.exists, evidence.sizes(record)))
