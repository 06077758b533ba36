"""Gathering what an audit looks at: public records and the checkpoint from the coordinator, claims from the node."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

from swarm_protocol import aggregate, audit, training
from swarm_protocol.audit import Claims, Subject
from swarm_protocol.catching_up import CatchUp
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import CHUNK_BYTES, StateManifest, content_hash
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Commitment, RoundPlan, Sketches
from swarm_protocol.training import TrainState

CALL_TIMEOUT_S = 10.0


class Subjects:
    """Contributions of one run; the newest checkpoint that was asked for is kept, since a round's begin from one, and the
    next round's is a delta away."""

    def __init__(self, client: CoordinatorClient, plane: PeerPlane | None = None) -> None:
        self._client = client
        self._catching_up = CatchUp(client, plane)
        self._fetching = asyncio.Lock()
        self._base: Checkpoint | None = None

    async def find(self, round_number: int, slot: int, commitment_hash: bytes) -> Subject:
        """One contribution, by its commitment.

        Raises:
            InvalidDataError: there is no such one, or the records contradict each other.
            UnreachableError, RefusedError
        """
        plan = await self._client.plan(round_number)
        if plan is None or not 0 <= slot < len(plan.roster):
            raise InvalidDataError(f"round {round_number} or slot {slot} does not exist")
        envelope = await self._client.record(commitment_hash)
        holder = plan.roster[slot].peer
        commitment = envelope.open_as(Commitment, run=self._client.spec.run_id, round=round_number, key=holder)
        if commitment.plan != plan.hash or commitment.slot != slot:
            raise InvalidDataError("the commitment is for another plan or slot")
        async with self._fetching:
            base = self._base
            if base is None or base.root != plan.base:
                self._base = base = await self._catching_up.checkpoint(round_number, plan.base, base)
        return Subject(self._client.spec, plan, slot, commitment, base.parameters, await self._sketches(plan, slot))

    async def _sketches(self, plan: RoundPlan, slot: int) -> Sketches | None:
        """What the slot's holder signed of its sketches, if the round had any."""
        if not aggregate.needs_sketches(self._client.spec.exchange.aggregator):
            return None
        for envelope in await self._client.sketch_records(plan.round) or []:
            record = envelope.open()
            if isinstance(record, Sketches) and (record.slot, envelope.key) == (slot, plan.roster[slot].peer):
                return record
        return None


async def claims(plane: PeerPlane, subject: Subject, needed: Collection[int]) -> Claims:
    """What the node claims of its training: its trace, and the states at the ends of the `needed` segments.

    Every piece is checked against the commitment.

    Raises:
        InvalidDataError: what the node serves is not what it committed to.
        UnreachableError, RefusedError: the node does not serve it.
    """
    node = subject.plan.roster[subject.slot].peer
    raw = await _ask(plane, node, {"op": "trace", "round": subject.plan.round}, 32 * len(subject.segments))
    roots = tuple(raw[start : start + 32] for start in range(0, len(raw), 32))
    audit.check_trace(subject, roots)
    return Claims(roots, {index: await _state(plane, subject, roots[index]) for index in needed})


async def _state(plane: PeerPlane, subject: Subject, root: bytes) -> TrainState:
    node, size = subject.plan.roster[subject.slot].peer, training.size_bytes(subject.spec)
    encoded = await _ask(plane, node, {"op": "state", "root": root}, 64 + 32 * (size // CHUNK_BYTES + 1))
    manifest = StateManifest.decode(encoded, max_size_bytes=size)
    if manifest.root != root or manifest.size_bytes != size:
        raise InvalidDataError("a state is another one")
    pieces: list[bytes] = []
    for index, digest in enumerate(manifest.hashes):
        piece = await _ask(plane, node, {"op": "get", "hash": digest}, manifest.chunk_size(index))
        if content_hash(piece) != digest:
            raise InvalidDataError("a chunk of a state has other bytes")
        pieces.append(piece)
    return TrainState.from_bytes(subject.spec, b"".join(pieces))


async def _ask(plane: PeerPlane, node: bytes, header: dict[str, Any], max_bytes: int) -> bytes:
    _, body = await plane.call(node, header, max_answer_bytes=max_bytes, timeout_s=CALL_TIMEOUT_S)
    return bytes(body)
