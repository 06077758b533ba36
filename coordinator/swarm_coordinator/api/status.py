"""The run as people read it: queries whose answers are the API's JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from sqlalchemy import func, select

from swarm_coordinator import evaluations, recovery
from swarm_coordinator.api.models import (
    AncestorSummary,
    AuditCounts,
    CheckpointName,
    Comparisons,
    Credit,
    EquivocationSummary,
    EvaluationSummary,
    NodeStatus,
    OpenAudit,
    OutcomeCounts,
    PartRecordDetail,
    Rejected,
    RoundDetail,
    RoundSummary,
    RunStatus,
    RunSummary,
    SlotDetail,
    VerdictDetail,
)
from swarm_coordinator.db.archive import Archive, opened
from swarm_coordinator.db.tables import CONTRIBUTION, MOOT, AuditRow, EvaluationRow, NodeRow, RoundRow, VerdictRow
from swarm_coordinator.rounds import State
from swarm_protocol import encoding
from swarm_protocol.ancestry import Ancestor
from swarm_protocol.chunks import content_hash
from swarm_protocol.identity import peer_id
from swarm_protocol.policy import whose_turn
from swarm_protocol.records import (
    Addresses,
    Commitment,
    CommitmentSet,
    Comparison,
    Envelope,
    Equivocation,
    Outcome,
    PartRecord,
    RoundPlan,
    SketchFault,
    SketchSet,
    parse,
)
from swarm_protocol.spec import RunSpec

MAX_ITEMS = 500


def run_summary(spec: RunSpec, state: State) -> RunSummary:
    return RunSummary(
        run_id=spec.run_id.hex(),
        name=spec.name,
        protocol=spec.protocol,
        round=state.round,
        rounds=spec.rounds.count,
        phase=state.phase,
        nodes=len(state.nodes),
    )


def run_status(spec: RunSpec, state: State, archive: Archive, ancestors: Sequence[Ancestor] = ()) -> RunStatus:
    return RunStatus(
        run_id=spec.run_id.hex(),
        name=spec.name,
        protocol=spec.protocol,
        numerics=spec.numerics,
        coordinator=spec.coordinator,
        round=state.round,
        rounds=spec.rounds.count,
        phase=state.phase,
        phase_ends_ms=state.phase_ends_ms,
        paused=state.paused,
        ended=state.stopping,
        recovering=recovery.is_pending(archive),
        peers=way_in(archive),
        checkpoint=newest_checkpoint(spec, archive),
        parameters=spec.model.num_parameters,
        ancestors=ancestor_summaries(ancestors),
        registered=_registered(archive),
        nodes=_nodes(spec, archive),
        history=[round_summary(row, state.policy.parts) for row in archive.rounds(MAX_ITEMS)],
        evaluations=_evaluations(archive),
        audits=_audits(archive),
        part_audits=_outcomes(archive.count_audits(averages=True)),
        rejected=_rejected(archive),
        equivocations=_equivocations(archive),
    )


def ancestor_summaries(ancestors: Sequence[Ancestor]) -> list[AncestorSummary]:
    """The runs that a run comes from, as people read of them."""
    return [
        AncestorSummary(
            run_id=one.run.hex(),
            name=one.name,
            round=one.round,
            root=one.root.hex(),
            spec=content_hash(one.spec).hex(),
        )
        for one in ancestors
    ]


def newest_checkpoint(spec: RunSpec, archive: Archive) -> CheckpointName:
    """The checkpoint after the newest sealed round, or checkpoint 0."""
    row = archive.last_sealed()
    if row is None or row.root is None:
        return CheckpointName(round=0, root=spec.checkpoint)
    return CheckpointName(round=row.round + 1, root=row.root.hex())


def round_detail(archive: Archive, number: int) -> RoundDetail | None:
    """A round with its roster, part records and verdicts; None before its plan."""
    row = archive.round(number)
    if row is None:
        return None
    plan = archive.stored(RoundPlan, row.plan)
    return RoundDetail(
        round=number,
        base=plan.base.hex(),
        plan=row.plan.hex(),
        commit_by_ms=plan.commit_by_ms,
        exchange_by_ms=plan.exchange_by_ms,
        root=None if row.root is None else row.root.hex(),
        roster=_roster(archive, row, plan),
        part_records=_part_records(archive, row, plan),
        verdicts=[verdict_detail(verdict) for verdict in archive.round_verdicts(number)],
        evaluation=_evaluation(evaluations.of_round(archive.session, archive.run, number)),
    )


def verdict_detail(row: VerdictRow) -> VerdictDetail:
    return VerdictDetail(
        slot=row.slot,
        part=audited_part(row),
        auditor=peer_id(row.auditor),
        outcome=Outcome(row.outcome),
        comparison=None if row.comparison is None else Comparison(row.comparison),
        statistic=row.statistic,
        reason=row.reason,
        evidence=None if row.evidence is None else row.evidence.hex(),
    )


def way_in(archive: Archive) -> list[str]:
    newest = archive.newest(Addresses.kind, 1)
    record = opened(newest[0]) if newest else None
    return list(record.multiaddrs) if isinstance(record, Addresses) else []


def audited_part(row: AuditRow | VerdictRow) -> int | None:
    """The part whose average is audited; None where it is a contribution."""
    return None if row.part == CONTRIBUTION else row.part


def drawn_segments(row: AuditRow) -> list[int]:
    """The segments that an audit replays."""
    found = encoding.decode(row.segments, max_bytes=1 << 20)
    assert isinstance(found, list)
    return [int(index) for index in found if isinstance(index, int)]


def _nodes(spec: RunSpec, archive: Archive) -> list[NodeStatus]:
    newest = select(NodeRow).filter_by(run=archive.run).order_by(NodeRow.last_seen_ms.desc(), NodeRow.key)
    rows = archive.session.scalars(newest.limit(MAX_ITEMS)).all()
    return node_statuses(spec, archive, sorted(rows, key=lambda row: (row.registered_ms, row.key)))


def node_statuses(spec: RunSpec, archive: Archive, rows: Sequence[NodeRow]) -> list[NodeStatus]:
    """Identities as people read of them."""
    keys = [row.key for row in rows]
    waiting = select(AuditRow.peer, func.count()).where(AuditRow.run == archive.run, AuditRow.outcome.is_(None))
    waiting = waiting.where(AuditRow.peer.in_(keys)).group_by(AuditRow.peer)
    pending: dict[bytes, int] = dict(archive.session.execute(waiting).all())
    return [
        NodeStatus(
            peer=peer_id(row.key),
            name=row.name,
            device=row.device,
            standing="good" if row.ended_reason is None else "ended",
            reason=row.ended_reason,
            last_seen_ms=row.last_seen_ms,
            contributions=row.contributions,
            accepted=row.accepted,
            rejected=row.rejected,
            pending_audits=pending.get(row.key, 0),
            probation=row.vouched_tokens // spec.standard_tokens < spec.audit.probation,
            credit=Credit(pending=row.pending, settled=row.settled, forfeited=row.forfeited),
        )
        for row in rows
    ]


def open_audit(row: AuditRow, auditors: Iterable[bytes], verdicts: Mapping[bytes, Outcome]) -> OpenAudit:
    """An audit without an outcome, and whose turn it is."""
    return OpenAudit(
        round=row.round,
        slot=row.slot,
        part=audited_part(row),
        peer=row.peer.hex(),
        audited=row.audited.hex(),
        segments=drawn_segments(row),
        verdicts=len(verdicts),
        turn=whose_turn(row.audited, set(auditors) - {row.peer}, verdicts).hex(),
    )


def round_summary(row: RoundRow, parts: int) -> RoundSummary:
    assert row.root is not None
    return RoundSummary(
        round=row.round,
        slots=row.slots,
        committed=row.committed,
        parts=parts,
        missing_parts=row.missing_parts,
        root=row.root.hex(),
    )


def _registered(archive: Archive) -> int:
    return archive.session.scalar(select(func.count()).select_from(NodeRow).filter_by(run=archive.run)) or 0


def _evaluation(row: EvaluationRow | None) -> EvaluationSummary | None:
    if row is None:
        return None
    return EvaluationSummary(round=row.round, root=row.root.hex(), loss=row.loss, sample=row.sample)


def _evaluations(archive: Archive) -> list[EvaluationSummary]:
    rows = evaluations.newest(archive.session, archive.run, MAX_ITEMS)
    return [one for one in map(_evaluation, rows) if one is not None]


def _audits(archive: Archive) -> AuditCounts:
    comparisons = archive.count_comparisons()
    return AuditCounts(
        **_outcomes(archive.count_audits()).model_dump(),
        comparisons=Comparisons(
            equal=comparisons.get(Comparison.EQUAL, 0),
            different=comparisons.get(Comparison.DIFFERENT, 0),
            within=comparisons.get(Comparison.WITHIN, 0),
            outside=comparisons.get(Comparison.OUTSIDE, 0),
        ),
    )


def _outcomes(counts: dict[str | None, int]) -> OutcomeCounts:
    return OutcomeCounts(
        drawn=sum(counts.values()),
        pending=counts.get(None, 0),
        accepted=counts.get(Outcome.ACCEPTED, 0),
        rejected=counts.get(Outcome.REJECTED, 0),
        inconclusive=counts.get(Outcome.INCONCLUSIVE, 0),
        unavailable=counts.get(Outcome.UNAVAILABLE, 0),
        moot=counts.get(MOOT, 0),
    )


def _rejected(archive: Archive) -> list[Rejected]:
    return [
        Rejected(
            peer=peer_id(row.peer),
            name=_name(archive, row.peer),
            round=row.round,
            slot=row.slot,
            part=audited_part(row),
            reason=row.reason or "",
        )
        for row in archive.rejected(MAX_ITEMS)
    ]


def _equivocations(archive: Archive) -> list[EquivocationSummary]:
    found = []
    for row in archive.newest(Equivocation.kind, MAX_ITEMS)[::-1]:
        record = opened(row)
        assert isinstance(record, Equivocation)
        accused = Envelope.decode(record.first)
        found.append(
            EquivocationSummary(
                peer=accused.peer,
                name=_name(archive, accused.key),
                round=record.round,
                kind=parse(accused.body).kind,
                reporter=peer_id(row.signer),
                report=row.hash.hex(),
            )
        )
    return found


def _roster(archive: Archive, row: RoundRow, plan: RoundPlan) -> list[SlotDetail]:
    commitments: dict[int, Commitment] = {}
    if row.commitment_set is not None:
        committed = archive.stored(CommitmentSet, row.commitment_set).commitments
        commitments = {entry.slot: archive.stored(Commitment, entry.hash) for entry in committed}
    closed = archive.of_round(SketchSet.kind, row.round)
    closing = opened(closed[0]) if closed else None
    known, faults, chosen = set[int](), dict[int, SketchFault](), set[int]()
    if isinstance(closing, SketchSet):
        faults = {one.slot: one.fault for one in closing.excluded}
        known = {one.slot for one in closing.counted} | faults.keys()
        chosen = {one.slot for one in closing.selected}
    slots = []
    for slot, seat in enumerate(plan.roster):
        commitment, audit = commitments.get(slot), archive.audit(plan.round, slot)
        slots.append(
            SlotDetail(
                slot=slot,
                peer=peer_id(seat.peer),
                name=_name(archive, seat.peer),
                steps=seat.steps,
                weight=seat.weight,
                reducer=seat.reducer,
                commitment=None if commitment is None else commitment.hash.hex(),
                train_loss=None if commitment is None else commitment.train_loss,
                selected=slot in chosen if slot in known else None,
                sketch_fault=faults.get(slot),
                audit=_audit_outcome(audit),
                segments=None if audit is None else drawn_segments(audit),
            )
        )
    return slots


def _audit_outcome(audit: AuditRow | None) -> Outcome | Literal["pending", "moot"] | None:
    if audit is None:
        return None
    if audit.outcome is None:
        return "pending"
    return "moot" if audit.outcome == MOOT else Outcome(audit.outcome)


def _part_records(archive: Archive, row: RoundRow, plan: RoundPlan) -> list[PartRecordDetail]:
    chosen = encoding.decode(row.parts, max_bytes=1 << 24) if row.parts is not None else []
    counted = {name for name in chosen if isinstance(name, bytes)} if isinstance(chosen, list) else set()
    details = []
    for stored in archive.of_round(PartRecord.kind, row.round):
        record = opened(stored)
        slot = plan.slot_of(stored.signer)
        if isinstance(record, PartRecord) and slot is not None:
            details.append(
                PartRecordDetail(
                    hash=stored.hash.hex(),
                    part=record.part,
                    reducer=peer_id(stored.signer),
                    slots=list(record.slots),
                    size_bytes=record.size_bytes,
                    counted=stored.hash in counted,
                    audit=_audit_outcome(archive.audit(row.round, slot, record.part)),
                )
            )
    return details


def _name(archive: Archive, key: bytes) -> str:
    node = archive.node(key)
    return "" if node is None else node.name
