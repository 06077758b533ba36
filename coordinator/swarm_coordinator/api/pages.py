"""Lists that grow with the run, a page at a time: rounds, nodes, verdicts; and the audits that are open."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import select

from swarm_coordinator.api.access import Hash, TheRun, missing
from swarm_coordinator.api.models import NodePage, NodeStatus, OpenAudit, RoundPage, VerdictEntry, VerdictPage
from swarm_coordinator.api.problems import documented
from swarm_coordinator.api.status import MAX_ITEMS, node_statuses, open_audit, round_summary
from swarm_coordinator.db.archive import Archive, opened
from swarm_coordinator.db.tables import AuditRow, NodeRow, RecordRow, RoundRow, VerdictRow
from swarm_protocol.identity import peer_id
from swarm_protocol.records import Outcome, PartVerdict, Role, Verdict

PAGE = 100

Limit = Annotated[int, Query(ge=1, le=MAX_ITEMS, description="how many at most")]

router = APIRouter(prefix="/v1/runs/{run_id}")


@router.get("/rounds", tags=["rounds"], summary="Sealed rounds, newest first", responses=documented(404, 422))
async def rounds(
    run: TheRun,
    before: Annotated[int | None, Query(ge=0, lt=1 << 31, description="only rounds before this one")] = None,
    limit: Limit = PAGE,
) -> RoundPage:
    def query(archive: Archive) -> RoundPage:
        sealed = select(RoundRow).where(RoundRow.run == archive.run, RoundRow.root.is_not(None))
        if before is not None:
            sealed = sealed.where(RoundRow.round < before)
        rows = archive.session.scalars(sealed.order_by(RoundRow.round.desc()).limit(limit + 1)).all()
        page = [round_summary(row, run.state.policy.parts) for row in rows[:limit]]
        return RoundPage(rounds=page, next=page[-1].round if len(rows) > limit else None)

    return await run.read(query)


@router.get("/nodes", tags=["nodes"], summary="All identities that ever registered", responses=documented(404, 422))
async def nodes(
    run: TheRun,
    after: Annotated[
        str | None, Query(pattern=r"^[0-9a-f]{64}$", description="only keys after this one, in hex")
    ] = None,
    limit: Limit = PAGE,
) -> NodePage:
    def query(archive: Archive) -> NodePage:
        registered = select(NodeRow).where(NodeRow.run == archive.run)
        if after is not None:
            registered = registered.where(NodeRow.key > bytes.fromhex(after))
        rows = archive.session.scalars(registered.order_by(NodeRow.key).limit(limit + 1)).all()
        page = rows[:limit]
        more = page[-1].key.hex() if len(rows) > limit else None
        return NodePage(nodes=node_statuses(run.spec, archive, page), next=more)

    return await run.read(query)


@router.get("/nodes/{key}", tags=["nodes"], summary="An identity", responses=documented(404, 422))
async def node(run: TheRun, key: Hash) -> NodeStatus:
    def query(archive: Archive) -> NodeStatus:
        row = archive.node(bytes.fromhex(key))
        if row is None:
            raise missing(f"node {key}")
        return node_statuses(run.spec, archive, [row])[0]

    return await run.read(query)


@router.get(
    "/challenges",
    tags=["audits"],
    summary="Open audits: whose evidence is wanted",
    description="Those of contributions and of averages without an outcome, oldest first, at most 500.",
    responses=documented(404, 422),
)
async def challenges(
    run: TheRun,
    round_number: Annotated[
        int | None, Query(alias="round", ge=0, lt=1 << 31, description="only those of this round")
    ] = None,
) -> list[OpenAudit]:
    def query(archive: Archive) -> list[OpenAudit]:
        wanted = select(AuditRow).where(AuditRow.run == archive.run, AuditRow.outcome.is_(None))
        given = select(VerdictRow).where(VerdictRow.run == archive.run)
        if round_number is not None:
            wanted, given = wanted.where(AuditRow.round == round_number), given.where(VerdictRow.round == round_number)
        order = (AuditRow.round, AuditRow.slot, AuditRow.part)
        rows = archive.session.scalars(wanted.order_by(*order).limit(MAX_ITEMS)).all()
        given = given.where(VerdictRow.round.in_({row.round for row in rows}))
        verdicts: dict[tuple[int, int, int], dict[bytes, Outcome]] = {}
        for verdict in archive.session.scalars(given):
            said = verdicts.setdefault((verdict.round, verdict.slot, verdict.part), {})
            said[verdict.auditor] = Outcome(verdict.outcome)
        auditors = archive.offices(Role.AUDITOR)
        return [open_audit(row, auditors, verdicts.get((row.round, row.slot, row.part), {})) for row in rows]

    return await run.read(query)


@router.get("/verdicts", tags=["audits"], summary="What auditors said", responses=documented(404, 422))
async def verdicts(
    run: TheRun,
    after: Annotated[int, Query(ge=-1, lt=1 << 62, description="only those after this leaf of the log")] = -1,
    limit: Limit = PAGE,
) -> VerdictPage:
    def query(archive: Archive) -> VerdictPage:
        kinds = (Verdict.kind, PartVerdict.kind)
        given = select(RecordRow).where(RecordRow.run == archive.run, RecordRow.leaf > after, RecordRow.kind.in_(kinds))
        rows = archive.session.scalars(given.order_by(RecordRow.leaf).limit(limit + 1)).all()
        page = [_entry(row) for row in rows[:limit]]
        return VerdictPage(verdicts=page, next=page[-1].leaf if len(rows) > limit else None)

    return await run.read(query)


def _entry(row: RecordRow) -> VerdictEntry:
    record = opened(row)
    assert isinstance(record, Verdict | PartVerdict)
    assert row.leaf is not None
    contribution = record if isinstance(record, Verdict) else None
    return VerdictEntry(
        leaf=row.leaf,
        hash=row.hash.hex(),
        round=record.round,
        slot=record.slot,
        part=record.part if isinstance(record, PartVerdict) else None,
        auditor=peer_id(row.signer),
        outcome=record.outcome,
        comparison=contribution and contribution.comparison,
        statistic=contribution and contribution.statistic,
        reason=record.reason,
        evidence=None if record.evidence is None else record.evidence.hex(),
    )
