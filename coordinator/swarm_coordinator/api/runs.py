"""Routes about the run as a whole: its spec, its status, a record by its hash, its log."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from swarm_coordinator.api.access import (
    CBOR,
    Hash,
    IfNoneMatch,
    TheRun,
    Wait,
    binary,
    get_and_head,
    missing,
    served,
    unchanging,
)
from swarm_coordinator.api.models import AncestorList, GossipAddresses, LogHead, LogProof, Peers, RunStatus, RunSummary
from swarm_coordinator.api.problems import documented
from swarm_coordinator.api.status import ancestor_summaries, run_status, run_summary, way_in
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.recovery import is_pending
from swarm_protocol.records import Envelope, encode_list

MAX_ENTRIES = 256
MAX_ENTRIES_BYTES = 8 << 20
PEERS_AGE_S = 2.0

LogSize = Annotated[int, Query(ge=0, lt=1 << 62)]

router = APIRouter()


@router.get("/v1/runs", tags=["runs"], summary="The runs that are served here")
async def runs(request: Request) -> list[RunSummary]:
    return [run_summary(service.spec, service.state) for service in served(request)]


@router.get("/v1/runs/{run_id}", tags=["runs"], summary="Where a run is", responses=documented(404, 422))
async def status(run: TheRun) -> RunStatus:
    return await run.read(lambda archive: run_status(run.spec, run.state, archive, run.ancestors))


@router.get(
    "/v1/runs/{run_id}/ancestors",
    tags=["runs"],
    summary="The runs that this one comes from",
    description="Nearest first. Each spec names the run before it, so that the chain is checked by hashing.",
    responses=documented(404, 422),
)
async def ancestors(run: TheRun) -> AncestorList:
    return AncestorList(ancestors=ancestor_summaries(run.ancestors))


@router.get(
    "/v1/runs/{run_id}/peers",
    tags=["runs"],
    summary="The peer plane's way in",
    description=f"May be {PEERS_AGE_S:g} s old.",
    responses=documented(404, 422),
)
async def peers(run: TheRun) -> Peers:
    def query(archive: Archive) -> Peers:
        return Peers(peers=way_in(archive), recovering=is_pending(archive))

    return await run.recent("peers", query, PEERS_AGE_S)


@router.get(
    "/v1/runs/{run_id}/gossip",
    tags=["runs"],
    summary="The gossip plane's way in",
    description="`swarm-node observe` follows a run from there.",
    responses=documented(404, 422),
)
async def gossip(run: TheRun) -> GossipAddresses:
    return GossipAddresses(multiaddrs=await asyncio.to_thread(run.gossip))


@get_and_head(
    router,
    "/v1/runs/{run_id}/spec",
    tags=["runs"],
    summary="The RunSpec",
    description="Canonical bytes, whose hash is the run id.",
    response_class=Response,
    responses=binary(CBOR, "the canonical bytes of the spec", unchanging=True),
)
async def spec(run: TheRun, if_none_match: IfNoneMatch = None) -> Response:
    return unchanging(run.spec.encode(), if_none_match, run.spec.run_id)


@get_and_head(
    router,
    "/v1/runs/{run_id}/records/{digest}",
    tags=["records"],
    summary="A signed record, by its hash",
    response_class=Response,
    responses=binary(CBOR, "the encoded Envelope", unchanging=True),
)
async def record(run: TheRun, digest: Hash, if_none_match: IfNoneMatch = None) -> Response:
    found = await run.read(lambda archive: archive.by_hash(bytes.fromhex(digest)))
    if found is None:
        raise missing(f"record {digest}")
    return unchanging(found.envelope, if_none_match, found.hash)


@router.get(
    "/v1/runs/{run_id}/log/head",
    tags=["log"],
    summary="Size and root of the transparency log",
    description="With `after` it waits until the log has more leaves than that; if none come, the head is as it was.",
    responses=documented(404, 422),
)
async def log_head(run: TheRun, wait_s: Wait, after: LogSize | None = None) -> LogHead:
    if after is not None:
        await run.poll("log", lambda archive: True if run.log_head[0] > after else None, wait_s)
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
