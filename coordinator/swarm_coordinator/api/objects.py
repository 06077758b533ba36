"""Routes that serve bytes by their hash: the last source of checkpoints, data and averages."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import StreamingResponse

from swarm_coordinator.api.access import (
    OCTETS,
    UNCHANGING,
    Hash,
    IfNoneMatch,
    TheRun,
    binary,
    get_and_head,
    has_it,
    missing,
    unchanging,
)
from swarm_coordinator.api.checkpoints import checkpoint_round
from swarm_coordinator.api.models import CheckpointName
from swarm_coordinator.api.problems import documented, problem
from swarm_coordinator.api.status import newest_checkpoint
from swarm_coordinator.store import Store
from swarm_protocol.errors import RefusedError

PIECE_BYTES = 1 << 20

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["objects"])


@router.get("/checkpoints/latest", summary="The newest sealed checkpoint", responses=documented(404, 422))
async def latest_checkpoint(run: TheRun) -> CheckpointName:
    return await run.read(lambda archive: newest_checkpoint(run.spec, archive))


@get_and_head(
    router,
    "/checkpoints/{root}",
    summary="The chunk hashes of a checkpoint",
    description="404 with the code `not-whole` for one that is no longer kept whole: it is made from an older one and the "
    "averages of the rounds between (`/checkpoints`).",
    response_class=Response,
    responses=binary(OCTETS, "an encoded StateManifest, whose root is the one asked for", unchanging=True),
)
async def checkpoint(run: TheRun, root: Hash, if_none_match: IfNoneMatch = None) -> Response:
    name = bytes.fromhex(root)
    manifest = await asyncio.to_thread(run.store.get_checkpoint, name)
    if manifest is None:
        number = await run.read(lambda archive: checkpoint_round(run.spec, archive, name))
        raise missing(f"checkpoint {root}") if number is None else _not_whole(number, root)
    return unchanging(manifest, if_none_match, bytes.fromhex(root), OCTETS)


@get_and_head(
    router,
    "/chunks/{digest}",
    summary="A blob, by its BLAKE3 hash",
    description="A chunk of a checkpoint, a data shard, the dataset's manifest, or the average of a part. It never changes. "
    "One range of bytes may be asked for; of several, all is sent.",
    response_class=Response,
    responses={
        **binary(OCTETS, "the whole blob", 416, unchanging=True),
        206: {"description": "the range", "content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}}},
    },
)
async def chunk(
    request: Request,
    run: TheRun,
    digest: Hash,
    range_: Annotated[str | None, Header(alias="range")] = None,
    if_range: Annotated[str | None, Header(description="the ETag for which the range is meant")] = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    name = bytes.fromhex(digest)
    size_bytes = await asyncio.to_thread(run.store.size_bytes, name)
    if size_bytes is None:
        raise missing(f"blob {digest}")
    headers = {
        "etag": f'"{digest}"',
        "cache-control": UNCHANGING,
        "accept-ranges": "bytes",
    }
    if has_it(if_none_match, name):
        return Response(status_code=304, headers=headers)
    if if_range is not None and if_range != headers["etag"]:
        range_ = None
    start, end = _range(range_, size_bytes)
    if start >= end and range_ is not None:
        return problem(
            416, "no-such-range", f"the blob has {size_bytes} bytes", {"content-range": f"bytes */{size_bytes}"}
        )
    partial = (start, end) != (0, size_bytes)
    if partial:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size_bytes}"
    headers["content-length"] = str(end - start)
    status = 206 if partial else 200
    if request.method == "HEAD":
        return Response(None, status, headers, OCTETS)
    return StreamingResponse(_pieces(run.store, name, start, end), status, headers, OCTETS)


def _not_whole(number: int, root: str) -> RefusedError:
    return RefusedError(
        f"checkpoint {number} ({root[:12]}) is not kept whole any more: make it from an older one and the averages of the "
        "rounds between, see /checkpoints",
        status=404,
        code="not-whole",
    )


async def _pieces(store: Store, digest: bytes, start: int, end: int) -> AsyncIterator[bytes]:
    while start < end:
        stop = min(start + PIECE_BYTES, end)
        piece = await asyncio.to_thread(store.get_range, digest, start, stop)
        if piece is None:
            raise missing(f"blob {digest.hex()}")
        yield piece
        start = stop


def _range(header: str | None, size_bytes: int) -> tuple[int, int]:
    """[start, end) of a single range (RFC 9110, section 14.1.2); the whole blob where the header asks for none that we know.

    Empty if the range cannot be satisfied.
    """
    match = re.fullmatch(r"bytes=(\d{0,19})-(\d{0,19})", header or "")
    if match is None or match.group(0) == "bytes=-":
        return 0, size_bytes
    first, last = match.groups()
    if not first:
        return max(0, size_bytes - int(last)), size_bytes
    if last and int(last) < int(first):
        return 0, size_bytes
    return int(first), min(int(last) + 1, size_bytes) if last else size_bytes
