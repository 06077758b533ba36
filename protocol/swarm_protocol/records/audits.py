"""The records of audits: nonces, the beacon, verdicts, and proofs of misconduct."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field, Strict

from swarm_protocol.records.base import MAX_SLOTS, Bytes32, Finite, Frozen, HexBytes, Part, Reason, Record, Slot

MAX_PROOF_BYTES = 1 << 18


class Outcome(StrEnum):
    """What an auditor says of a contribution, or of an average."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    INCONCLUSIVE = "inconclusive"
    UNAVAILABLE = "unavailable"


class Comparison(StrEnum):
    """How a replay compares with what was claimed."""

    EQUAL = "equal"
    DIFFERENT = "different"
    WITHIN = "within"
    OUTSIDE = "outside"


class NonceOpening(Record):
    """A node opens the nonce that its commitment hashed, after the manifest."""

    kind: ClassVar[str] = "nonce-opening"
    slot: Slot
    nonce: Bytes32


class SlotNonce(Frozen):
    slot: Slot
    nonce: Bytes32


class BeaconReveal(Record):
    """The round's value of the beacon chain, with the nonces that were opened before it: all that the audit draw needs."""

    kind: ClassVar[str] = "beacon"
    value: Bytes32
    manifest: Bytes32
    openings: Annotated[tuple[SlotNonce, ...], Strict(False), Field(max_length=MAX_SLOTS)]


class Verdict(Record):
    """An auditor's signed outcome for one contribution. The sequence is the slot."""

    kind: ClassVar[str] = "verdict"
    slot: Slot
    commitment: Bytes32
    outcome: Annotated[Outcome, Strict(False)]
    comparison: Annotated[Comparison, Strict(False)] | None
    statistic: Finite | None = Field(description="relative L2 distance; None where nothing could be compared")
    reason: Reason
    steps_replayed: Annotated[int, Field(ge=0, le=10_000)]
    fingerprint: Bytes32


class PartVerdict(Record):
    """An auditor's signed outcome for one average, made by the reducer who holds `slot`. The sequence is the part."""

    kind: ClassVar[str] = "part-verdict"
    part: Part
    slot: Slot
    part_record: Bytes32
    outcome: Annotated[Outcome, Strict(False)]
    reason: Reason


class Equivocation(Record):
    """Two different records that one key signed under one name, as encoded envelopes: they prove it, whoever hands them in.

    The sequence is the reporter's own count (see `equivocation`).
    """

    kind: ClassVar[str] = "equivocation"
    first: Annotated[bytes, Field(min_length=1, max_length=MAX_PROOF_BYTES), HexBytes]
    second: Annotated[bytes, Field(min_length=1, max_length=MAX_PROOF_BYTES), HexBytes]
