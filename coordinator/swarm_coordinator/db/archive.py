"""What is stored of one run, looked up within one transaction."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.orm import Session

from swarm_coordinator.db.tables import (
    CONTRIBUTION,
    MOOT,
    AuditRow,
    EquivocationRow,
    NodeRow,
    OfficeRow,
    RecordRow,
    RoundRow,
    VerdictRow,
)
from swarm_protocol.records import (
    CheckpointManifest,
    Commitment,
    CreditStatement,
    Dismissal,
    Envelope,
    Outcome,
    Record,
    Role,
    RunEnd,
    parse,
)

R = TypeVar("R", bound=Record)
T = TypeVar("T")

MAX_PARAMETERS = 10_000
"""Of one statement; both databases take three times as many."""


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of at most so many."""
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some


class Archive:
    def __init__(self, session: Session, run: bytes) -> None:
        self.session = session
        self.run = run
        self._known: dict[bytes, NodeRow | None] = {}

    def find(self, kind: str, round_number: int, sequence: int, signer: bytes) -> RecordRow | None:
        """The one record under this name, if there is one."""
        return self.session.scalar(
            select(RecordRow).filter_by(run=self.run, kind=kind, round=round_number, sequence=sequence, signer=signer)
        )

    def by_hash(self, digest: bytes) -> RecordRow | None:
        """The first record that was stored with this hash."""
        query = select(RecordRow).filter_by(run=self.run, hash=digest).order_by(RecordRow.id).limit(1)
        return self.session.scalar(query)

    def envelopes(self, digests: Collection[bytes]) -> dict[bytes, bytes]:
        """The encoded Envelopes of these records, by their hash: of each the first that was stored."""
        found: dict[bytes, bytes] = {}
        for some in batched(digests, MAX_PARAMETERS):
            query = select(RecordRow.hash, RecordRow.envelope).where(RecordRow.run == self.run)
            for row in self.session.execute(query.where(RecordRow.hash.in_(some)).order_by(RecordRow.id)):
                found.setdefault(row.hash, row.envelope)
        return found

    def of_round(self, kind: str | tuple[str, ...], round_number: int) -> Sequence[RecordRow]:
        """A round's records of one kind, or of several, as they came in."""
        kinds = (kind,) if isinstance(kind, str) else kind
        query = select(RecordRow).filter_by(run=self.run, round=round_number).where(RecordRow.kind.in_(kinds))
        return self.session.scalars(query.order_by(RecordRow.id)).all()

    def newest(self, kind: str, limit: int) -> Sequence[RecordRow]:
        """The records of one kind that came in last, newest first."""
        query = select(RecordRow).filter_by(run=self.run, kind=kind).order_by(RecordRow.id.desc()).limit(limit)
        return self.session.scalars(query).all()

    def count(self, kind: str, signer: bytes) -> int:
        """How many records of a kind a key has signed."""
        query = select(func.count()).select_from(RecordRow).filter_by(run=self.run, kind=kind, signer=signer)
        return self.session.scalar(query) or 0

    def statements(self) -> int:
        """How many statements of credit were signed."""
        query = select(func.max(RecordRow.sequence)).filter_by(run=self.run, kind=CreditStatement.kind)
        newest = self.session.scalar(query)
        return 0 if newest is None else newest + 1

    def ended(self) -> bool:
        """Whether the run's end was signed: no round follows."""
        query = select(RecordRow.id).filter_by(run=self.run, kind=RunEnd.kind).limit(1)
        return self.session.scalar(query) is not None

    def equivocated(self, key: bytes) -> bool:
        """Whether it is proved that this key signed two records under one name."""
        return self.session.get(EquivocationRow, (self.run, key)) is not None

    def commitments(self, round_number: int) -> dict[bytes, bytes]:
        """The encoded Envelopes of all commitments to a round, by their hash."""
        columns = select(RecordRow.hash, RecordRow.envelope)
        query = columns.filter_by(run=self.run, kind=Commitment.kind, round=round_number)
        return {row.hash: row.envelope for row in self.session.execute(query)}

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Load these nodes at once: `node` then asks the database no more in this transaction."""
        for some in batched(keys, MAX_PARAMETERS):
            query = select(NodeRow).where(NodeRow.run == self.run, NodeRow.key.in_(some))
            self._known |= dict.fromkeys(some)
            self._known |= {node.key: node for node in self.session.scalars(query)}

    def note_seen(self, seen_ms: Mapping[bytes, int]) -> None:
        """Note when nodes were last heard of, by their keys."""
        if seen_ms:
            self.session.connection().execute(
                update(NodeRow)
                .where(NodeRow.run == self.run, NodeRow.key == bindparam("node"))
                .values(last_seen_ms=bindparam("at_ms")),
                [{"node": key, "at_ms": at_ms} for key, at_ms in seen_ms.items()],
            )

    def vouched_tokens(self) -> dict[bytes, int]:
        """What audits have vouched for, of each identity."""
        query = select(NodeRow.key, NodeRow.vouched_tokens).filter_by(run=self.run)
        return {row.key: row.vouched_tokens for row in self.session.execute(query)}

    def leaves(self, start: int, count: int) -> Sequence[RecordRow]:
        """Entries of the log, from leaf `start` on."""
        query = select(RecordRow).filter(
            RecordRow.run == self.run, RecordRow.leaf >= start, RecordRow.leaf < start + count
        )
        return self.session.scalars(query.order_by(RecordRow.leaf)).all()

    def stored(self, record_type: type[R], digest: bytes) -> R:
        """A record that has to be there, by its hash; its signature was checked when it came in."""
        row = self.by_hash(digest)
        if row is None:
            raise LookupError(f"the database lost the {record_type.kind} {digest.hex()}")
        record = opened(row)
        if not isinstance(record, record_type):
            raise LookupError(f"{digest.hex()} is no {record_type.kind}")
        return record

    def node(self, key: bytes) -> NodeRow | None:
        if key in self._known:
            return self._known[key]
        return self.session.get(NodeRow, (self.run, key))

    def add_node(self, node: NodeRow) -> None:
        """A node that registers now."""
        self.session.add(node)
        self._known[node.key] = node

    def nodes(self) -> Sequence[NodeRow]:
        return self.session.scalars(select(NodeRow).filter_by(run=self.run).order_by(NodeRow.registered_ms)).all()

    def holds_office(self, key: bytes, role: Role) -> bool:
        return self.session.get(OfficeRow, (self.run, key, role.value)) is not None

    def end_office(self, key: bytes, role: Role) -> None:
        """Nobody holds this office any more by this key."""
        self.session.delete(self.session.get_one(OfficeRow, (self.run, key, role.value)))
        self.session.flush()

    def dismissed(self, key: bytes) -> bool:
        """Whether an auditor's office was taken from this key: it gets none again."""
        rows = self.session.scalars(select(RecordRow).filter_by(run=self.run, kind=Dismissal.kind))
        return any(isinstance(record, Dismissal) and record.key == key for record in map(opened, rows))

    def count_offices(self, role: Role) -> int:
        query = select(func.count()).select_from(OfficeRow).filter_by(run=self.run, role=role.value)
        return self.session.scalar(query) or 0

    def round(self, number: int) -> RoundRow | None:
        return self.session.get(RoundRow, (self.run, number))

    def last_sealed(self) -> RoundRow | None:
        """The newest round that has a manifest."""
        query = select(RoundRow).filter(RoundRow.run == self.run, RoundRow.root.is_not(None))
        return self.session.scalar(query.order_by(RoundRow.round.desc()).limit(1))

    def rounds(self, limit: int) -> Sequence[RoundRow]:
        """The newest sealed rounds, oldest first."""
        query = select(RoundRow).filter(RoundRow.run == self.run, RoundRow.root.is_not(None))
        return self.session.scalars(query.order_by(RoundRow.round.desc()).limit(limit)).all()[::-1]

    def checkpoint(self, number: int) -> RecordRow | None:
        """The CheckpointManifest of what a round starts from, once the round before is sealed."""
        return self.session.scalar(
            select(RecordRow).filter_by(run=self.run, kind=CheckpointManifest.kind, round=number, sequence=0)
        )

    def checkpoints(self, before: int | None, limit: int) -> list[CheckpointManifest]:
        """The newest CheckpointManifests, or those of rounds before one, newest first."""
        query = select(RecordRow).filter_by(run=self.run, kind=CheckpointManifest.kind)
        if before is not None:
            query = query.where(RecordRow.round < before)
        found = [opened(row) for row in self.session.scalars(query.order_by(RecordRow.round.desc()).limit(limit))]
        return [record for record in found if isinstance(record, CheckpointManifest)]

    def round_of(self, root: bytes) -> int | None:
        """The first round that starts from a checkpoint of the chain other than checkpoint 0, by its root."""
        query = select(func.min(RoundRow.round)).where(RoundRow.run == self.run, RoundRow.root == root)
        number = self.session.scalar(query)
        return None if number is None else number + 1

    def audit(self, round_number: int, slot: int, part: int = CONTRIBUTION) -> AuditRow | None:
        """The audit of a slot's contribution, or of its average of a part."""
        return self.session.get(AuditRow, (self.run, round_number, slot, part))

    def was_audited(self, round_number: int, slot: int) -> bool:
        """Whether a slot's contribution, or an average that it made, was drawn."""
        query = select(AuditRow.slot).filter_by(run=self.run, round=round_number, slot=slot).limit(1)
        return self.session.scalar(query) is not None

    def unresolved(self) -> Sequence[AuditRow]:
        """Audits without an outcome, oldest first."""
        query = select(AuditRow).where(AuditRow.run == self.run, AuditRow.outcome.is_(None))
        return self.session.scalars(query.order_by(AuditRow.round, AuditRow.slot, AuditRow.part)).all()

    def pending_audits(self) -> dict[bytes, int]:
        """How many audits without an outcome each node has, by its key."""
        query = select(AuditRow.peer, func.count()).where(AuditRow.run == self.run, AuditRow.outcome.is_(None))
        return dict(self.session.execute(query.group_by(AuditRow.peer)).all())

    def drop_audits(self, peer: bytes) -> None:
        """Close a node's audits that have no outcome yet: its standing has ended."""
        query = update(AuditRow).where(AuditRow.run == self.run, AuditRow.peer == peer, AuditRow.outcome.is_(None))
        self.session.execute(query.values(outcome=MOOT, reason="the node's standing had ended"))

    def offices(self, role: Role) -> list[bytes]:
        """The keys that hold an office."""
        return list(self.session.scalars(select(OfficeRow.key).filter_by(run=self.run, role=role.value)))

    def open_audits(self, auditor: bytes) -> list[tuple[AuditRow, int]]:
        """Audits without an outcome that this auditor has not voted on, oldest first, with how many others have."""
        verdicts = (
            select(func.count())
            .where(VerdictRow.run == AuditRow.run, VerdictRow.round == AuditRow.round)
            .where(VerdictRow.slot == AuditRow.slot, VerdictRow.part == AuditRow.part)
            .correlate(AuditRow)
        )
        mine = verdicts.where(VerdictRow.auditor == auditor).scalar_subquery()
        query = (
            select(AuditRow, verdicts.scalar_subquery())
            .where(AuditRow.run == self.run, AuditRow.outcome.is_(None), AuditRow.peer != auditor, mine == 0)
            .order_by(AuditRow.round, AuditRow.slot, AuditRow.part)
        )
        return [(audit, count) for audit, count in self.session.execute(query)]

    def verdicts(self, audit: AuditRow) -> dict[bytes, Outcome]:
        """What auditors said, by their keys."""
        query = select(VerdictRow).filter_by(run=self.run, round=audit.round, slot=audit.slot, part=audit.part)
        return {row.auditor: Outcome(row.outcome) for row in self.session.scalars(query)}

    def round_verdicts(self, round_number: int) -> Sequence[VerdictRow]:
        query = select(VerdictRow).filter_by(run=self.run, round=round_number)
        return self.session.scalars(query.order_by(VerdictRow.slot, VerdictRow.part, VerdictRow.auditor)).all()

    def count_audits(self, *, averages: bool = False) -> dict[str | None, int]:
        """Audits of contributions, or of averages, by outcome; None for those that are pending."""
        kind = AuditRow.part != CONTRIBUTION if averages else AuditRow.part == CONTRIBUTION
        query = select(AuditRow.outcome, func.count()).where(AuditRow.run == self.run, kind)
        return dict(self.session.execute(query.group_by(AuditRow.outcome)).all())

    def count_comparisons(self) -> dict[str | None, int]:
        query = select(VerdictRow.comparison, func.count()).filter_by(run=self.run).group_by(VerdictRow.comparison)
        return dict(self.session.execute(query).all())

    def rejected(self, limit: int) -> Sequence[AuditRow]:
        """The newest rejected contributions and averages, oldest first."""
        query = select(AuditRow).filter_by(run=self.run, outcome=Outcome.REJECTED.value)
        query = query.order_by(AuditRow.round.desc(), AuditRow.slot, AuditRow.part)
        return self.session.scalars(query.limit(limit)).all()[::-1]


def opened(row: RecordRow) -> Record:
    """A stored record; its signature was checked when it came in."""
    return parse(Envelope.decode(row.envelope).body)
