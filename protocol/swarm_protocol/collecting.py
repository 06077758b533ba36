"""Collecting the evidence of a rejection before its verdict is signed. What a node does not serve is left out."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from swarm_protocol import audit, gathering
from swarm_protocol.audit import Claims, Finding, Subject
from swarm_protocol.errors import InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.evidence import Collected
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Envelope, PartReceipt, PartRecord
from swarm_protocol.reduction_audit import Input
from swarm_protocol.reduction_gathering import Examined, Reductions

log = logging.getLogger(__name__)

PATIENCE_S = 20.0
NOT_SERVED = (TimeoutError, UnreachableError, RefusedError, InvalidDataError)


async def contribution(
    plane: PeerPlane, reductions: Reductions, subject: Subject, finding: Finding, claims: Claims | None
) -> tuple[int | None, Collected]:
    """The segment that decided, if the trace is known, and its states with the parts that were sent; see `evidence`."""
    segment, collected, encoded = finding.segment, Collected(), dict[int, Input]()
    try:
        async with asyncio.timeout(PATIENCE_S):
            if claims is None:
                claims = await gathering.claims(plane, subject, ())
            segment = audit.deciding_segment(subject, finding, claims.roots)
            missing = set(audit.states_around(subject, segment)) - claims.states.keys()
            if missing:
                more = await gathering.claims(plane, subject, missing)
                claims = Claims(claims.roots, {**claims.states, **more.states})
    except NOT_SERVED as error:
        log.info("round %d slot %d: not all states are served: %s", subject.plan.round, subject.slot, error)
    with suppress(*NOT_SERVED):
        async with asyncio.timeout(PATIENCE_S):
            async for part, found in reductions.committed_parts(subject.plan, subject.slot):
                encoded[part] = found

    def add() -> None:
        if claims is not None:
            collected.add("trace", b"".join(claims.roots))
            kept = () if segment is None else audit.states_around(subject, segment)
            for index in kept:
                if index in claims.states:
                    collected.add(f"state-{index}", *claims.states[index].buffers())
        collected.add_inputs("part", encoded)

    await asyncio.to_thread(add)
    return segment, collected


async def average(reductions: Reductions, published: Envelope, examined: Examined) -> Collected:
    """What was averaged, the receipts that the reducer signed, and the bytes that it published; see `evidence`."""
    record = published.open_as(PartRecord, run=published.open().run)
    collected, bytes_published = Collected(), None
    with suppress(*NOT_SERVED):
        async with asyncio.timeout(PATIENCE_S):
            bytes_published = await reductions.average(published)
    receipts: dict[int, Envelope] = {}
    for envelope in examined.receipts:
        with suppress(InvalidDataError):
            receipt = envelope.open_as(PartReceipt, run=record.run, round=record.round, key=published.key)
            if receipt.part == record.part:
                receipts.setdefault(receipt.slot, envelope)

    def add() -> None:
        collected.add_inputs("input", examined.inputs)
        collected.add_receipts(receipts.values())
        if bytes_published is not None:
            collected.add("average", bytes_published)

    await asyncio.to_thread(add)
    return collected
