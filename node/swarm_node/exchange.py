"""The exchange of one round: parts to their reducers, averages back, every byte checked against a signed record.

A part goes to the first reducer in its rendezvous order; if that one does not take it, to the next. A reducer accepts a
part only from the holder of a slot, and only if it hashes to what that slot committed to; it averages in slot order once
all parts are in, or with those that came when half of the exchange time is over; it encodes the mean once, and signs a
`PartRecord` with its hash. A part record is made once, also across a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from swarm_node.contribution import Contribution
from swarm_node.evidence import Evidence
from swarm_node.folder import RunFolder
from swarm_protocol import aggregate, chunks, codec, merkle, parts
from swarm_protocol.client import Commitments, CoordinatorClient, SealedRound, persist
from swarm_protocol.errors import HashMismatchError, InvalidDataError, RefusedError, SwarmError, UnreachableError
from swarm_protocol.files import write_atomic
from swarm_protocol.calls import Answer, Call, Handler, Header
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Envelope, PartRecord, RoundPlan
from swarm_protocol.signing import SigningLedger
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

DELIVERY_TIMEOUT_S = 15.0
FETCH_TIMEOUT_S = 15.0
REDUCERS_TRIED = 3
PARALLEL = 4

Post = Callable[[Envelope], Awaitable[object]]


@dataclass
class _Inbox:
    """The parts of one index that arrived here, by slot."""

    encoded: dict[int, bytes] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Exchange:
    """One node's share in the exchange of one round."""

    def __init__(
        self,
        spec: RunSpec,
        plan: RoundPlan,
        commitments: Commitments,
        *,
        plane: PeerPlane,
        ledger: SigningLedger,
        folder: RunFolder,
        evidence: Evidence,
        post: Post,
    ) -> None:
        self.plan = plan
        self._spec = spec
        self._commitments = commitments
        self._plane = plane
        self._ledger = ledger
        self._folder = folder
        self._evidence = evidence
        self._post = post
        self._slices = parts.slices(spec)
        self._inboxes: dict[int, _Inbox] = defaultdict(_Inbox)
        self._closed = {part for part in range(len(self._slices)) if self._signed(part) is not None}
        self._partial_at = time.monotonic() + spec.rounds.exchange_s / 2
        committed = commitments.by_slot
        self._reducers = [seat.peer for slot, seat in enumerate(plan.roster) if seat.reducer and slot in committed]
        self._reducing: dict[int, asyncio.Task[None]] = {}

    async def run(self, mine: Contribution | None) -> None:
        """Deliver our parts and reduce what is sent to us, until cancelled (when the manifest is there)."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for part in range(len(self._slices)):
                    envelope = self._signed(part)
                    if envelope is not None:  # before a crash: its average is on disk, and not made again
                        tasks.create_task(self._publish(envelope))
                if mine is not None and mine.slot in self._commitments.by_slot:
                    gate = asyncio.Semaphore(PARALLEL)
                    for part in range(len(self._slices)):
                        tasks.create_task(self._deliver(mine, part, gate))
                await asyncio.Event().wait()  # others may still deliver to us
        finally:
            await self.stop()

    async def stop(self) -> None:
        """End all reducing."""
        for task in self._reducing.values():
            task.cancel()
        for outcome in await asyncio.gather(*self._reducing.values(), return_exceptions=True):
            if isinstance(outcome, Exception):
                log.warning("a part of round %d could not be reduced: %s", self.plan.round, outcome)

    # Sending

    def order(self, part: int) -> list[bytes]:
        """The reducers of a part, in the order in which they are tried."""
        return [self._reducers[i] for i in parts.rendezvous(self.plan.previous_beacon, part, self._reducers)]

    async def _deliver(self, mine: Contribution, part: int, gate: asyncio.Semaphore) -> None:
        encoded = await asyncio.to_thread(mine.part, part)
        proof = mine.proof(part)
        for reducer in self.order(part)[:REDUCERS_TRIED]:
            if reducer == self._plane.identity.public_key:
                with contextlib.suppress(RefusedError):  # closed: its record was signed before a crash
                    self._accept(part, mine.slot, encoded)
                return
            header: Header = {
                "op": "deliver",
                "round": self.plan.round,
                "part": part,
                "slot": mine.slot,
                "proof": list(proof),
            }
            try:
                async with gate:
                    await self._plane.call(reducer, header, encoded, max_answer_bytes=0, timeout_s=DELIVERY_TIMEOUT_S)
                return
            except SwarmError as error:
                log.warning("part %d of round %d: a reducer does not take it (%s)", part, self.plan.round, error)
        log.warning("part %d of round %d found no reducer", part, self.plan.round)

    # Reducing

    async def receive(self, call: Call) -> Answer:
        """A part that somebody delivers; refused unless its slot's holder committed to exactly these bytes."""
        part, slot = int(call.header["part"]), int(call.header["slot"])
        commitment = self._commitments.by_slot.get(slot)
        if not 0 <= part < len(self._slices) or commitment is None:
            raise RefusedError("no such part, or no commitment for that slot")
        if call.caller != self.plan.roster[slot].peer:
            raise RefusedError("that slot is held by somebody else")
        if self._plane.identity.public_key not in self.order(part)[:REDUCERS_TRIED]:
            raise RefusedError("this part is reduced elsewhere")
        expected = parts.encoded_part_bytes(self._spec, part)
        if call.size_bytes != expected:
            raise RefusedError(f"an encoded part of {expected} bytes was expected")
        encoded = await call.body(expected)
        proof = call.header["proof"]
        if not isinstance(proof, list) or not all(isinstance(step, bytes) for step in proof):
            raise RefusedError("a proof is a list of digests")
        root = merkle.root_from_proof(chunks.content_hash(encoded), part, len(self._slices), proof)
        if root != commitment.parts_root:
            raise RefusedError("the part is not the one that was committed to")
        self._accept(part, slot, encoded)
        return Answer()

    def _accept(self, part: int, slot: int, encoded: bytes) -> None:
        if part in self._closed:
            raise RefusedError("this part is closed")
        inbox = self._inboxes[part]
        inbox.encoded[slot] = encoded
        inbox.changed.set()
        if part not in self._reducing:
            self._reducing[part] = asyncio.create_task(self._reduce(part))

    async def _reduce(self, part: int) -> None:
        inbox = self._inboxes[part]
        while len(inbox.encoded) < len(self._commitments.by_slot):
            inbox.changed.clear()
            try:
                async with asyncio.timeout(max(0.0, self._partial_at - time.monotonic())):
                    await inbox.changed.wait()
            except TimeoutError:
                break
        self._closed.add(part)
        try:
            average, slots = await asyncio.to_thread(self._average, part, dict(inbox.encoded))
        except InvalidDataError as error:
            log.warning("part %d of round %d cannot be averaged: %s", part, self.plan.round, error)
            return
        finally:
            inbox.encoded.clear()
        digest = chunks.content_hash(average)
        path = self._folder.work(self.plan.round) / f"average-{digest.hex()}"
        await asyncio.to_thread(write_atomic, path, average)
        self._evidence.add_average(self.plan.round, digest, path)
        record = PartRecord(
            run=self._spec.run_id,
            round=self.plan.round,
            sequence=part,
            part=part,
            commitment_set=self._commitments.closing.hash,
            result=digest,
            size_bytes=len(average),
            slots=slots,
        )
        await self._publish(self._ledger.sign(record))

    def _average(self, part: int, encoded: dict[int, bytes]) -> tuple[bytes, tuple[int, ...]]:
        """The encoded weighted mean of the parts of these slots, without those that do not decode."""
        decoded: dict[int, npt.NDArray[np.float32]] = {}
        for slot, data in sorted(encoded.items()):
            try:
                decoded[slot] = parts.decode_part(self._spec, part, data)
            except InvalidDataError as error:
                log.warning("slot %d sent a part that it committed to and that does not decode: %s", slot, error)
        weights = {slot: self.plan.roster[slot].weight for slot in decoded}
        where = self._slices[part]
        aggregation = aggregate.start(self._spec.exchange.aggregator, weights, where.stop - where.start)
        for slot, values in decoded.items():
            aggregation.add(slot, values)
        encode = codec.get(self._spec.exchange.codec).encode
        return encode(aggregation.result()), tuple(decoded)

    def _signed(self, part: int) -> Envelope | None:
        """Our record of this part, if we ever signed one."""
        return self._ledger.find(self._spec.run_id, PartRecord.kind, self.plan.round, part)

    async def _publish(self, envelope: Envelope) -> None:
        with contextlib.suppress(RefusedError):  # the exchange has closed without it, or the record is known
            await persist(lambda: self._post(envelope), deadline_s=self._spec.rounds.exchange_s)


class ExchangeDesk:
    """Takes deliveries for whichever round is open, and lets early ones wait a little."""

    def __init__(self) -> None:
        self._open: Exchange | None = None
        self._changed = asyncio.Condition()

    @property
    def handlers(self) -> dict[str, Handler]:
        return {"deliver": self._deliver}

    async def open(self, exchange: Exchange | None) -> None:
        async with self._changed:
            self._open = exchange
            self._changed.notify_all()

    async def _deliver(self, call: Call) -> Answer:
        wanted = int(call.header["round"])
        async with self._changed:
            try:
                async with asyncio.timeout(DELIVERY_TIMEOUT_S / 2):
                    await self._changed.wait_for(lambda: self._open is not None and self._open.plan.round >= wanted)
            except TimeoutError:
                raise RefusedError("the exchange of that round is not open here") from None
            exchange = self._open
        if exchange is None or exchange.plan.round != wanted:
            raise RefusedError("the exchange of that round is over")
        return await exchange.receive(call)


async def fetch_averages(
    spec: RunSpec, sealed: SealedRound, *, plane: PeerPlane, client: CoordinatorClient, evidence: Evidence
) -> list[bytes | None]:
    """The encoded average of every part that the manifest names: from ourselves, its reducer, or the coordinator.

    Raises:
        UnreachableError: some part is nowhere to be had.
    """
    gate = asyncio.Semaphore(PARALLEL)

    async def fetch(name: bytes | None) -> bytes | None:
        if name is None:
            return None
        record, reducer = sealed.part_records[name]
        here = evidence.find(record.result)
        if here is not None:
            return here
        async with gate:
            if reducer != plane.identity.public_key:
                try:
                    _, data = await plane.call(
                        reducer,
                        {"op": "get", "hash": record.result},
                        max_answer_bytes=record.size_bytes,
                        timeout_s=FETCH_TIMEOUT_S,
                    )
                    if chunks.content_hash(data) == record.result:
                        return data
                    log.warning("a reducer serves other bytes for part %d than it signed", record.part)
                except (UnreachableError, RefusedError, InvalidDataError) as error:
                    log.info("part %d comes from the coordinator, not from its reducer (%s)", record.part, error)
            return await client.chunk(record.result, max_bytes=record.size_bytes)

    try:
        return list(await asyncio.gather(*(fetch(name) for name in sealed.manifest.parts)))
    except HashMismatchError as error:
        raise UnreachableError(str(error)) from error
