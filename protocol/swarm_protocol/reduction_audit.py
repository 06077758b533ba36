"""Whether a reducer averaged a part as it had to: recomputed from the committed inputs, bit by bit.

All of it belongs to the exact domain. An input counts only if a Merkle proof shows it under its slot's commitment, a receipt
only if the reducer signed it, so that whoever has inputs, receipts and the part record comes to the same verdict, at any
time and on any machine. Nothing here fetches anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from swarm_protocol import chunks, merkle, parts, reduction
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.records import Commitment, Envelope, Outcome, PartReceipt, PartRecord, RoundPlan, SketchSet
from swarm_protocol.spec import RunSpec


class ReductionOutcome(StrEnum):
    """The verdict on one part record."""

    ACCEPTED = "accepted"
    WRONG_AVERAGE = "rejected: wrong average"
    LEFT_OUT = "rejected: receipted sender left out"
    WITHHELD = "unavailable: the reducer does not serve its own input"
    UNAVAILABLE = "inconclusive: inputs of others are not served"

    @property
    def vote(self) -> Outcome:
        """What an auditor's signed verdict says of it."""
        return Outcome(self.value.partition(":")[0])


@dataclass(frozen=True)
class Input:
    """One slot's encoded part as somebody served it, and the Merkle proof of its hash under the slot's parts root."""

    data: bytes
    proof: tuple[bytes, ...]


@dataclass(frozen=True)
class ReductionVerdict:
    """The outcome, the sentence that explains it, and the slots that it is about."""

    outcome: ReductionOutcome
    reason: str
    slots: tuple[int, ...] = ()


def is_committed(spec: RunSpec, commitment: Commitment, part: int, found: Input) -> bool:
    """Whether these bytes are what the slot committed to as this part."""
    try:
        merkle.verify(commitment.parts_root, chunks.content_hash(found.data), part, parts.part_count(spec), found.proof)
    except InvalidDataError:
        return False
    return True


def judge(
    spec: RunSpec,
    plan: RoundPlan,
    commitments: Mapping[int, Commitment],
    published: Envelope,
    inputs: Mapping[int, Input],
    receipts: Iterable[Envelope],
    *,
    closing: SketchSet | None = None,
) -> ReductionVerdict:
    """The verdict on a published part record.

    A receipt that the record breaks is enough for a rejection. Inputs that are missing, or that are not what was committed
    to, accuse nobody: the average is then `unavailable`.

    Args:
        commitments: those that count in the round, by slot.
        published: the signed PartRecord; its signer has to be a reducer of the plan.
        inputs: what was served, by slot.
        receipts: signed receipts that senders hold; those of other reducers and parts are passed over.
        closing: the round's SketchSet, where its aggregator selects slots.

    Raises:
        InvalidDataError: the record is not one of this round, so there is nothing to judge.
    """
    record = published.open_as(PartRecord, run=spec.run_id, round=plan.round)
    if not any(seat.peer == published.key and seat.reducer for seat in plan.roster):
        raise InvalidDataError("a part record by nobody who reduces in this round")
    if record.part >= parts.part_count(spec) or not set(record.slots) <= commitments.keys():
        raise InvalidDataError("a part record with a part or slots that the round does not have")
    if closing is None:
        entitled = {slot: plan.roster[slot].weight for slot in commitments}
    else:
        entitled = {one.slot: one.weight for one in closing.selected}
    name = f"part {record.part} in round {record.round}"
    wrong = f"wrong average of {name}:"
    left_out = _left_out(spec, record, published.key, commitments, receipts, closing)
    if left_out:
        reason = f"receipted sender left out of {name}: the reducer signed receipts for slots {_list(left_out)}"
        return ReductionVerdict(ReductionOutcome.LEFT_OUT, reason, left_out)
    strangers = tuple(slot for slot in record.slots if slot not in entitled)
    if strangers:
        reason = f"{wrong} it has slots in it that were not selected: {_list(strangers)}"
        return ReductionVerdict(ReductionOutcome.WRONG_AVERAGE, reason, strangers)
    missing = tuple(
        slot
        for slot in record.slots
        if slot not in inputs or not is_committed(spec, commitments[slot], record.part, inputs[slot])
    )
    if missing:
        own = tuple(slot for slot in missing if plan.roster[slot].peer == published.key)
        if own == missing:
            reason = f"the reducer of {name} does not serve its own input"
            return ReductionVerdict(ReductionOutcome.WITHHELD, reason, missing)
        reason = f"nobody serves the committed inputs of {name} from these slots: {_list(missing)}"
        return ReductionVerdict(ReductionOutcome.UNAVAILABLE, reason, missing)
    try:
        for slot in record.slots:
            parts.require_sound(spec, record.part, inputs[slot].data)
        expected = reduction.average(spec, record.part, {slot: inputs[slot].data for slot in record.slots}, entitled)
    except InvalidDataError as error:
        reason = f"{wrong} these inputs have no average: {error}"
        return ReductionVerdict(ReductionOutcome.WRONG_AVERAGE, reason, record.slots)
    if (chunks.content_hash(expected), len(expected)) != (record.result, record.size_bytes):
        reason = f"{wrong} that of the committed inputs has other bits"
        return ReductionVerdict(ReductionOutcome.WRONG_AVERAGE, reason, record.slots)
    return ReductionVerdict(ReductionOutcome.ACCEPTED, "equal in every bit", record.slots)


def _left_out(
    spec: RunSpec,
    record: PartRecord,
    reducer: bytes,
    commitments: Mapping[int, Commitment],
    receipts: Iterable[Envelope],
    closing: SketchSet | None,
) -> tuple[int, ...]:
    """The slots that hold a receipt of this reducer for this part, and are not in its record."""
    found = set()
    for envelope in receipts:
        try:
            receipt = envelope.open_as(PartReceipt, run=spec.run_id, round=record.round, key=reducer)
        except InvalidDataError:
            continue
        commitment = commitments.get(receipt.slot)
        if commitment is None or receipt.commitment != commitment.hash:
            continue
        if receipt.broken_by(record, closing):
            found.add(receipt.slot)
    return tuple(sorted(found))


def _list(slots: Sequence[int]) -> str:
    shown = ", ".join(map(str, slots[:20]))
    return shown if len(slots) <= 20 else f"{shown} and {len(slots) - 20} more"
