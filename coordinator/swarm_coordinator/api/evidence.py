"""Routes about archived evidence: what rejections were judged by, and how its pieces come in."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Path, Request, Response

from swarm_coordinator import kept_evidence
from swarm_coordinator.api.access import OCTETS, Hash, RoundNumber, TheRun, missing
from swarm_coordinator.api.limits import TheDesk, bounded_body
from swarm_coordinator.api.models import ArchivedEvidence, EvidenceDetail, EvidenceItemDetail, EvidencePiece
from swarm_coordinator.api.problems import documented
from swarm_coordinator.api.status import verdict_detail
from swarm_coordinator.db.archive import Archive
from swarm_protocol.chunks import StateManifest, content_hash
from swarm_protocol.errors import RefusedError
from swarm_protocol.identity import peer_id
from swarm_protocol.records import MAX_SLOTS, Evidence, EvidenceItem, Outcome

AGAINST = (Outcome.REJECTED, Outcome.UNAVAILABLE)

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["audits"])

Slot = Annotated[int, Path(ge=0, lt=MAX_SLOTS)]


@router.get(
    "/audits/{number}/{slot}/evidence",
    summary="What the verdicts against a slot were judged by",
    description="Of a slot's contribution, and of averages that it made. `swarm-node verify evidence` judges again by it.",
    responses=documented(404, 422),
)
async def archived(run: TheRun, number: RoundNumber, slot: Slot) -> ArchivedEvidence:
    def query(archive: Archive) -> ArchivedEvidence | None:
        if not archive.was_audited(number, slot):
            return None
        given = [one for one in archive.round_verdicts(number) if one.slot == slot and one.outcome in AGAINST]
        return ArchivedEvidence(
            round=number,
            slot=slot,
            evidence=[
                _detail(archive, one.auditor, archive.stored(Evidence, one.evidence))
                for one in given
                if one.evidence is not None
            ],
            without=[verdict_detail(one) for one in given if one.evidence is None],
        )

    found = await run.read(query)
    if found is None:
        raise missing(f"audit of slot {slot} in round {number}")
    return found


@router.put(
    "/evidence/{digest}",
    summary="Hand in a piece of evidence",
    description="The bytes of a piece that an accepted `evidence` record names, of exactly the length that follows from it. "
    "One that is there already is not read again.",
    status_code=201,
    response_class=Response,
    responses={
        200: {"description": "It was there already"},
        **documented(400, 404, 408, 411, 413, 422),
    },
    openapi_extra={
        "requestBody": {"required": True, "content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def hand_in(
    run: TheRun,
    desk: TheDesk,
    request: Request,
    digest: Hash,
    content_length: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Response:
    name = bytes.fromhex(digest)
    size_bytes = await run.read(lambda archive: kept_evidence.size_bytes(archive.session, archive.run, name))
    if size_bytes is None:
        raise missing(f"evidence record that names {digest}")
    if content_length is None:
        raise RefusedError("say how long the piece is, with Content-Length", status=411, code="length-required")
    if content_length != str(size_bytes):
        raise RefusedError(f"the piece has {size_bytes} bytes, not {content_length}", status=422, code="wrong-size")
    if await asyncio.to_thread(run.store.exists, name):
        return Response(status_code=200)
    data = await bounded_body(request, desk.limits)
    if content_hash(data) != name:
        raise RefusedError("these bytes have another hash", status=422, code="wrong-hash")
    await asyncio.to_thread(run.store.put, name, data)
    return Response(status_code=201)


def _detail(archive: Archive, auditor: bytes, record: Evidence) -> EvidenceDetail:
    return EvidenceDetail(
        hash=record.hash.hex(),
        auditor=peer_id(auditor),
        part=record.part,
        segment=record.segment,
        items=[_item(archive.run, item) for item in record.items],
    )


def _item(run: bytes, item: EvidenceItem) -> EvidenceItemDetail:
    manifest = StateManifest(item.size_bytes, item.chunks)
    pieces = [
        EvidencePiece(
            hash=digest.hex(),
            size_bytes=manifest.chunk_size(index),
            href=f"/v1/runs/{run.hex()}/chunks/{digest.hex()}",
        )
        for index, digest in enumerate(item.chunks)
    ]
    return EvidenceItemDetail(name=item.name, size_bytes=item.size_bytes, pieces=pieces)
