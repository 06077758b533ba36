"""Gathering what the audit of a reducer looks at, and having it judged (`reduction_audit`). For anybody.

Inputs come from the reducer, by hash, or from the senders themselves, receipts from the senders. What is not served, or is
not what was committed to, accuses nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from swarm_protocol import encoding, parts, reduction_audit, sketching
from swarm_protocol.chunks import content_hash
from swarm_protocol.client import Commitments, CoordinatorClient
from swarm_protocol.errors import InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.identity import peer_id
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Envelope, PartRecord, RoundPlan, SketchSet
from swarm_protocol.reduction_audit import Input, ReductionVerdict
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 10.0
MAX_PROOF_BYTES = 17 * 34
MAX_RECEIPTS_BYTES = 1 << 16
AT_ONCE = 8

Named = tuple[bytes, tuple[bytes, ...]]
"""The hash of an input, and its proof."""


@dataclass(frozen=True)
class Examined:
    """The verdict on an average, and what was served for it: inputs that fit their commitments, and receipts."""

    verdict: ReductionVerdict
    inputs: dict[int, Input]
    receipts: list[Envelope]


@dataclass(frozen=True)
class ReducedRound:
    """The public records that say what a round's averages have to be; `closing` where its aggregator selects slots."""

    plan: RoundPlan
    commitments: Commitments
    closing: SketchSet | None


async def reduced_round(client: CoordinatorClient, number: int) -> ReducedRound:
    """The records of a round whose exchange is over. Raises like `Reductions.round`."""
    plan = await client.plan(number)
    commitments = None if plan is None else await client.commitments(plan)
    if plan is None or commitments is None:
        raise InvalidDataError(f"round {number} has no commitments yet, so there are no averages to audit")
    closing = None
    if sketching.needed(client.spec.exchange.aggregator, plan.roster, commitments.by_slot):
        counted = await client.sketch_set(plan, commitments)
        if counted is None:
            raise InvalidDataError(f"nothing was selected in round {number}: it has no averages to audit")
        closing = counted.closing
    return ReducedRound(plan, commitments, closing)


class Reductions:
    """Averages of one run; the public records of the round that was asked for last are kept."""

    def __init__(self, client: CoordinatorClient, plane: PeerPlane) -> None:
        self._client = client
        self._spec = client.spec
        self._plane = plane
        self._round: ReducedRound | None = None

    async def round(self, number: int) -> ReducedRound:
        """A round whose exchange is over.

        Raises:
            InvalidDataError: it has no averages, or the records contradict each other.
            UnreachableError, RefusedError
        """
        if self._round is None or self._round.plan.round != number:
            self._round = await reduced_round(self._client, number)
        return self._round

    async def judge(self, published: Envelope) -> ReductionVerdict:
        """As `examine`, without what was served."""
        return (await self.examine(published)).verdict

    async def examine(self, published: Envelope) -> Examined:
        """The verdict on a part record, with what is served right now.

        Raises:
            InvalidDataError: it is no record of its round, so there is nothing to judge.
            UnreachableError, RefusedError: the coordinator does not have the round's records.
        """
        record = published.open_as(PartRecord, run=self._spec.run_id)
        reduced = await self.round(record.round)
        gathering = _Gathering(self._spec, self._plane, reduced, record.part)
        receipts, inputs = await asyncio.gather(gathering.receipts(), gathering.inputs(published.key, record.slots))
        verdict = await asyncio.to_thread(
            reduction_audit.judge, self._spec, reduced.plan, reduced.commitments.by_slot, published, inputs, receipts,
            closing=reduced.closing,
        )  # fmt: skip
        log.info("part %d of round %d by %s: %s", record.part, record.round, published.peer, verdict.outcome)
        return Examined(verdict, inputs, receipts)

    async def average(self, published: Envelope) -> bytes | None:
        """The bytes that a part record names, from its reducer or the coordinator; None if neither serves them."""
        record = published.open_as(PartRecord, run=self._spec.run_id)
        reduced = await self.round(record.round)
        served = await _Gathering(self._spec, self._plane, reduced, record.part).get(published.key, record.result)
        if served is not None:
            return served
        try:
            return await self._client.chunk(record.result, max_bytes=record.size_bytes)
        except (UnreachableError, RefusedError, InvalidDataError):
            return None

    async def committed_parts(self, plan: RoundPlan, slot: int) -> AsyncIterator[tuple[int, Input]]:
        """The encoded parts that a slot committed to, as far as its holder serves them.

        Raises:
            UnreachableError, RefusedError: the coordinator does not have the round's records.
        """
        commitments = await self._client.commitments(plan)
        if commitments is None:
            return
        for part in range(parts.part_count(self._spec)):
            gathering = _Gathering(self._spec, self._plane, ReducedRound(plan, commitments, None), part)
            found = await gathering.inputs(plan.roster[slot].peer, [slot])
            if slot not in found:
                return
            yield part, found[slot]


class _Gathering:
    """What the peers of a round serve about one part."""

    def __init__(self, spec: RunSpec, plane: PeerPlane, reduced: ReducedRound, part: int) -> None:
        self._spec = spec
        self._plane = plane
        self._plan = reduced.plan
        self._commitments = reduced.commitments.by_slot
        self._part = part
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def receipts(self) -> list[Envelope]:
        """The receipts that senders hold for this part."""
        found = await asyncio.gather(*(self._list(self._holder(slot), "receipts") for slot in self._commitments))
        receipts = []
        for raw in (raw for listed in found for raw in listed if isinstance(raw, bytes)):
            try:
                receipts.append(Envelope.decode(raw))
            except InvalidDataError as error:
                log.info("a sender serves something that is no receipt: %s", error)
        return receipts

    async def inputs(self, reducer: bytes, slots: Iterable[int]) -> dict[int, Input]:
        """What is served of these slots' inputs, by the reducer or by the senders."""
        named = self._named(await self._list(reducer, "inputs"))

        async def one(slot: int) -> Input | None:
            holder = self._holder(slot)
            for source in (reducer, holder):
                told = named if source == reducer else self._named(await self._list(holder, "inputs"))
                if slot not in told:
                    continue
                digest, proof = told[slot]
                for server in (reducer, holder):
                    data = await self.get(server, digest)
                    if data is not None and reduction_audit.is_committed(
                        self._spec, self._commitments[slot], self._part, Input(data, proof)
                    ):
                        return Input(data, proof)
            return None

        wanted = [slot for slot in slots if slot in self._commitments]
        found = await asyncio.gather(*map(one, wanted))
        return {slot: given for slot, given in zip(wanted, found, strict=True) if given is not None}

    def _named(self, listed: list[Any]) -> dict[int, Named]:
        named: dict[int, Named] = {}
        for entry in listed:
            match entry:
                case [int(slot), bytes(digest), [*proof]] if all(isinstance(step, bytes) for step in proof):
                    named[slot] = digest, tuple(step for step in proof if isinstance(step, bytes))
        return named

    def _holder(self, slot: int) -> bytes:
        return self._plan.roster[slot].peer

    async def _list(self, peer: bytes, op: str) -> list[Any]:
        most = MAX_RECEIPTS_BYTES + len(self._plan.roster) * MAX_PROOF_BYTES
        raw = await self._ask(peer, {"op": op, "round": self._plan.round, "part": self._part}, most)
        try:
            value = [] if raw is None else encoding.decode(raw, max_bytes=most)
        except InvalidDataError as error:
            log.info("%s serves no list of %s: %s", peer_id(peer), op, error)
            return []
        return value if isinstance(value, list) else []

    async def get(self, peer: bytes, digest: bytes) -> bytes | None:
        """The bytes of a hash, an encoded part's or an average's, if this peer serves them."""
        raw = await self._ask(peer, {"op": "get", "hash": digest}, parts.encoded_part_bytes(self._spec, self._part))
        return raw if raw is not None and content_hash(raw) == digest else None

    async def _ask(self, peer: bytes, header: dict[str, Any], max_bytes: int) -> bytes | None:
        try:
            async with self._gate:
                _, body = await self._plane.call(peer, header, max_answer_bytes=max_bytes, timeout_s=CALL_TIMEOUT_S)
        except (UnreachableError, RefusedError, InvalidDataError) as error:
            log.info("%s: %s", peer_id(peer), error)
            return None
        return bytes(body)
