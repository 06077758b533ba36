"""The tables. Signed records are the history; the others are the state machine's events and what is quick to look up."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import ForeignKey, Index, UniqueConstraint, create_engine, event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from swarm_protocol.errors import ConfigurationError

BUSY_TIMEOUT_MS = 10_000


class Base(DeclarativeBase):
    """All tables of a coordinator's database."""


class RunRow(Base):
    """`alive_ms` is when the coordinator last wrote: what was missed since then is given back on a restart."""

    __tablename__ = "runs"

    id: Mapped[bytes] = mapped_column(primary_key=True)
    spec: Mapped[bytes]
    created_ms: Mapped[int]
    alive_ms: Mapped[int]


class RecordRow(Base):
    """A signed record. `hash` is not unique: two signers may say the same thing. `leaf` is its place in the log, if any."""

    __tablename__ = "records"
    __table_args__ = (
        UniqueConstraint("run", "kind", "round", "sequence", "signer"),
        UniqueConstraint("run", "leaf"),
        Index("records_by_hash", "run", "hash"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id))
    kind: Mapped[str]
    round: Mapped[int]
    sequence: Mapped[int]
    signer: Mapped[bytes]
    hash: Mapped[bytes]
    envelope: Mapped[bytes]
    leaf: Mapped[int | None]
    received_ms: Mapped[int]


class EventRow(Base):
    """An event that the state machine was given, to be given again after a restart."""

    __tablename__ = "events"

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    round: Mapped[int]
    at_ms: Mapped[int]
    payload: Mapped[bytes]


class SnapshotRow(Base):
    """The state machine's state after event `seq`, at the start of a round."""

    __tablename__ = "snapshots"

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    seq: Mapped[int]
    state: Mapped[bytes]


class NodeRow(Base):
    """An identity that registered. `ended_reason` is None while it is in good standing."""

    __tablename__ = "nodes"

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    key: Mapped[bytes] = mapped_column(primary_key=True)
    name: Mapped[str]
    agent: Mapped[str]
    device: Mapped[str]
    fingerprint: Mapped[bytes]
    registered_ms: Mapped[int]
    last_seen_ms: Mapped[int]
    ended_reason: Mapped[str | None] = mapped_column(default=None)
    contributions: Mapped[int] = mapped_column(default=0)
    accepted: Mapped[int] = mapped_column(default=0)
    rejected: Mapped[int] = mapped_column(default=0)
    unavailable: Mapped[int] = mapped_column(default=0)
    vouched_tokens: Mapped[int] = mapped_column(default=0)
    unavailable_rounds: Mapped[bytes] = mapped_column(default=b"\x80")


class OfficeRow(Base):
    """A key that the coordinator appointed."""

    __tablename__ = "offices"

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    key: Mapped[bytes] = mapped_column(primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)


class RoundRow(Base):
    """A round that was planned, filled in as it goes on.

    `parts` is the CBOR list of what it is sealed with, `vouched` that of the roster's vouched tokens when it was planned.
    """

    __tablename__ = "rounds"

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    slots: Mapped[int]
    plan: Mapped[bytes]
    vouched: Mapped[bytes]
    committed: Mapped[int] = mapped_column(default=0)
    commitment_set: Mapped[bytes | None] = mapped_column(default=None)
    parts: Mapped[bytes | None] = mapped_column(default=None)
    missing_parts: Mapped[int] = mapped_column(default=0)
    manifest: Mapped[bytes | None] = mapped_column(default=None)
    root: Mapped[bytes | None] = mapped_column(default=None)
    beacon: Mapped[bytes | None] = mapped_column(default=None)


MOOT = "moot"
"""The outcome of an audit of somebody whose standing has ended: nothing depends on it any more, and nobody looks."""


CONTRIBUTION = -1
"""What stands in place of a part where all of a contribution is audited, and not an average."""


class AuditRow(Base):
    """What was drawn: a slot's contribution, or its average of a part. `peer` holds the slot, `audited` is the hash of the
    commitment or of the part record; `segments` is the CBOR list of those that are replayed, of an average none.

    `outcome` is None while auditors are at it; else a verdict's, or `MOOT`.
    """

    __tablename__ = "audits"

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True, default=CONTRIBUTION)
    peer: Mapped[bytes]
    audited: Mapped[bytes]
    segments: Mapped[bytes]
    outcome: Mapped[str | None] = mapped_column(default=None)
    reason: Mapped[str | None] = mapped_column(default=None)


class VerdictRow(Base):
    """What one auditor said of one contribution, or of one average, which has no comparison."""

    __tablename__ = "verdicts"

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True, default=CONTRIBUTION)
    auditor: Mapped[bytes] = mapped_column(primary_key=True)
    outcome: Mapped[str]
    comparison: Mapped[str | None]
    statistic: Mapped[float | None]
    reason: Mapped[str]


class CreditStatus(StrEnum):
    PENDING = "pending"
    SETTLED = "settled"
    FORFEITED = "forfeited"


class CreditRow(Base):
    """The credit of one contribution, in tokens."""

    __tablename__ = "credit"

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(primary_key=True)
    peer: Mapped[bytes]
    tokens: Mapped[int]
    status: Mapped[str]
    reason: Mapped[str | None] = mapped_column(default=None)


class EquivocationRow(Base):
    """A key that is proved to have signed two records under one name, and the first report of it, by its hash."""

    __tablename__ = "equivocations"

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    key: Mapped[bytes] = mapped_column(primary_key=True)
    report: Mapped[bytes]


def open_database(path: Path) -> Engine:
    """Open, and if need be make, a database whose commits survive a crash of the machine.

    Raises:
        ConfigurationError: it cannot be opened.
    """
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
    event.listen(engine, "connect", _configure)
    # The driver would begin a transaction at the first write only; a reader's statements have to agree as well.
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    try:
        Base.metadata.create_all(engine)
    except DatabaseError as error:
        engine.dispose()
        raise ConfigurationError(f"the database {path} cannot be opened: {error.orig}") from error
    return engine


def _configure(connection: Any, _: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.close()
