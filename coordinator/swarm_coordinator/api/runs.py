"""Routes about the run as a whole: its spec, its status, its records, its log."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from swarm_coordinator.api.access import CBOR, Hash, TheRun, binary, missing
from swarm_coordinator.api.models import Health, LogHead, LogProof, ReceiptModel, RunStatus, RunSummary
from swarm_coordinator.api.problems import documented
from swarm_coordinator.api.status import run_status, run_summary
from swarm_coordinator.service import Service
from swarm_protocol.errors import RefusedError
from swarm_protocol.records import MAX_RECORD_BYTES, Envelope, encode_list

MAX_ENTRIES = 256
MAX_ENTRIES_BYTES = 8 << 20

LogSize = Annotated[int, Query(ge=0, lt=1 << 62)]

router = APIRouter()


@router.get("/healthz", tags=["health"], summary="Is the coordinator up?")
async def health() -> Health:
    return Health()


@router.get("/v1/runs", tags=["runs"], summary="The runs that are served here")
async def runs(request: Request) -> list[RunSummary]:
    service = request.app.state.service
    assert isinstance(service, Service)
    return [run_summary(service.spec, service.state)]


@router.get("/v1/runs/{run_id}", tags=["runs"], summary="Where a run is", responses=documented(404, 422))
async def status(run: TheRun) -> RunStatus:
    return await run.read(lambda archive: run_status(run.spec, run.state, archive))


@router.get(
    "/v1/runs/{run_id}/spec",
    tags=["runs"],
    summary="The RunSpec",
    description="Canonical bytes, whose hash is the run id.",
    response_class=Response,
    responses=binary(CBOR, "the canonical bytes of the spec"),
)
async def spec(run: TheRun) -> Response:
    return Response(run.spec.encode(), media_type=CBOR)


@router.post(
    "/v1/runs/{run_id}/records",
    tags=["records"],
    summary="Hand in a signed record",
    description="An encoded Envelope of at most 1 MiB. 201 for a new record; 200, with the same receipt, for one that was "
    "accepted before; 409 with the code `equivocation` for another one under the same name. Heartbeats are not kept, and are "
    "always new. A registration carries the "
    "run's token, if it has one, as a bearer token.",
    status_code=201,
    responses={
        200: {"model": ReceiptModel, "description": "It had been accepted before"},
        **documented(400, 401, 403, 404, 409, 410, 413, 422, 426),
    },
    openapi_extra={
        "requestBody": {"required": True, "content": {CBOR: {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def submit(
    run: TheRun, request: Request, response: Response, authorization: Annotated[str | None, Header()] = None
) -> ReceiptModel:
    scheme, _, token = (authorization or "").partition(" ")
    receipt = await run.submit(await _bounded_body(request), token.strip() if scheme.lower() == "bearer" else None)
    response.status_code = 201 if receipt.new else 200
    signed = None if receipt.signed is None else receipt.signed.hex()
    return ReceiptModel(hash=receipt.hash.hex(), kind=receipt.kind, leaf=receipt.leaf, receipt=signed)


@router.get(
    "/v1/runs/{run_id}/records/{digest}",
    tags=["records"],
    summary="A signed record, by its hash",
    response_class=Response,
    responses=binary(CBOR, "the encoded Envelope"),
)
async def record(run: TheRun, digest: Hash) -> Response:
    found = await run.read(lambda archive: archive.by_hash(bytes.fromhex(digest)))
    if found is None:
        raise missing(f"record {digest}")
    return Response(found.envelope, media_type=CBOR)


@router.get(
    "/v1/runs/{run_id}/log/head",
    tags=["log"],
    summary="Size and root of the transparency log",
    responses=documented(404, 422),
)
async def log_head(run: TheRun) -> LogHead:
    size, root, signed = run.signed_head()
    return LogHead(size=size, root=root.hex(), signed=signed.hex())


@router.get(
    "/v1/runs/{run_id}/log/inclusion",
    tags=["log"],
    summary="A proof that a leaf is in the log",
    description="Of a log of `size` leaves, by default of all; RFC 9162, section 2.1.3.",
    responses=documented(404, 422),
)
async def log_inclusion(run: TheRun, leaf: LogSize, size: LogSize | None = None) -> LogProof:
    size, proof = run.inclusion_proof(leaf, size)
    return LogProof(size=size, proof=[digest.hex() for digest in proof])


@router.get(
    "/v1/runs/{run_id}/log/consistency",
    tags=["log"],
    summary="A proof that the log extends an earlier one",
    description="That the log of `size` leaves, by default all, begins with that of `old`; RFC 9162, section 2.1.4.",
    responses=documented(404, 422),
)
async def log_consistency(run: TheRun, old: LogSize, size: LogSize | None = None) -> LogProof:
    size, proof = run.consistency_proof(old, size)
    return LogProof(size=size, proof=[digest.hex() for digest in proof])


@router.get(
    "/v1/runs/{run_id}/log/entries",
    tags=["log"],
    summary="Entries of the transparency log",
    description="A CBOR list of encoded Envelopes, from leaf `start` on; it may hold fewer than `count`. A leaf's data is "
    "the encoded Envelope, hashed as in RFC 6962.",
    response_class=Response,
    responses=binary(CBOR, "a list of encoded Envelopes"),
)
async def log_entries(
    run: TheRun,
    start: Annotated[int, Query(ge=0, lt=1 << 62)] = 0,
    count: Annotated[int, Query(ge=1, le=MAX_ENTRIES)] = MAX_ENTRIES,
) -> Response:
    rows = await run.read(lambda archive: archive.leaves(start, count))
    envelopes: list[Envelope] = []
    size_bytes = 0
    for row in rows:
        size_bytes += len(row.envelope)
        if envelopes and size_bytes > MAX_ENTRIES_BYTES:
            break
        envelopes.append(Envelope.decode(row.envelope))
    return Response(encode_list(envelopes), media_type=CBOR)


async def _bounded_body(request: Request) -> bytes:
    """The request's body, never more of it than a record may have."""
    too_long = RefusedError(f"a record has at most {MAX_RECORD_BYTES} bytes", status=413, code="too-long")
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > MAX_RECORD_BYTES:
        raise too_long
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_RECORD_BYTES:
            raise too_long
    return bytes(body)
