"""The reducer's side of a round: parts in, each checked at the door and receipted; one average out, signed once.

A part is taken only from the holder of its slot, only if it hashes to what that slot committed to, and only if it is
sound: it decodes, all its values are finite, and its norm is within the spec's bound. Inputs are kept for a few rounds, so
that a reducer can be audited, and on disk beyond what `Evidence` holds, so that it needs little memory. The average is made
once every committed slot is in, or with what is there when our share of the exchange time is over. Whoever has a receipt
is in it, or it is not published: a receipt comes after its input is counted; after a crash a part is published only if
all inputs that have a receipt were on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from swarm_node.evidence import Evidence
from swarm_node.faults import Faults, Point
from swarm_node.folder import RunFolder
from swarm_node.measured import Measured
from swarm_protocol import aggregate, chunks, codec, merkle, parts
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


@dataclass
class _Inbox:
    """One part: the hashes of its inputs by slot, the slots whose committed part is not sound, whether it is closed."""

    inputs: dict[int, bytes] = field(default_factory=dict)
    unsound: set[int] = field(default_factory=set)
    closed: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class UnsoundPartError(RefusedError):
    """The committed bytes, and no part: no reducer will ever take them."""


class Reducer:
    """One node's reducing in one round. `orders[part]` are the keys of that part's reducers.

    `rival(part)` is the number of slots in the best average of a part that others have published so far.
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
        for task in self.tasks.values():
            task.cancel()
        for outcome in await asyncio.gather(*self.tasks.values(), return_exceptions=True):
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
        inbox = self._inbox(part)
        if inbox.closed:
            raise RefusedError("this part is closed")
        await self._faults.at(Point.RECEIVING, self._plan.round)

        def keep(encoded: Bytes) -> bytes:
            digest = chunks.content_hash(encoded)
            if merkle.root_from_proof(digest, part, len(self._orders), proof) != commitment.parts_root:
                raise RefusedError("the part is not the one that was committed to")
            self._require_sound(part, encoded)
            path = self._folder.work(self._plan.round) / f"input-{part}-{slot}-{digest.hex()}"
            if slot not in inbox.inputs:
                self._evidence.keep(self._plan.round, digest, encoded, path)
            return digest

        try:
            async with self._doors:
                digest = await call.body_into(keep, expected)
        except UnsoundPartError:
            self._note_unsound(part, slot)
            raise
        self._count(part, slot, digest)
        receipt = PartReceipt(
            run=self._spec.run_id,
            round=self._plan.round,
            sequence=part * MAX_SLOTS + slot,
            commitment=commitment.hash,
            part=part,
            slot=slot,
            part_hash=digest,
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

    def _input(self, digest: bytes) -> Bytes:
        found = self._evidence.find(digest)
        if found is None:
            raise RefusedError("an input is no longer here")
        return found

    def _require_sound(self, part: int, encoded: Bytes) -> None:
        try:
            parts.require_sound(self._spec, part, encoded)
        except InvalidDataError as error:
            raise UnsoundPartError(f"the part is not sound: {error}") from error

    def _count(self, part: int, slot: int, digest: bytes) -> None:
        inbox = self._inbox(part)
        if inbox.closed and slot not in inbox.inputs:
            raise RefusedError("this part is closed")
        inbox.inputs[slot] = digest
        self._go_on(part, inbox)

    def _note_unsound(self, part: int, slot: int) -> None:
        log.warning("slot %d committed to a part %d of round %d that is not sound", slot, part, self._plan.round)
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
        end = self._started + PARTIAL_SHARES[place] * self._spec.rounds.exchange_s
        while len(inbox.inputs) + len(inbox.unsound) < len(self._commitments.by_slot):
            inbox.changed.clear()
            try:
                async with asyncio.timeout(max(0.0, end - time.monotonic())):
                    await inbox.changed.wait()
            except TimeoutError:
                break
        inbox.closed = True
        if place > 0 and self._rival(part) >= len(inbox.inputs):
            return
        left_out = [slot for slot in self._commitments.by_slot if slot not in inbox.inputs]
        if any(self._receipted(part, slot) for slot in left_out):
            log.warning(
                "part %d of round %d: inputs that we receipted were lost; a backup has it", part, self._plan.round
            )
            return
        await self._faults.at(Point.REDUCING, self._plan.round)
        with self._measured.reduction.measure():
            try:
                async with self._benches:
                    envelope, record = await asyncio.to_thread(self._average, part, dict(sorted(inbox.inputs.items())))
            except InvalidDataError as error:
                log.warning("part %d of round %d cannot be averaged: %s", part, self._plan.round, error)
                return
        await self._publish(envelope, record)
        await self._faults.at(Point.PUBLISHED, self._plan.round)

    def _average(self, part: int, inputs: dict[int, bytes]) -> tuple[Envelope, PartRecord]:
        """The weighted mean of these inputs: encoded, on disk, signed. Blocking.

        Raises:
            InvalidDataError: there is no such mean.
        """
        numel = parts.slices(self._spec)[part].stop - parts.slices(self._spec)[part].start
        weights = {slot: self._plan.roster[slot].weight for slot in inputs}
        exchange = self._spec.exchange
        aggregation = aggregate.start(exchange.aggregator, weights, numel, trim_fraction=exchange.trim_fraction)
        for slot, mine in inputs.items():
            aggregation.add(slot, parts.decode_part(self._spec, part, self._input(mine)))
        average = codec.get(self._spec.exchange.codec).encode(aggregation.result())
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
            slots=tuple(inputs),
        )
        return self._ledger.sign(record), record

    def _receipted(self, part: int, slot: int) -> bool:
        """Whether we ever signed a receipt for this part of a slot."""
        number = part * MAX_SLOTS + slot
        return self._ledger.find(self._spec.run_id, PartReceipt.kind, self._plan.round, number) is not None

    def _signed(self, part: int) -> Envelope | None:
        """Our record of this part, if we ever signed one."""
        return self._ledger.find(self._spec.run_id, PartRecord.kind, self._plan.round, part)
