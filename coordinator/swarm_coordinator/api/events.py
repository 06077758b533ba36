"""The run as it happens: an event for every leaf of the log, in order, from the database, so that nobody misses one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent

from swarm_coordinator.api.access import TheRun
from swarm_coordinator.api.limits import MAX_WAIT_S, listening
from swarm_coordinator.api.models import LogEvent
from swarm_coordinator.api.problems import documented
from swarm_coordinator.db.archive import Archive, opened
from swarm_coordinator.db.tables import RecordRow
from swarm_protocol.identity import peer_id

AT_ONCE = 16
RETRY_MS = 2000
LONGEST_BYTES = 64

NAMED = {"run", "round", "sequence"}

router = APIRouter(prefix="/v1/runs/{run_id}")


@router.get(
    "/events",
    tags=["log"],
    summary="The run as it happens",
    description="Server-Sent Events, one for each leaf of the log: `id` is the leaf, `event` the kind of the record, `data` "
    "a LogEvent as JSON. Goes on after the leaf in Last-Event-ID, else after `after`, else with what comes next. A comment "
    "comes every 15 seconds in which nothing else does.",
    response_class=EventSourceResponse,
    responses=documented(404, 422),
    dependencies=[Depends(listening)],
)
async def events(
    run: TheRun,
    after: Annotated[int | None, Query(ge=-1, lt=1 << 62, description="the leaf to go on after")] = None,
    last_event_id: Annotated[
        str, Header(pattern=r"^[0-9]{0,18}$", description="the leaf that came last, as browsers send it")
    ] = "",
) -> AsyncIterator[ServerSentEvent]:
    last = int(last_event_id) if last_event_id else after
    leaf = run.log_head[0] if last is None else last + 1
    yield ServerSentEvent(comment=f"from leaf {leaf}", retry=RETRY_MS)

    def query(archive: Archive) -> Sequence[RecordRow] | None:
        return archive.leaves(leaf, AT_ONCE) or None

    while not run.stopping:
        for row in await run.poll("log", query, MAX_WAIT_S) or ():
            event = log_event(row)
            yield ServerSentEvent(id=str(event.leaf), event=event.kind, raw_data=event.model_dump_json())
            leaf = event.leaf + 1


def log_event(row: RecordRow) -> LogEvent:
    """A leaf as an event tells it."""
    assert row.leaf is not None
    fields = opened(row).model_dump(exclude=NAMED)
    return LogEvent(
        leaf=row.leaf,
        kind=row.kind,
        round=row.round,
        sequence=row.sequence,
        signer=peer_id(row.signer),
        hash=row.hash.hex(),
        record={name: _small(value) for name, value in fields.items()},
    )


def _small(value: Any) -> Any:
    match value:
        case bytes():
            return value.hex() if len(value) <= LONGEST_BYTES else {"size_bytes": len(value)}
        case list() | tuple() | dict():
            return {"count": len(value)}
    return value
