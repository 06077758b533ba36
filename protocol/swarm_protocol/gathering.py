"""Gathering what an audit looks at: public records and the checkpoint from the coordinator, claims from the node.

Claims of a contribution that was rejected come from the archive as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from swarm_protocol import aggregate, audit, evidence, fetch, training
from swarm_protocol.audit import Claims, Subject
from swarm_protocol.catching_up import CatchUp
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import CHUNK_BYTES, StateManifest, content_hash, manifest_of
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import HashMismatchError, InvalidDataError
from swarm_protocol.fetch import Float32
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Commitment, RoundPlan, Sketches
from swarm_protocol.training import TrainState

CALL_TIMEOUT_S = 10.0


class UnfitError(InvalidDataError):
    """A node `served` something that is not what it committed to."""

    def __init__(self, reason: str, served: bytes) -> None:
        super().__init__(reason)
        self.served = served


class Subjects:
    """Contributions of one run; the newest checkpoint that was asked for is kept, since a round's begin from one, and the
    next round's is a delta away. The trunk, where the run has one, is kept in `folder`.
    """

    def __init__(self, client: CoordinatorClient, folder: Path, plane: PeerPlane | None = None) -> None:
        self._client = client
        self._folder = folder
        self._catching_up = CatchUp(client, plane)
        self._fetching = asyncio.Lock()
        self._trunk: Float32 | None = None
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
            if self._trunk is None:
                self._trunk = await fetch.trunk(self._client, self._folder)
        sketches = await self._sketches(plan, slot)
        return Subject(self._client.spec, plan, slot, commitment, base.parameters, sketches, self._trunk)

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
    try:
        roots = _roots(subject, raw)
    except InvalidDataError as error:
        raise UnfitError(str(error), raw) from error
    return Claims(roots, {index: await _state(plane, subject, roots[index]) for index in needed})


def archived_claims(subject: Subject, found: Mapping[str, bytes]) -> Claims:
    """The claims in archived evidence. Every state is checked against the trace, and that against the commitment.

    Raises:
        InvalidDataError: there is no trace, or the evidence is not what was committed to.
    """
    if "trace" not in found:
        raise InvalidDataError("the evidence has no trace")
    roots = _roots(subject, found["trace"])
    states: dict[int, TrainState] = {}
    for index, data in evidence.numbered(found, "state").items():
        if index >= len(roots) or manifest_of(data).root != roots[index]:
            raise HashMismatchError(f"the state at the end of segment {index} is none that was committed to")
        states[index] = TrainState.from_bytes(subject.spec, data)
    return Claims(roots, states)


def _roots(subject: Subject, trace: bytes) -> tuple[bytes, ...]:
    roots = tuple(trace[start : start + 32] for start in range(0, len(trace), 32))
    audit.check_trace(subject, roots)
    return roots


async def _state(plane: PeerPlane, subject: Subject, root: bytes) -> TrainState:
    node, size = subject.plan.roster[subject.slot].peer, training.size_bytes(subject.spec)
    encoded = await _ask(plane, node, {"op": "state", "root": root}, 64 + 32 * (size // CHUNK_BYTES + 1))
    try:
        manifest = StateManifest.decode(encoded, max_size_bytes=size)
    except InvalidDataError as error:
        raise UnfitError(str(error), encoded) from error
    if manifest.root != root or manifest.size_bytes != size:
        raise UnfitError("a state is another one", encoded)
    pieces: list[bytes] = []
    for index, digest in enumerate(manifest.hashes):
        piece = await _ask(plane, node, {"op": "get", "hash": digest}, manifest.chunk_size(index))
        if content_hash(piece) != digest:
            raise UnfitError("a chunk of a state has other bytes", piece)
        pieces.append(piece)
    whole = b"".join(pieces)
    try:
        return TrainState.from_bytes(subject.spec, whole)
    except InvalidDataError as error:
        raise UnfitError(str(error), whole) from error


async def _ask(plane: PeerPlane, node: bytes, header: dict[str, Any], max_bytes: int) -> bytes:
    _, body = await plane.call(node, header, max_answer_bytes=max_bytes, timeout_s=CALL_TIMEOUT_S)
    return bytes(body)
