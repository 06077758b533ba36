"""Routes about the chain of checkpoints: what each is called, what it was made from, and whether it is kept whole."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Response

from swarm_coordinator.api.access import CBOR, Hash, IfNoneMatch, TheRun, binary, get_and_head, missing, unchanging
from swarm_coordinator.api.models import CheckpointEntry, CheckpointPage
from swarm_coordinator.api.pages import PAGE, Limit
from swarm_coordinator.api.problems import documented
from swarm_coordinator.db.archive import Archive
from swarm_protocol import encoding, parts
from swarm_protocol.records import CheckpointManifest
from swarm_protocol.spec import RunSpec

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["objects"])


@router.get(
    "/checkpoints",
    summary="The chain of checkpoints, newest first",
    description="Each is kept whole, or is made from the one before it and the averages of the round between them.",
    responses=documented(404, 422),
)
async def checkpoints(
    run: TheRun,
    before: Annotated[int | None, Query(ge=0, lt=1 << 31, description="only checkpoints before this one")] = None,
    limit: Limit = PAGE,
) -> CheckpointPage:
    def query(archive: Archive) -> list[CheckpointEntry]:
        return [_entry(run.spec, archive, one) for one in archive.checkpoints(before, limit + 1)]

    found = await run.read(query)
    page = found[:limit]
    whole = await asyncio.to_thread(run.store.whole, [bytes.fromhex(one.root) for one in page])
    for one in page:
        one.whole = bytes.fromhex(one.root) in whole
    return CheckpointPage(checkpoints=page, next=page[-1].round if len(found) > limit else None)


@get_and_head(
    router,
    "/checkpoints/{root}/manifest",
    summary="What the coordinator signed of a checkpoint",
    description="Where several rounds start from the same checkpoint, of the first of them.",
    response_class=Response,
    responses=binary(CBOR, "the encoded Envelope of a CheckpointManifest", unchanging=True),
)
async def manifest(run: TheRun, root: Hash, if_none_match: IfNoneMatch = None) -> Response:
    def query(archive: Archive) -> bytes | None:
        number = checkpoint_round(run.spec, archive, bytes.fromhex(root))
        row = None if number is None else archive.checkpoint(number)
        return None if row is None else row.envelope

    found = await run.read(query)
    if found is None:
        raise missing(f"checkpoint {root}")
    return unchanging(found, if_none_match, bytes.fromhex(root))


def checkpoint_round(spec: RunSpec, archive: Archive, root: bytes) -> int | None:
    """The first round that starts from this checkpoint; None if none does."""
    return 0 if root.hex() == spec.checkpoint else archive.round_of(root)


def _entry(spec: RunSpec, archive: Archive, record: CheckpointManifest) -> CheckpointEntry:
    before = None if record.round == 0 else archive.round(record.round - 1)
    delta_bytes = None
    if before is not None and before.parts is not None:
        named = encoding.decode(before.parts, max_bytes=len(before.parts))
        assert isinstance(named, list)
        delta_bytes = sum(parts.encoded_part_bytes(spec, part) for part, name in enumerate(named) if name is not None)
    return CheckpointEntry(
        round=record.round,
        root=record.root.hex(),
        parent=None if record.parent is None else record.parent.hex(),
        manifest=record.hash.hex(),
        size_bytes=record.size_bytes,
        whole=False,
        delta_bytes=delta_bytes,
    )
