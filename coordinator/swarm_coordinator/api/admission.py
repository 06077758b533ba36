"""Where a node stands on its way to a slot, and in which words it is told so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal
from weakref import WeakKeyDictionary

from fastapi import APIRouter

from swarm_coordinator import recovery
from swarm_coordinator.admission import finished
from swarm_coordinator.api.access import Hash, TheRun
from swarm_coordinator.api.models import Place
from swarm_coordinator.api.problems import documented
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.tables import NodeRow
from swarm_coordinator.rounds import Phase, State, is_present
from swarm_coordinator.seating import Line, line
from swarm_coordinator.service import Service
from swarm_protocol.spec import RunSpec

FRESH_MS = 1000

router = APIRouter(prefix="/v1/runs/{run_id}")

_lines: WeakKeyDictionary[Service, tuple[int, int, Line]] = WeakKeyDictionary()


@router.get(
    "/nodes/{key}/place",
    tags=["rounds"],
    summary="Where a node stands on its way to a slot",
    description="For whoever was not in a plan. The place in the queue is up to a second old.",
    responses=documented(404, 422),
)
async def place(run: TheRun, key: Hash) -> Place:
    peer = bytes.fromhex(key)

    def query(archive: Archive) -> Place:
        found = place_of(run.spec, run.state, archive.node(peer), lambda: _line(run), run.now_ms)
        if recovery.is_pending(archive):
            found.sentence = "the run was restored from a backup, and its nodes are asked for what was signed last"
        return found

    return await run.read(query)


def place_of(spec: RunSpec, state: State, row: NodeRow | None, line_now: Callable[[], Line], now_ms: int) -> Place:
    """Where an identity stands that registered as `row`, or did not."""
    vouched = 0.0 if row is None else row.vouched_tokens / spec.standard_tokens

    def answer(
        where: Literal["seated", "waiting", "queued", "unknown", "ended"],
        sentence: str,
        position: int | None = None,
        room: int | None = None,
    ) -> Place:
        return Place(
            state=where,
            position=position,
            room=room,
            vouched=vouched,
            probation=spec.audit.probation,
            sentence=sentence,
        )

    if row is None:
        return answer("unknown", "this identity has not registered in the run; join it first")
    if row.ended_reason is not None:
        return answer("ended", f"this identity can take no further part in the run: {row.ended_reason}")
    if state.phase is Phase.FINISHED:
        return answer("ended", finished(state))
    slot = state.slot_of(row.key)
    if slot is not None:
        return answer("seated", f"slot {slot} of round {state.round}")
    if state.paused:
        return answer("waiting", "the run owner has paused the run")
    node = state.nodes.get(row.key)
    if node is None or node.offer is None or not is_present(state, node, now_ms):
        return answer("unknown", "the run has not heard lately that this node is ready for a slot")
    if state.phase is Phase.ASSEMBLING and state.offered < state.policy.min_nodes:
        return answer("waiting", f"a round takes {state.policy.min_nodes} nodes, and {state.offered} are ready")
    found = line_now()
    position = found.queued.get(row.key)
    if position is not None and found.room is not None:
        return answer("queued", _in_the_queue(position, found.room), position, found.room)
    if found.room is None and len(found.next_up) >= state.policy.max_nodes and row.key not in found.next_up:
        return answer(
            "waiting", f"more nodes are ready than the {state.policy.max_nodes} slots of a round, which go by lot"
        )
    return answer("waiting", "in the next round", room=found.room)


def _line(run: Service) -> Line:
    """The run's queue, made anew once a second at most: it costs O(n log n)."""
    state, now_ms = run.state, run.now_ms
    known = _lines.get(run)
    if known is not None and known[0] == state.round and 0 <= now_ms - known[1] < FRESH_MS:
        return known[2]
    fresh = line(state, lambda node: is_present(state, node, now_ms))
    _lines[run] = (state.round, now_ms, fresh)
    return fresh


def _in_the_queue(position: int, room: int) -> str:
    return f"{_ordinal(position)} in the queue: this run audits newcomers whole and has room for {room} at a time"


def _ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
