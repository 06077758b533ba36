"""Audits one part of a round: gathers what the reducer averaged, and has it judged (`reduction_audit`). For anybody.

Inputs come from the reducer, by hash, or from the senders themselves, receipts from the senders. What is not served, or is
not what was committed to, accuses nobody.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from swarm_protocol import encoding, parts, reduction_audit, sketching
from swarm_protocol.chunks import content_hash
from swarm_protocol.client import Commitments, CoordinatorClient
from swarm_protocol.errors import ConfigurationError, InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.identity import Identity, peer_id
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Envelope, PartRecord, RoundPlan
from swarm_protocol.reduction_audit import Input, ReductionVerdict

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 10.0
MAX_PROOF_BYTES = 17 * 34
MAX_RECEIPTS_BYTES = 1 << 16
AT_ONCE = 8

Named = tuple[bytes, tuple[bytes, ...]]
"""The hash of an input, and its proof."""


async def run(url: str, round_number: int, chosen: Sequence[int] | None) -> dict[str, Any]:
    """Audit parts of a round (None: all) of the run at `url`, under a key that is thrown away; returns what is printed.

    Raises:
        SwarmError: there is nothing to audit, or no way to do it from here.
    """
    with tempfile.TemporaryDirectory(prefix="swarm-audit-") as folder:
        key = Path(folder) / "identity"
        Identity.generate().save(key)
        async with await CoordinatorClient.connect(url) as client:
            bootstrap = [str(peer) for peer in (await client.status())["peers"]]
            plane = await PeerPlane.start(key, client.spec.run_id, initial_peers=bootstrap, client_only=True)
            try:
                wanted = range(parts.part_count(client.spec)) if chosen is None else chosen
                verdicts = [
                    (part, envelope, verdict)
                    for part in wanted
                    for envelope, verdict in await audit(client, plane, round_number, part)
                ]
            finally:
                await plane.close()
    return {
        "round": round_number,
        "records": [
            {
                "part": part,
                "record": envelope.open().hash.hex(),
                "reducer": envelope.peer,
                "outcome": verdict.outcome.value,
                "reason": verdict.reason,
                "slots": list(verdict.slots),
            }
            for part, envelope, verdict in verdicts
        ],
    }


async def audit(
    client: CoordinatorClient,
    plane: PeerPlane,
    round_number: int,
    part: int,
) -> list[tuple[Envelope, ReductionVerdict]]:
    """The verdict on each record that was published for a part, in the order in which they came.

    Raises:
        RefusedError, UnreachableError, InvalidDataError: the coordinator does not have the round's records.
        ConfigurationError: no such round or part.
    """
    spec = client.spec
    plan = await client.plan(round_number) if round_number < spec.rounds.count else None
    commitments = None if plan is None else await client.commitments(plan)
    if plan is None or commitments is None:
        raise ConfigurationError(f"round {round_number} has no commitments yet; give one that is over")
    if part >= parts.part_count(spec):
        raise ConfigurationError(f"the run has parts 0 to {parts.part_count(spec) - 1}; there is no part {part}")
    closing = None
    if sketching.needed(spec.exchange.aggregator, plan.roster, commitments.by_slot):
        counted = await client.sketch_set(plan, commitments)
        if counted is None:
            raise ConfigurationError(f"nothing was selected in round {round_number}: it has no averages to audit")
        closing = counted.closing
    published = [
        (envelope, record)
        for envelope in await client.part_records(round_number) or []
        if (record := envelope.open_as(PartRecord, run=spec.run_id, round=round_number)).part == part
    ]
    gathering = _Gathering(client, plane, plan, commitments, part)
    receipts = await gathering.receipts()
    verdicts = []
    for envelope, record in published:
        inputs = await gathering.inputs(envelope.key, record.slots)
        verdict = await asyncio.to_thread(
            reduction_audit.judge, spec, plan, commitments.by_slot, envelope, inputs, receipts, closing=closing
        )
        log.info("part %d of round %d by %s: %s", part, round_number, envelope.peer, verdict.outcome)
        verdicts.append((envelope, verdict))
    return verdicts


class _Gathering:
    """What the peers of a round serve about one part."""

    def __init__(
        self, client: CoordinatorClient, plane: PeerPlane, plan: RoundPlan, commitments: Commitments, part: int
    ) -> None:
        self._spec = client.spec
        self._plane = plane
        self._plan = plan
        self._commitments = commitments.by_slot
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
                    data = await self._get(server, digest)
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

    async def _get(self, peer: bytes, digest: bytes) -> bytes | None:
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
