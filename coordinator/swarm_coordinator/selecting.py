"""The checkpoint worker's part in a round's sketches: it collects them, hears objections, and closes them with a SketchSet.

A sender's sketches count once their bytes were fetched and are what was signed, unless an objection is upheld: the part that
was committed to is fetched by its hash, and its sketch recomputed. An objection that says nothing true changes nothing, and
ends the objector's say in that round. Of the exchange time E:

    0.1 E    after the last sketches came in they are closed: time for reducers to check what was delivered
    0.35 E   at the latest they are closed with what is there

The selection is computed from what counts, as every reducer does again for itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from swarm_coordinator.store import Store
from swarm_protocol import parts, sketching
from swarm_protocol.chunks import content_hash
from swarm_protocol.client import Commitments, CoordinatorClient
from swarm_protocol.errors import InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.http import persist
from swarm_protocol.identity import peer_id
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import (
    Envelope,
    RoundPlan,
    Sketches,
    SketchFault,
    SketchObjection,
    SketchSet,
    SlotFault,
    SlotHash,
    SlotWeight,
)
from swarm_protocol.signing import SigningLedger
from swarm_protocol.sketching import Float32

log = logging.getLogger(__name__)

CLOSE_SHARE = 0.35
OBJECTION_SHARE = 0.1
ATTEMPT_SHARE = 0.1
FETCHES_AT_ONCE = 8
JUDGED_AT_ONCE = 2
POLL_S = 10.0
RETRY_S = 0.5


class Selecting:
    """The sketches of one round."""

    def __init__(
        self,
        client: CoordinatorClient,
        plane: PeerPlane,
        store: Store,
        ledger: SigningLedger,
        plan: RoundPlan,
        commitments: Commitments,
    ) -> None:
        self._client = client
        self._spec = client.spec
        self._plane = plane
        self._store = store
        self._ledger = ledger
        self._plan = plan
        self._commitments = commitments
        self._exchange_s = self._spec.rounds.exchange_s
        self._started = time.monotonic()
        self._candidates = sketching.candidates(plan.roster, commitments.by_slot)
        self._reducers = {seat.peer for seat in plan.roster if seat.reducer}
        self._signed: dict[int, Sketches] = {}
        self._sketches: dict[int, list[Float32]] = {}
        self._faults: dict[int, SketchFault] = {}
        self._unfounded: set[bytes] = set()
        self._judging = 0
        self._changed = asyncio.Condition()
        self._fetches = asyncio.Semaphore(FETCHES_AT_ONCE)
        self._judges = asyncio.Semaphore(JUDGED_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> SketchSet:
        """Sign the round's sketch set and hand it in; the one that was signed before, after a crash.

        Raises:
            UnreachableError: the coordinator was away for all of the exchange.
        """
        run, number = self._spec.run_id, self._plan.round
        envelope = self._ledger.find(run, SketchSet.kind, number, 0)
        if envelope is None:
            self._spawn(self._watch())
            try:
                await self._settle()
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
            record = await asyncio.to_thread(self._set)
            envelope = await asyncio.to_thread(self._ledger.sign, record)
        signed = envelope.open_as(SketchSet, run=run, round=number)
        try:
            await persist(lambda: self._client.post(envelope), deadline_s=self._exchange_s)
        except RefusedError as error:
            log.warning("the sketch set of round %d is not taken: %s", number, error)
        return signed

    async def _settle(self) -> None:
        """Until all sketches are here and nobody objects any more, or time is up."""
        end = self._started + CLOSE_SHARE * self._exchange_s
        try:
            async with asyncio.timeout(max(0.0, end - time.monotonic())):
                async with self._changed:
                    await self._changed.wait_for(lambda: self._candidates.keys() <= self._known())
                await asyncio.sleep(OBJECTION_SHARE * self._exchange_s)
                async with self._changed:
                    await self._changed.wait_for(lambda: self._judging == 0)
        except TimeoutError:
            log.info("round %d: the sketches are closed with what is there", self._plan.round)

    def _known(self) -> set[int]:
        return self._sketches.keys() | self._faults.keys()

    def _set(self) -> SketchSet:
        counted = {slot: one for slot, one in self._sketches.items() if slot not in self._faults}
        selected = sketching.select(self._spec, self._plan.roster, self._commitments.by_slot, counted)
        return SketchSet(
            run=self._spec.run_id,
            round=self._plan.round,
            commitment_set=self._commitments.closing.hash,
            counted=tuple(SlotHash(slot=slot, hash=self._signed[slot].hash) for slot in sorted(counted)),
            excluded=tuple(
                SlotFault(slot=slot, fault=self._fault(slot)) for slot in self._candidates if slot not in counted
            ),
            selected=tuple(SlotWeight(slot=slot, weight=weight) for slot, weight in selected.items()),
        )

    def _fault(self, slot: int) -> SketchFault:
        unavailable = SketchFault.UNAVAILABLE if slot in self._signed else SketchFault.MISSING
        return self._faults.get(slot, unavailable)

    async def _watch(self) -> None:
        """Take note of what comes in, and work on each of it."""
        count = 0
        while True:
            try:
                found = await self._client.sketch_records(self._plan.round, after=count, wait_s=POLL_S)
            except (UnreachableError, RefusedError, InvalidDataError) as error:
                log.info("sketches of round %d: %s", self._plan.round, error)
                found = None
            for envelope in found or []:
                try:
                    await self._note(envelope)
                except InvalidDataError as error:
                    log.warning("round %d: %s", self._plan.round, error)
            count += len(found or [])
            if not found:
                await asyncio.sleep(RETRY_S)

    async def _note(self, envelope: Envelope) -> None:
        record = envelope.open()
        if (record.run, record.round) != (self._spec.run_id, self._plan.round):
            raise InvalidDataError(f"a {record.kind} of another round")
        if isinstance(record, Sketches):
            commitment = self._commitments.by_slot.get(record.slot)
            if commitment is None or envelope.key != self._plan.roster[record.slot].peer:
                raise InvalidDataError("sketches by somebody who does not hold that slot")
            sketching.require_for(record, self._commitments.closing.hash, commitment)
            if record.slot in self._candidates and record.slot not in self._signed:
                self._signed[record.slot] = record
                self._spawn(self._take(record))
        elif isinstance(record, SketchObjection) and record.slot in self._candidates and envelope.key in self._reducers:
            self._spawn(self._judge(envelope.key, record))

    async def _take(self, record: Sketches) -> None:
        """Have the bytes of a sender's sketches, and keep them for others."""
        holder = self._plan.roster[record.slot].peer
        while True:
            async with self._fetches:
                blob = await self._fetch([holder], record.blob, sketching.blob_bytes(self._spec))
            if blob is not None:
                break
            await asyncio.sleep(RETRY_S)
        try:
            found = await asyncio.to_thread(sketching.decode, self._spec, record, blob)
            await asyncio.to_thread(self._store.put, record.blob, blob)
        except InvalidDataError as error:
            await self._exclude(record.slot, SketchFault.UNSOUND, str(error))
            return
        async with self._changed:
            self._sketches[record.slot] = found
            self._changed.notify_all()

    async def _judge(self, objector: bytes, objection: SketchObjection) -> None:
        """Recompute what an objection is about, once the sketches that it is about are here."""
        self._judging += 1
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: objection.slot in self._known())
            async with self._judges:
                await self._hear(objector, objection)
        finally:
            async with self._changed:
                self._judging -= 1
                self._changed.notify_all()

    async def _hear(self, objector: bytes, objection: SketchObjection) -> None:
        slot, part = objection.slot, objection.part
        if slot in self._faults or objector in self._unfounded or objection.sketches != self._signed[slot].hash:
            return
        try:
            sketching.require_committed(self._spec, objection, self._commitments.by_slot[slot])
        except InvalidDataError as error:
            self._dismiss(objector, str(error))
            return
        size_bytes = parts.encoded_part_bytes(self._spec, part)
        encoded = await self._fetch([objector, self._plan.roster[slot].peer], objection.part_hash, size_bytes)
        if encoded is None:
            log.warning("round %d: nobody serves part %d of slot %d for an objection", self._plan.round, part, slot)
        elif await asyncio.to_thread(self._true, slot, part, encoded):
            self._dismiss(objector, f"the sketch of part {part} of slot {slot} is right")
        else:
            await self._exclude(slot, SketchFault.FORGED, f"part {part}, by the objection of {peer_id(objector)}")

    def _true(self, slot: int, part: int, encoded: bytes) -> bool:
        where = sketching.projection(self._spec, self._commitments.closing.hash, part)
        return sketching.part_matches(self._spec, where, part, encoded, self._sketches[slot][part].tobytes())

    def _dismiss(self, objector: bytes, reason: str) -> None:
        self._unfounded.add(objector)
        log.warning("round %d: the objection of %s is unfounded: %s", self._plan.round, peer_id(objector), reason)

    async def _exclude(self, slot: int, fault: SketchFault, reason: str) -> None:
        log.warning("round %d: the sketches of slot %d are %s: %s", self._plan.round, slot, fault, reason)
        async with self._changed:
            self._faults[slot] = fault
            self._changed.notify_all()

    async def _fetch(self, sources: Sequence[bytes], digest: bytes, size_bytes: int) -> bytes | None:
        """The bytes of a hash, from our store or from the first of these peers that has them."""
        kept = await asyncio.to_thread(self._store.get, digest)
        if kept is not None:
            return kept
        for source in dict.fromkeys(sources):
            try:
                _, found = await self._plane.call(
                    source,
                    {"op": "get", "hash": digest},
                    max_answer_bytes=size_bytes,
                    timeout_s=max(1.0, ATTEMPT_SHARE * self._exchange_s),
                )
                if await asyncio.to_thread(content_hash, found) == digest:
                    return bytes(found)
                log.warning("%s serves other bytes than those of their hash", peer_id(source))
            except (UnreachableError, RefusedError, InvalidDataError) as error:
                log.info("round %d: %s", self._plan.round, error)
        return None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
