"""The reducer's side of a round: parts in, each checked at the door and receipted; one average out, signed once.

A part is taken only from the holder of its slot, only if it hashes to what that slot committed to, and only if it is
sound: it decodes, all its values are finite, and its norm is within the spec's bound. Inputs are kept for a few rounds, so
that a reducer can be audited, and on disk beyond what `Evidence` holds, so that it needs little memory. The average is made
once every committed slot is in, or with what is there when our share of the exchange time is over. Whoever has a receipt
is in it, or it is not published: a receipt comes after its input is counted; after a crash a part is published only if
all inputs that have a receipt were on disk.

In a round that needs sketches a part comes with the signed sketch of it, which is recomputed (`claims`), and the average is
of the slots that the round's sketches select (`sketching`): without a selection there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field

from swarm_node import reduction_evidence
from swarm_node.claims import Claims, ForgedSketchError, TwoSketchesError
from swarm_node.evidence import Evidence
from swarm_node.faults import Faults, Point
from swarm_node.folder import RunFolder
from swarm_node.measured import Measured
from swarm_node.sketching import Sketching
from swarm_protocol import chunks, merkle, parts, reduction
from swarm_protocol.calls import Answer, Bytes, Call
from swarm_protocol.client import Commitments
from swarm_protocol.errors import InvalidDataError, RefusedError
from swarm_protocol.files import write_atomic
from swarm_protocol.records import MAX_SLOTS, Envelope, PartReceipt, PartRecord, RoundPlan
from swarm_protocol.signing import SigningLedger
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

PARTIAL_SHARES = (0.5, 0.8, 0.9)
"""Of the exchange time: when the first, second and third reducer of a part go on with what they have."""

BODIES_AT_ONCE = 4
REDUCTIONS_AT_ONCE = 2

Publish = Callable[[Envelope, PartRecord], Awaitable[object]]
Report = Callable[[Envelope], Coroutine[None, None, None]]


@dataclass
class _Inbox:
    """One part: the hashes of its inputs by slot, the slots whose committed part is not sound, whether it is closed.

    `sketches` are the hashes of the Sketches with which inputs came.
    """

    inputs: dict[int, bytes] = field(default_factory=dict)
    sketches: dict[int, bytes] = field(default_factory=dict)
    unsound: set[int] = field(default_factory=set)
    closed: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class UnsoundPartError(RefusedError):
    """The committed bytes, and no part: no reducer will ever take them."""


class Reducer:
    """One node's reducing in one round. `orders[part]` are the keys of that part's reducers.

    `rival(part)` is the number of slots in the best average of a part that others have published so far. `sketching` is
    there in a round that needs it; `report` hands in what speaks against somebody's sketches.
    """

    def __init__(
        self,
        spec: RunSpec,
        plan: RoundPlan,
        commitments: Commitments,
        orders: list[list[bytes]],
        *,
        ledger: SigningLedger,
        folder: RunFolder,
        evidence: Evidence,
        measured: Measured,
        faults: Faults,
        publish: Publish,
        rival: Callable[[int], int],
        report: Report,
        sketching: Sketching | None = None,
    ) -> None:
        self._spec = spec
        self._plan = plan
        self._commitments = commitments
        self._orders = orders
        self._ledger = ledger
        self._key = ledger.identity.public_key
        self._folder = folder
        self._evidence = evidence
        self._measured = measured
        self._faults = faults
        self._publish = publish
        self._rival = rival
        self._report = report
        self._sketching = sketching
        self._claims = Claims(spec, plan, commitments, ledger)
        self._reports: set[asyncio.Task[None]] = set()
        self._started = time.monotonic()
        self._doors = asyncio.Semaphore(BODIES_AT_ONCE)
        self._benches = asyncio.Semaphore(REDUCTIONS_AT_ONCE)
        self._inboxes: dict[int, _Inbox] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def restore(self) -> None:
        """After a crash: publish again what was signed, and take up the inputs that are on disk."""
        for path in self._folder.work(self._plan.round).glob("input-*"):
            part, slot = (int(number) for number in path.name.split("-")[1:3])
            digest = bytes.fromhex(path.name.split("-")[3])
            if part < len(self._orders) and slot in self._commitments.by_slot and self._place(part) is not None:
                with contextlib.suppress(RefusedError):
                    self._count(part, slot, digest)
        signed = [envelope for part in range(len(self._orders)) if (envelope := self._signed(part)) is not None]
        for envelope in signed:  # the average is on disk, and not made again
            await self._publish(envelope, envelope.open_as(PartRecord, run=self._spec.run_id))

    async def stop(self) -> None:
        """End all reducing."""
        tasks = [*self.tasks.values(), *self._reports]
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                log.warning("a part of round %d could not be reduced: %s", self._plan.round, outcome)

    # Taking parts in

    async def receive(self, call: Call) -> Answer:
        """A part that somebody delivers; the answer has our receipt.

        Raises:
            RefusedError: it is not ours to take, not what was committed to, not sound, or too late.
        """
        part, slot = int(call.header["part"]), int(call.header["slot"])
        commitment = self._commitments.by_slot.get(slot)
        if not 0 <= part < len(self._orders) or commitment is None:
            raise RefusedError("no such part, or no commitment for that slot")
        if call.caller != self._plan.roster[slot].peer:
            raise RefusedError("that slot is held by somebody else")
        if self._place(part) is None:
            raise RefusedError("this part is reduced elsewhere")
        expected = parts.encoded_part_bytes(self._spec, part)
        if call.size_bytes != expected:
            raise RefusedError(f"an encoded part of {expected} bytes was expected")
        proof = call.header["proof"]
        if not isinstance(proof, list) or not all(isinstance(step, bytes) for step in proof):
            raise RefusedError("a proof is a list of digests")
        claim = None
        if self._sketching is not None:
            try:
                claim = self._claims.read(call.header, part, slot)
            except TwoSketchesError as error:
                self._hand_in(*error.both)
                raise
        inbox = self._inbox(part)
        if inbox.closed:
            raise RefusedError("this part is closed")
        if slot in inbox.unsound:
            raise RefusedError("this part was refused before")
        await self._faults.at(Point.RECEIVING, self._plan.round)

        def keep(encoded: Bytes) -> bytes:
            digest = chunks.content_hash(encoded)
            if merkle.root_from_proof(digest, part, len(self._orders), proof) != commitment.parts_root:
                raise RefusedError("the part is not the one that was committed to")
            if claim is not None:
                try:
                    self._claims.require_true(claim, encoded, digest, proof)
                except ForgedSketchError as error:
                    if error.objection is not None:
                        refused = self._folder.work(self._plan.round) / f"refused-{part}-{slot}-{digest.hex()}"
                        self._evidence.keep(self._plan.round, digest, encoded, refused)
                    raise
            else:
                self._require_sound(part, encoded)
            path = self._folder.work(self._plan.round) / f"input-{part}-{slot}-{digest.hex()}"
            if slot not in inbox.inputs:
                self._evidence.keep(self._plan.round, digest, encoded, path)
                reduction_evidence.note_input(path.parent, part, slot, digest, proof)
            return digest

        try:
            async with self._doors:
                digest = await call.body_into(keep, expected)
        except UnsoundPartError:
            self._note_unsound(part, slot)
            raise
        except ForgedSketchError as error:
            log.warning(
                "slot %d signed a sketch of part %d of round %d that is not its own", slot, part, self._plan.round
            )
            if error.objection is not None:
                self._hand_in(error.objection)
            self._note_unsound(part, slot)
            raise
        sketches = None if claim is None else claim.record.hash
        self._count(part, slot, digest, sketches)
        receipt = PartReceipt(
            run=self._spec.run_id,
            round=self._plan.round,
            sequence=part * MAX_SLOTS + slot,
            commitment=commitment.hash,
            part=part,
            slot=slot,
            part_hash=digest,
            sketches=sketches,
        )
        return Answer({"receipt": (await asyncio.to_thread(self._ledger.sign, receipt)).encode()})

    async def take_own(self, part: int, slot: int, digest: bytes) -> None:
        """Our own part of a part that we reduce, which is in our evidence by its hash.

        Raises:
            RefusedError: it is not sound, or the part is closed.
        """
        try:
            await asyncio.to_thread(lambda: self._require_sound(part, self._input(digest)))
        except UnsoundPartError:
            self._note_unsound(part, slot)
            raise
        self._count(part, slot, digest)

    def _input(self, digest: bytes) -> memoryview:
        found = self._evidence.view(digest)
        if found is None:
            raise RefusedError("an input is no longer here")
        return found

    def _require_sound(self, part: int, encoded: Bytes | memoryview) -> None:
        try:
            parts.require_sound(self._spec, part, encoded)
        except InvalidDataError as error:
            raise UnsoundPartError(f"the part is not sound: {error}") from error

    def _hand_in(self, *envelopes: Envelope) -> None:
        """Report to the coordinator, without anybody waiting for it."""
        for envelope in envelopes:
            task = asyncio.create_task(self._report(envelope))
            self._reports.add(task)
            task.add_done_callback(self._reports.discard)

    def _count(self, part: int, slot: int, digest: bytes, sketches: bytes | None = None) -> None:
        inbox = self._inbox(part)
        if inbox.closed and slot not in inbox.inputs:
            raise RefusedError("this part is closed")
        inbox.inputs[slot] = digest
        if sketches is not None:
            inbox.sketches[slot] = sketches
        self._go_on(part, inbox)

    def _note_unsound(self, part: int, slot: int) -> None:
        log.warning("slot %d committed to a part %d of round %d that is not taken", slot, part, self._plan.round)
        inbox = self._inbox(part)
        inbox.unsound.add(slot)
        if inbox.inputs:
            self._go_on(part, inbox)

    def _go_on(self, part: int, inbox: _Inbox) -> None:
        inbox.changed.set()
        if part not in self.tasks and not inbox.closed:
            self.tasks[part] = asyncio.create_task(self._reduce(part, inbox))

    def _inbox(self, part: int) -> _Inbox:
        if part not in self._inboxes:
            self._inboxes[part] = _Inbox(closed=self._signed(part) is not None)
        return self._inboxes[part]

    def _place(self, part: int) -> int | None:
        """Our place among the reducers of a part, if we are one."""
        order = self._orders[part][: len(PARTIAL_SHARES)]
        return order.index(self._key) if self._key in order else None

    # Reducing

    async def _reduce(self, part: int, inbox: _Inbox) -> None:
        """Wait for the inputs of a part, then make, sign and publish its average."""
        place = self._place(part)
        assert place is not None
        began, end = time.monotonic(), self._started + PARTIAL_SHARES[place] * self._spec.rounds.exchange_s
        weights = await self._weights(part, end)
        if weights is None:
            return
        while not weights.keys() <= inbox.inputs.keys() | inbox.unsound:
            inbox.changed.clear()
            try:
                async with asyncio.timeout(max(0.0, end - time.monotonic())):
                    await inbox.changed.wait()
            except TimeoutError:
                break
        self._measured.inputs.add(time.monotonic() - began)
        inbox.closed = True
        inputs = {slot: inbox.inputs[slot] for slot in weights if slot in inbox.inputs}
        if self._sketching is not None:
            inputs = await asyncio.to_thread(self._as_selected, part, inputs, inbox.sketches)
            self._claims.forget(part)
        if not inputs or (place > 0 and self._rival(part) >= len(inputs)):
            return
        if any(self._promised(part, slot) for slot in weights if slot not in inputs):
            log.warning(
                "part %d of round %d: inputs that we receipted were lost; a backup has it", part, self._plan.round
            )
            return
        await self._faults.at(Point.REDUCING, self._plan.round)
        with self._measured.reduction.measure():
            try:
                async with self._benches:
                    envelope, record = await asyncio.to_thread(self._average, part, inputs, weights)
            except InvalidDataError as error:
                log.warning("part %d of round %d cannot be averaged: %s", part, self._plan.round, error)
                return
        await self._publish(envelope, record)
        await self._faults.at(Point.PUBLISHED, self._plan.round)

    async def _weights(self, part: int, end: float) -> dict[int, int] | None:
        """The slots that the average is made of, in slot order with their weights; None if that is not known in time."""
        if self._sketching is None:
            return {slot: self._plan.roster[slot].weight for slot in sorted(self._commitments.by_slot)}
        try:
            async with asyncio.timeout(max(0.0, end - time.monotonic())):
                await self._sketching.ready.wait()
        except TimeoutError:
            log.warning("part %d of round %d: no selection came in time, so it has no average", part, self._plan.round)
            self._inbox(part).closed = True
            return None
        assert self._sketching.selection is not None
        return self._sketching.selection.weights

    def _as_selected(self, part: int, inputs: dict[int, bytes], came_with: dict[int, bytes]) -> dict[int, bytes]:
        """The inputs that are what the sketches that count say: known of those that came with these. Blocking."""
        assert self._sketching is not None
        assert self._sketching.selection is not None
        counted, found = self._sketching.selection.sketches, {}
        for slot, digest in inputs.items():
            claimed = self._sketching.claimed(slot, part)
            if came_with.get(slot) == counted[slot] or self._claims.holds(part, self._input(digest), claimed):
                found[slot] = digest
            else:
                log.error("slot %d: part %d of round %d is not what it was selected by", slot, part, self._plan.round)
        return found

    def _average(self, part: int, inputs: dict[int, bytes], weights: dict[int, int]) -> tuple[Envelope, PartRecord]:
        """The weighted mean of these inputs: encoded, on disk, signed. Blocking.

        Raises:
            InvalidDataError: there is no such mean.
        """
        inputs, claimed = self._faults.averaged(self._plan.round, inputs, self._plan.slot_of(self._key))
        average = reduction.average(
            self._spec, part, {slot: self._input(mine) for slot, mine in inputs.items()}, weights
        )
        digest = chunks.content_hash(average)
        path = self._folder.work(self._plan.round) / f"average-{digest.hex()}"
        write_atomic(path, average, durable=False)  # the record outlives this process, so the average has to
        self._evidence.add_piece(self._plan.round, digest, path)
        record = PartRecord(
            run=self._spec.run_id,
            round=self._plan.round,
            sequence=part,
            part=part,
            commitment_set=self._commitments.closing.hash,
            result=digest,
            size_bytes=len(average),
            slots=tuple(claimed),
        )
        return self._ledger.sign(record), record

    def _promised(self, part: int, slot: int) -> bool:
        """Whether we ever signed a receipt for this part of a slot, by the sketches that count where any do."""
        number = part * MAX_SLOTS + slot
        receipt = self._ledger.find(self._spec.run_id, PartReceipt.kind, self._plan.round, number)
        if receipt is None or self._sketching is None or self._sketching.selection is None:
            return receipt is not None
        named = receipt.open_as(PartReceipt, run=self._spec.run_id).sketches
        return named == self._sketching.selection.sketches[slot]

    def _signed(self, part: int) -> Envelope | None:
        """Our record of this part, if we ever signed one."""
        return self._ledger.find(self._spec.run_id, PartRecord.kind, self._plan.round, part)
