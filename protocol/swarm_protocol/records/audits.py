"""The records of audits: nonces, the beacon, evidence, verdicts, and proofs of misconduct."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field, Strict

from swarm_protocol.records.base import (
    MAX_PARTS,
    MAX_SLOTS,
    Bytes32,
    Finite,
    Frozen,
    HexBytes,
    Part,
    Reason,
    Record,
    Slot,
)

MAX_PROOF_BYTES = 1 << 18
MAX_ITEMS = MAX_SLOTS + 8
MAX_ITEM_CHUNKS = 1 << 15


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


class EvidenceItem(Frozen):
    """Bytes that an auditor judged by, cut into chunks of 1 MiB, the last one being shorter; each by its plain hash."""

    name: Annotated[str, Field(pattern=r"^[a-z]{1,16}(-[0-9]{1,5})?$")]
    size_bytes: Annotated[int, Field(ge=0, lt=1 << 53)]
    chunks: Annotated[tuple[Bytes32, ...], Strict(False), Field(max_length=MAX_ITEM_CHUNKS)]


class Evidence(Record):
    """What an auditor who is about to reject judged by, for the coordinator to archive.

    `audited` is the commitment or, with a `part`, the part record. `segment` is the one that decided, of a contribution. The
    sequence is `sequence_of(slot, part)`.
    """

    kind: ClassVar[str] = "evidence"
    slot: Slot
    part: Part | None
    audited: Bytes32
    segment: Annotated[int, Field(ge=0, le=10_000)] | None
    items: Annotated[tuple[EvidenceItem, ...], Strict(False), Field(min_length=1, max_length=MAX_ITEMS)]

    @staticmethod
    def sequence_of(slot: int, part: int | None) -> int:
        """`slot * 65537`, and for an average `part + 1` more."""
        return slot * (MAX_PARTS + 1) + (0 if part is None else part + 1)


class Verdict(Record):
    """An auditor's signed outcome for one contribution. The sequence is the slot.

    `evidence` is the hash of the Evidence of a rejection, None where nothing is archived.
    """

    kind: ClassVar[str] = "verdict"
    slot: Slot
    commitment: Bytes32
    outcome: Annotated[Outcome, Strict(False)]
    comparison: Annotated[Comparison, Strict(False)] | None
    statistic: Finite | None = Field(description="relative L2 distance; None where nothing could be compared")
    reason: Reason
    steps_replayed: Annotated[int, Field(ge=0, le=10_000)]
    fingerprint: Bytes32
    evidence: Bytes32 | None = None


class PartVerdict(Record):
    """An auditor's signed outcome for one average, made by the reducer who holds `slot`. The sequence is the part.

    `evidence` is as in a Verdict.
    """

    kind: ClassVar[str] = "part-verdict"
    part: Part
    slot: Slot
    part_record: Bytes32
    outcome: Annotated[Outcome, Strict(False)]
    reason: Reason
    evidence: Bytes32 | None = None


class Equivocation(Record):
    """Two different records that one key signed under one name, as encoded envelopes: they prove it, whoever hands them in.

    The sequence is the reporter's own count (see `equivocation`).
    """

    kind: ClassVar[str] = "equivocation"
    first: Annotated[bytes, Field(min_length=1, max_length=MAX_PROOF_BYTES), HexBytes]
    second: Annotated[bytes, Field(min_length=1, max_length=MAX_PROOF_BYTES), HexBytes]
