"""The records of sketches, of objections to them, and of what a reducer promises."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field, Strict

from swarm_protocol.records.base import MAX_SLOTS, Bytes32, Frozen, Part, Record, Slot, SlotHash
from swarm_protocol.records.rounds import PartRecord


class SketchFault(StrEnum):
    """Why a slot is not in a round's selection, though its contribution counts."""

    MISSING = "missing"  # no signed sketches in time
    UNAVAILABLE = "unavailable"  # signed, but their bytes were nowhere to be had in time
    UNSOUND = "unsound"  # their bytes are not finite sketches under the signed root
    FORGED = "forged"  # a sketch is not that of the part that was committed to: an objection that was recomputed


class Sketches(Record):
    """A sender's sketches of its decoded parts, under a CommitmentSet. The sequence is the slot.

    `root` is over the sketches (`sketch.root`); `blob` is the content hash of their bytes, one after the other.
    """

    kind: ClassVar[str] = "sketches"
    commitment_set: Bytes32
    commitment: Bytes32
    slot: Slot
    root: Bytes32
    blob: Bytes32


class SketchObjection(Record):
    """A reducer says that a slot's committed part is not sound, or not what its signed sketches say. The sequence is part
    · 10,000 + slot.

    `sketches` is the hash of the Sketches, `part_hash` that of the encoded part, `proof` shows it under the parts root.
    """

    kind: ClassVar[str] = "sketch-objection"
    part: Part
    slot: Slot
    sketches: Bytes32
    part_hash: Bytes32
    proof: Annotated[tuple[Bytes32, ...], Strict(False), Field(max_length=16)]


class SlotFault(Frozen):
    slot: Slot
    fault: Annotated[SketchFault, Strict(False)]


class SlotWeight(Frozen):
    slot: Slot
    weight: Annotated[int, Field(ge=1, lt=1 << 53)]


class SketchSet(Record):
    """Closes a round's sketches, by the checkpoint worker: which count, and what the aggregator selects by them.

    Every slot with a weight in the plan and a commitment is in `counted` (the hash of its Sketches) or in `excluded`;
    `selected` is what anybody computes from those that count. All are in slot order.
    """

    kind: ClassVar[str] = "sketch-set"
    commitment_set: Bytes32
    counted: Annotated[tuple[SlotHash, ...], Strict(False), Field(max_length=MAX_SLOTS)]
    excluded: Annotated[tuple[SlotFault, ...], Strict(False), Field(max_length=MAX_SLOTS)]
    selected: Annotated[tuple[SlotWeight, ...], Strict(False), Field(max_length=MAX_SLOTS)]


class PartReceipt(Record):
    """A reducer has a slot's part, and found it sound: its average of that part has the slot in it, or there is none.

    `part_hash` is the hash of the encoded part; `sketches` that of the Sketches whose sketch of it is right, in a round
    that needs them: there the promise holds if the slot is selected by these. The sequence is part · 10,000 + slot.
    """

    kind: ClassVar[str] = "part-receipt"
    commitment: Bytes32
    part: Part
    slot: Slot
    part_hash: Bytes32
    sketches: Bytes32 | None = None

    def broken_by(self, record: PartRecord, closing: SketchSet | None = None) -> bool:
        """Whether this part record, by the same reducer, leaves the slot out: misconduct, and these prove it.

        Args:
            closing: the round's SketchSet, where it needs one; who is not selected by what the receipt names may be left out.
        """
        same = (self.run, self.round, self.part) == (record.run, record.round, record.part)
        if closing is not None:
            counted = SlotHash(slot=self.slot, hash=self.sketches or b"\0" * 32) in closing.counted
            same = same and counted and any(self.slot == one.slot for one in closing.selected)
        return same and self.slot not in record.slots
