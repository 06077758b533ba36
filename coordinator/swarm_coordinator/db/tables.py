"""The tables. Signed records are the history; the others are the state machine's events and what is quick to look up."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, UniqueConstraint, false
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """All tables of a coordinator's database. Several runs may share one."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {int: BigInteger().with_variant(Integer(), "sqlite")}


class RunRow(Base):
    """`alive_ms` is when the coordinator last wrote: what was missed since then is given back on a restart.

    `driver` is who may write: a name that each process that takes the run over makes up anew.
    """

    __tablename__ = "runs"

    id: Mapped[bytes] = mapped_column(primary_key=True)
    spec: Mapped[bytes]
    created_ms: Mapped[int]
    alive_ms: Mapped[int]
    driver: Mapped[str | None] = mapped_column(default=None)


class RecordRow(Base):
    """A signed record. `hash` is not unique: two signers may say the same thing. `leaf` is its place in the log, if any;
    `receipt` is then the encoded Envelope that acknowledges it to its signer."""

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
    receipt: Mapped[bytes | None] = mapped_column(default=None)


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
    """An identity that registered. `ended_reason` is None while it is in good standing.

    `invited` says that it came by an invitation of its own; `leaf` is that of its first registration: who came earlier is
    earlier in the queue. `pending`, `settled` and `forfeited` are sums of the ledger, in megaflops.
    """

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
    team: Mapped[str] = mapped_column(default="", server_default="")
    invited: Mapped[bool] = mapped_column(default=False, server_default=false())
    leaf: Mapped[int] = mapped_column(default=0, server_default="0")
    pending: Mapped[int] = mapped_column(default=0, server_default="0")
    settled: Mapped[int] = mapped_column(default=0, server_default="0")
    forfeited: Mapped[int] = mapped_column(default=0, server_default="0")


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
    planned_ms: Mapped[int | None] = mapped_column(default=None)
    sealed_ms: Mapped[int | None] = mapped_column(default=None)


class EvaluationRow(Base):
    """Held-out loss of the checkpoint that a round starts from, nats per token; now and then what the model writes."""

    __tablename__ = "evaluations"

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    root: Mapped[bytes]
    loss: Mapped[float]
    tokens: Mapped[int]
    sample: Mapped[str | None] = mapped_column(default=None)


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
    __table_args__ = (Index("audits_by_outcome", "run", "outcome", "peer"),)

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
    """What one auditor said of one contribution, or of one average, which has no comparison. `evidence` is the hash of the
    Evidence record of a rejection."""

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
    evidence: Mapped[bytes | None] = mapped_column(default=None)


class EvidenceRow(Base):
    """An object that an auditor's evidence consists of, of `size_bytes`. Whatever is named here is never deleted."""

    __tablename__ = "evidence"
    __table_args__ = (Index("evidence_by_hash", "run", "hash"),)

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True, default=CONTRIBUTION)
    auditor: Mapped[bytes] = mapped_column(primary_key=True)
    hash: Mapped[bytes] = mapped_column(primary_key=True)
    size_bytes: Mapped[int]


class CreditStatus(StrEnum):
    PENDING = "pending"
    SETTLED = "settled"
    FORFEITED = "forfeited"


class CreditRow(Base):
    """The credit of one contribution, and where the ledger has brought it; `team` is its node's when it was earned.
    `commitment` is the hash of its commitment."""

    __tablename__ = "credit"
    __table_args__ = (Index("credit_by_status", "run", "status", "round"), Index("credit_by_peer", "run", "peer"))

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(primary_key=True)
    peer: Mapped[bytes]
    tokens: Mapped[int]
    status: Mapped[str]
    reason: Mapped[str | None] = mapped_column(default=None)
    megaflops: Mapped[int] = mapped_column(default=0, server_default="0")
    team: Mapped[str] = mapped_column(default="", server_default="")
    commitment: Mapped[bytes] = mapped_column(default=b"", server_default="")


class LedgerRow(Base):
    """A movement of a contribution's credit, out of `debit` and into `credit`: append-only, and summing to nothing.

    Accounts are `run`, and `pending`, `settled` and `forfeited` of the peer. `commitment` is the contribution's, `cause` the
    hash of the record that the movement follows from, and `leaf` that record's place in the log. `statement` is the sequence
    of the CreditStatement that names it, None until one does; `position` its move within that, by count.
    """

    __tablename__ = "ledger"
    __table_args__ = (Index("ledger_by_peer", "run", "peer", "seq"), Index("ledger_unstated", "run", "statement"))

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    round: Mapped[int]
    slot: Mapped[int]
    peer: Mapped[bytes]
    debit: Mapped[str]
    credit: Mapped[str]
    megaflops: Mapped[int]
    commitment: Mapped[bytes]
    cause: Mapped[bytes]
    leaf: Mapped[int]
    position: Mapped[int]
    statement: Mapped[int | None] = mapped_column(default=None)


class EquivocationRow(Base):
    """A key that is proved to have signed two records under one name, and the first report of it, by its hash."""

    __tablename__ = "equivocations"

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    key: Mapped[bytes] = mapped_column(primary_key=True)
    report: Mapped[bytes]


class InviteRow(Base):
    """An invitation, good for `uses` identities. Its token is known to whom it was given; here is its hash."""

    __tablename__ = "invites"

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    token_hash: Mapped[bytes] = mapped_column(primary_key=True)
    label: Mapped[str]
    uses: Mapped[int]
    used: Mapped[int] = mapped_column(default=0)
    created_ms: Mapped[int]
    expires_ms: Mapped[int | None] = mapped_column(default=None)


class AllowedRow(Base):
    """An identity on the allow-list."""

    __tablename__ = "allowed"

    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id), primary_key=True)
    key: Mapped[bytes] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(default="")


class InboxRow(Base):
    """A record that a process was given which does not drive the run, and the driver's answer to it, in JSON."""

    __tablename__ = "inbox"

    id: Mapped[int] = mapped_column(primary_key=True)
    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id))
    envelope: Mapped[bytes]
    token: Mapped[str | None]
    asked_ms: Mapped[int]
    answer: Mapped[str | None] = mapped_column(default=None)


class SignedRow(Base):
    """What one of the run owner's workers has signed, by its name: only where several processes share a run."""

    __tablename__ = "signed"

    key: Mapped[bytes] = mapped_column(primary_key=True)
    run: Mapped[bytes] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    envelope: Mapped[bytes]


class OrderRow(Base):
    """What the run owner asked for by a command, for the coordinator to do once. `argument` is JSON."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    run: Mapped[bytes] = mapped_column(ForeignKey(RunRow.id))
    kind: Mapped[str]
    argument: Mapped[str]
    ordered_ms: Mapped[int]
    done_ms: Mapped[int | None] = mapped_column(default=None)
    answer: Mapped[str | None] = mapped_column(default=None)
