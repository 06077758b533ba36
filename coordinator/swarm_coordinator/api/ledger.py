"""Routes about credit: who contributed what, the ledger's entries, certificates, teams. Amounts are whole megaflops."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field
from sqlalchemy import func, select

from swarm_coordinator.api.access import TheRun, missing
from swarm_coordinator.api.models import Hex, PeerID
from swarm_coordinator.api.problems import documented
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.tables import CreditRow, LedgerRow, NodeRow
from swarm_protocol.certificate import Certificate
from swarm_protocol.errors import InvalidDataError, RefusedError
from swarm_protocol.identity import peer_id, public_key_of

MAX_CONTRIBUTORS = 1000
MAX_LEDGER_ENTRIES = 1000
DEFAULT_LIMIT = 100

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["credit"])

Whose = Annotated[
    str,
    Path(
        alias="peer",
        pattern=r"^([0-9a-f]{64}|12D3KooW[1-9A-HJ-NP-Za-km-z]{44})$",
        description="a PeerID, or the key in lower-case hex",
    ),
]
After = Annotated[str | None, Query(pattern=r"^[0-9a-f]{64}$", description="the key after which to go on")]
Megaflops = Annotated[int, Field(ge=0, description="millions of floating point operations")]


class Contributor(BaseModel):
    key: Hex
    peer: PeerID
    name: str
    team: str = Field(description="empty for none; for what it earns from now on")
    standing: Literal["good", "ended"]
    pending: Megaflops
    settled: Megaflops
    forfeited: Megaflops
    contributions: int = Field(description="commitments that counted")
    accepted: int = Field(description="contributions that an audit accepted")


class Contributors(BaseModel):
    contributors: list[Contributor] = Field(description="in the order of their keys")
    next: Hex | None = Field(description="`after` of the next page; null if this is the last one")


class LedgerEntry(BaseModel):
    """A movement out of one account and into another."""

    seq: int
    round: int
    slot: int
    debit: Literal["run", "pending", "settled", "forfeited"] = Field(description="the account that it left")
    credit: Literal["run", "pending", "settled", "forfeited"] = Field(description="the account that it came to")
    megaflops: Megaflops
    commitment: Hex = Field(description="the hash of the contribution's commitment")
    cause: Hex = Field(description="the hash of the record that it follows from")
    leaf: int = Field(description="that record's place in the log")
    statement: int | None = Field(description="the number of the signed statement that names it; null until one does")


class LedgerEntries(BaseModel):
    entries: list[LedgerEntry] = Field(description="as they were booked")
    next: int | None = Field(description="`after` of the next page; null if this is the last one")


class Team(BaseModel):
    team: str
    members: int = Field(description="identities that earned something for it")
    contributions: int
    pending: Megaflops
    settled: Megaflops
    forfeited: Megaflops


@router.get("/contributors", summary="Who takes part, and what they earned", responses=documented(404, 422))
async def contributors(
    run: TheRun, after: After = None, limit: Annotated[int, Query(ge=1, le=MAX_CONTRIBUTORS)] = DEFAULT_LIMIT
) -> Contributors:
    def query(archive: Archive) -> Contributors:
        rows = select(NodeRow).filter_by(run=archive.run).order_by(NodeRow.key).limit(limit + 1)
        if after is not None:
            rows = rows.where(NodeRow.key > bytes.fromhex(after))
        found = [_contributor(row) for row in archive.session.scalars(rows)]
        return Contributors(contributors=found[:limit], next=found[limit - 1].key if len(found) > limit else None)

    return await run.read(query)


@router.get("/contributors/{peer}", summary="One who takes part", responses=documented(404, 422))
async def contributor(run: TheRun, peer: Whose) -> Contributor:
    key = _key(peer)
    row = await run.read(lambda archive: archive.node(key))
    if row is None:
        raise missing(f"contributor {peer}")
    return _contributor(row)


@router.get(
    "/contributors/{peer}/entries",
    summary="The ledger's entries of a contributor",
    description="Each names its contribution's commitment, and the record that it follows from with its leaf of the log.",
    responses=documented(404, 422),
)
async def entries(
    run: TheRun,
    peer: Whose,
    after: Annotated[int | None, Query(ge=0, lt=1 << 62, description="the `seq` after which to go on")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LEDGER_ENTRIES)] = DEFAULT_LIMIT,
) -> LedgerEntries:
    key = _key(peer)

    def query(archive: Archive) -> LedgerEntries | None:
        if archive.node(key) is None:
            return None
        rows = select(LedgerRow).filter_by(run=archive.run, peer=key).order_by(LedgerRow.seq).limit(limit + 1)
        if after is not None:
            rows = rows.where(LedgerRow.seq > after)
        found = [_entry(row) for row in archive.session.scalars(rows)]
        return LedgerEntries(entries=found[:limit], next=found[limit - 1].seq if len(found) > limit else None)

    answer = await run.read(query)
    if answer is None:
        raise missing(f"contributor {peer}")
    return answer


@router.get(
    "/contributors/{peer}/certificate",
    summary="A certificate of a contributor's credit",
    description="For a third party to check offline: `swarm-node verify certificate FILE`. 404 until a signed statement has "
    "the contributor's balance.",
    responses=documented(404, 422),
)
async def certificate(run: TheRun, peer: Whose) -> Certificate:
    found = await run.certificate(_key(peer))
    if found is None:
        raise RefusedError(f"no signed statement has credit of {peer} yet; try later", status=404, code="not-found")
    return found


@router.get("/teams", summary="What teams earned", responses=documented(404, 422))
async def teams(run: TheRun) -> list[Team]:
    def query(archive: Archive) -> list[Team]:
        mine = (CreditRow.run == archive.run, CreditRow.team != "")
        counts = select(CreditRow.team, func.count(CreditRow.peer.distinct())).where(*mine).group_by(CreditRow.team)
        members = {team: int(count) for team, count in archive.session.execute(counts)}
        found = {
            team: Team(team=team, members=count, contributions=0, pending=0, settled=0, forfeited=0)
            for team, count in sorted(members.items())
        }
        sums = select(CreditRow.team, CreditRow.status, func.count(), func.sum(CreditRow.megaflops)).where(*mine)
        for team, status, count, amount in archive.session.execute(sums.group_by(CreditRow.team, CreditRow.status)):
            found[team].contributions += int(count)
            setattr(found[team], status, int(amount))
        return list(found.values())

    return await run.read(query)


def _key(peer: str) -> bytes:
    try:
        return bytes.fromhex(peer) if len(peer) == 64 else public_key_of(peer)
    except (ValueError, InvalidDataError, OverflowError):
        raise RefusedError(f"{peer} is neither a PeerID nor a key in hex", status=404, code="bad-peer") from None


def _contributor(row: NodeRow) -> Contributor:
    return Contributor(
        key=row.key.hex(),
        peer=peer_id(row.key),
        name=row.name,
        team=row.team,
        standing="good" if row.ended_reason is None else "ended",
        pending=row.pending,
        settled=row.settled,
        forfeited=row.forfeited,
        contributions=row.contributions,
        accepted=row.accepted,
    )


def _entry(row: LedgerRow) -> LedgerEntry:
    return LedgerEntry.model_validate(
        {
            "seq": row.seq,
            "round": row.round,
            "slot": row.slot,
            "debit": row.debit,
            "credit": row.credit,
            "megaflops": row.megaflops,
            "commitment": row.commitment.hex(),
            "cause": row.cause.hex(),
            "leaf": row.leaf,
            "statement": row.statement,
        }
    )
