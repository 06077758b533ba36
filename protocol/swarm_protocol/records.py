"""The signed records of a run: frozen, typed, bounded, and encoded in one way only.

A record's body is canonical CBOR of its fields with its kind and version. Its hash is a keyed BLAKE3 of the body, one key
per kind, so that no record can pass for another; the signature is over that hash. An `Envelope` carries body, key and
signature; the body is never encoded a second time. (run, kind, round, sequence) names a record of one signer: two
different ones under one name are an equivocation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Annotated, Any, ClassVar, TypeVar

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, Strict, ValidationError

from swarm_protocol import encoding
from swarm_protocol.errors import EncodingError, InvalidDataError, SignatureError
from swarm_protocol.identity import Identity, peer_id, verify

MAX_RECORD_BYTES = 1 << 20
MAX_SLOTS = 10_000
MAX_PARTS = 1 << 16
MAX_PROOF_BYTES = 1 << 18

_SMALL_BYTES = 1 << 12

_Hex = PlainSerializer(bytes.hex, when_used="json")
Bytes32 = Annotated[bytes, Field(min_length=32, max_length=32), _Hex]
Round = Annotated[int, Field(ge=0, lt=1 << 31)]
Sequence = Annotated[int, Field(ge=0, lt=1 << 62)]
Slot = Annotated[int, Field(ge=0, lt=MAX_SLOTS)]
Milliseconds = Annotated[int, Field(ge=0, lt=1 << 53, description="Unix time in milliseconds")]
Label = Annotated[str, Field(max_length=64)]
Reason = Annotated[str, Field(max_length=500)]
Multiaddr = Annotated[str, Field(min_length=1, max_length=256)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Role(StrEnum):
    AUDITOR = "auditor"
    CHECKPOINT_WORKER = "checkpoint-worker"


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


class SketchFault(StrEnum):
    """Why a slot is not in a round's selection, though its contribution counts."""

    MISSING = "missing"  # no signed sketches in time
    UNAVAILABLE = "unavailable"  # signed, but their bytes were nowhere to be had in time
    UNSOUND = "unsound"  # their bytes are not finite sketches under the signed root
    FORGED = "forged"  # a sketch is not that of the part that was committed to: an objection that was recomputed


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Record(_Frozen):
    """What all records have. `kind` and `version` are part of the encoded body."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1

    run: Bytes32
    round: Round
    sequence: Sequence = 0

    @cached_property
    def body(self) -> bytes:
        """Canonical bytes."""
        return encoding.encode({**self.model_dump(mode="python"), "kind": self.kind, "v": self.version})

    @cached_property
    def hash(self) -> bytes:
        """32 bytes that name this record."""
        return record_hash(self.kind, self.body)


class Seat(_Frozen):
    """A slot of a roster: who holds it, how many inner steps it does, whether it may reduce, what it weighs in the mean.

    `upload_bytes_per_s` is what the node measured, 0 if that is not known: by it the parts are shared out among reducers.
    """

    peer: Bytes32
    steps: Annotated[int, Field(ge=1, le=10_000)]
    weight: Annotated[int, Field(ge=0, le=1 << 24, description="tokens, capped by the spec")]
    reducer: bool
    upload_bytes_per_s: Annotated[int, Field(ge=0, lt=1 << 53)] = 0


class Registration(Record):
    """A node introduces itself."""

    kind: ClassVar[str] = "registration"
    protocol: int
    name: Label
    agent: Annotated[str, Field(max_length=100, description="software and its version")]
    device: Annotated[str, Field(max_length=100)]
    fingerprint: Bytes32


class Appointment(Record):
    """The coordinator gives a key an office in the run."""

    kind: ClassVar[str] = "appointment"
    role: Annotated[Role, Strict(False)]
    key: Bytes32


class Addresses(Record):
    """Where the signer can be dialled on the peer plane; the checkpoint worker's are everybody's way in."""

    kind: ClassVar[str] = "addresses"
    multiaddrs: Annotated[tuple[Multiaddr, ...], Strict(False), Field(min_length=1, max_length=16)]


class Ready(Record):
    """A node holds the checkpoint that round `round` starts from, and would take a slot in it. Repeated as a heartbeat."""

    kind: ClassVar[str] = "ready"
    base: Bytes32
    tokens_per_s: Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
    can_reduce: bool
    upload_bytes_per_s: Annotated[int, Field(ge=0, lt=1 << 53, description="measured; 0 if not yet known")]


class RoundPlan(Record):
    """What everybody does in a round. Slots are positions in `roster`, which is sorted by PeerID."""

    kind: ClassVar[str] = "plan"
    base: Bytes32
    roster: Annotated[tuple[Seat, ...], Strict(False), Field(min_length=1, max_length=MAX_SLOTS)]
    cursor: Annotated[int, Field(ge=0, lt=1 << 62, description="first window of the data order")]
    commit_by_ms: Milliseconds
    exchange_by_ms: Milliseconds
    previous_beacon: Bytes32
    log_size: Annotated[int, Field(ge=0, lt=1 << 62)]
    log_root: Bytes32

    def slot_of(self, public_key: bytes) -> int | None:
        return next((slot for slot, seat in enumerate(self.roster) if seat.peer == public_key), None)


class Commitment(Record):
    """Fixes a contribution before anybody knows whether it will be audited."""

    kind: ClassVar[str] = "commitment"
    plan: Bytes32
    slot: Slot
    tokens: Annotated[int, Field(ge=1, lt=1 << 53)]
    trace_root: Bytes32
    parts_root: Bytes32
    nonce_hash: Bytes32
    fingerprint: Bytes32
    sketch_root: Bytes32 | None = None
    train_loss: Annotated[float, Field(allow_inf_nan=False, description="claimed mean over the steps, nats per token")]


class SlotHash(_Frozen):
    slot: Slot
    hash: Bytes32


class CommitmentSet(Record):
    """Closes a round's contributions: the commitments that count, in slot order."""

    kind: ClassVar[str] = "commitment-set"
    plan: Bytes32
    commitments: Annotated[tuple[SlotHash, ...], Strict(False), Field(max_length=MAX_SLOTS)]


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
    part: Annotated[int, Field(ge=0, lt=MAX_PARTS)]
    slot: Slot
    sketches: Bytes32
    part_hash: Bytes32
    proof: Annotated[tuple[Bytes32, ...], Strict(False), Field(max_length=16)]


class SlotFault(_Frozen):
    slot: Slot
    fault: Annotated[SketchFault, Strict(False)]


class SlotWeight(_Frozen):
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


class PartRecord(Record):
    """A reducer's average of one part: `result` is the hash of its encoding, `slots` those that are in it. The sequence
    is the part."""

    kind: ClassVar[str] = "part-record"
    part: Annotated[int, Field(ge=0, lt=MAX_PARTS)]
    commitment_set: Bytes32
    result: Bytes32
    size_bytes: Annotated[int, Field(ge=1, lt=1 << 40)]
    slots: Annotated[tuple[Slot, ...], Strict(False), Field(min_length=1, max_length=MAX_SLOTS)]


class PartReceipt(Record):
    """A reducer has a slot's part, and found it sound: its average of that part has the slot in it, or there is none.

    `part_hash` is the hash of the encoded part; `sketches` that of the Sketches whose sketch of it is right, in a round
    that needs them: there the promise holds if the slot is selected by these. The sequence is part · 10,000 + slot.
    """

    kind: ClassVar[str] = "part-receipt"
    commitment: Bytes32
    part: Annotated[int, Field(ge=0, lt=MAX_PARTS)]
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


class PartHeld(Record):
    """The checkpoint worker holds the bytes of a part record's result and found them sound. The sequence is its own count."""

    kind: ClassVar[str] = "part-held"
    part_record: Bytes32


class CheckpointReport(Record):
    """The checkpoint worker's root after the outer step of round `round`."""

    kind: ClassVar[str] = "checkpoint-report"
    base: Bytes32
    parts: Annotated[tuple[Bytes32 | None, ...], Strict(False), Field(min_length=1, max_length=MAX_PARTS)]
    root: Bytes32


class RoundManifest(Record):
    """Seals a round. Per part one `PartRecord`, or None: missing, a zero pseudo-gradient. Every node derives this body.

    `sketches` is the hash of the round's SketchSet, None where it needed none or none came.
    """

    kind: ClassVar[str] = "manifest"
    plan: Bytes32
    commitment_set: Bytes32
    sketches: Bytes32 | None = None
    parts: Annotated[tuple[Bytes32 | None, ...], Strict(False), Field(min_length=1, max_length=MAX_PARTS)]
    base: Bytes32
    root: Bytes32


class NonceOpening(Record):
    """A node opens the nonce that its commitment hashed, after the manifest."""

    kind: ClassVar[str] = "nonce-opening"
    slot: Slot
    nonce: Bytes32


class SlotNonce(_Frozen):
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
    part: Annotated[int, Field(ge=0, lt=MAX_PARTS)]
    slot: Slot
    part_record: Bytes32
    outcome: Annotated[Outcome, Strict(False)]
    reason: Reason


class Equivocation(Record):
    """Two different records that one key signed under one name, as encoded envelopes: they prove it, whoever hands them in.

    The sequence is the reporter's own count (see `equivocation`).
    """

    kind: ClassVar[str] = "equivocation"
    first: Annotated[bytes, Field(min_length=1, max_length=MAX_PROOF_BYTES), _Hex]
    second: Annotated[bytes, Field(min_length=1, max_length=MAX_PROOF_BYTES), _Hex]


class Evaluation(Record):
    """Held-out loss of the checkpoint that round `round` starts from. Informative: this number is in the tolerant domain."""

    kind: ClassVar[str] = "evaluation"
    root: Bytes32
    loss: Annotated[float, Field(ge=0, allow_inf_nan=False, description="nats per token")]
    tokens: Annotated[int, Field(ge=1, lt=1 << 53)]


KINDS: dict[str, type[Record]] = {
    record.kind: record
    for record in (
        Registration, Appointment, Addresses, Ready, RoundPlan, Commitment, CommitmentSet, Sketches, SketchObjection,
        SketchSet, PartRecord, PartReceipt, PartHeld, CheckpointReport, RoundManifest, NonceOpening, BeaconReveal, Verdict,
        PartVerdict, Equivocation, Evaluation,
    )
}  # fmt: skip

R = TypeVar("R", bound=Record)


def record_hash(kind: str, body: bytes) -> bytes:
    """BLAKE3 of a body under its kind's key."""
    return blake3(body, derive_key_context=f"swarm-node 2026 record {kind}").digest()


def parse(body: bytes) -> Record:
    """The record of a canonical body.

    Raises:
        EncodingError: not canonical, of an unknown kind or version, or with a field out of bounds.
    """
    value = encoding.decode(body, max_bytes=MAX_RECORD_BYTES)
    if not isinstance(value, dict):
        raise EncodingError("a record is a map")
    fields: dict[str, Any] = dict(value)
    kind, version = fields.pop("kind", None), fields.pop("v", None)
    record_type = KINDS.get(kind) if isinstance(kind, str) else None
    if record_type is None or version != record_type.version:
        raise EncodingError(f"no record of kind {kind!r:.40} and version {version!r:.20} is known; upgrade swarm-node?")
    try:
        record = record_type.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(step) for step in first["loc"])
        raise EncodingError(f"{record_type.kind}.{field}: {first['msg']}") from error
    if record.body != body:
        raise EncodingError(f"this {record_type.kind} leaves out a field")
    return record


@dataclass(frozen=True, slots=True)
class Envelope:
    """A signed record as it travels and is stored: the body's exact bytes, who signed, the signature over its hash."""

    body: bytes
    key: bytes
    signature: bytes

    @classmethod
    def sign(cls, identity: Identity, record: Record) -> Envelope:
        """Sign. Whoever publishes the result stores it first (see `signing`)."""
        return cls(record.body, identity.public_key, identity.sign(record.hash))

    def encode(self) -> bytes:
        return encoding.encode({"body": self.body, "key": self.key, "sig": self.signature})

    @classmethod
    def decode(cls, data: bytes) -> Envelope:
        """Raises `EncodingError`. The signature is not looked at: `open` does that."""
        value = encoding.decode(data, max_bytes=MAX_RECORD_BYTES, max_depth=1)
        if not isinstance(value, dict) or set(value) != {"body", "key", "sig"}:
            raise EncodingError("a signed record is a map of body, key and sig")
        body, key, signature = value["body"], value["key"], value["sig"]
        if not (isinstance(body, bytes) and isinstance(key, bytes) and isinstance(signature, bytes)):
            raise EncodingError("body, key and sig of a signed record are bytes")
        if len(key) != 32 or len(signature) != 64:
            raise EncodingError("a signed record has a key of 32 bytes and a signature of 64")
        return cls(body, key, signature)

    @property
    def peer(self) -> str:
        return peer_id(self.key)

    def open(self) -> Record:
        """The record, after its signature was checked.

        Raises:
            EncodingError, SignatureError
        """
        return _opened(self) if len(self.body) <= _SMALL_BYTES else _open(self)

    def open_as(self, record_type: type[R], *, run: bytes, round: int | None = None, key: bytes | None = None) -> R:
        """The record, if it is of this type, run, round and signer, and signed.

        Raises:
            InvalidDataError: says which of these does not hold.
        """
        record = self.open()
        if not isinstance(record, record_type):
            raise InvalidDataError(f"a {record.kind} where a {record_type.kind} was expected")
        if record.run != run:
            raise InvalidDataError(f"a {record.kind} of another run")
        if round is not None and record.round != round:
            raise InvalidDataError(f"a {record.kind} of round {record.round} where round {round} was expected")
        if key is not None and self.key != key:
            raise SignatureError(f"a {record.kind} signed by {self.peer} instead of {peer_id(key)}")
        return record


def _open(envelope: Envelope) -> Record:
    record = parse(envelope.body)
    verify(envelope.key, envelope.signature, record.hash)
    return record


_opened = lru_cache(maxsize=512)(_open)
"""Small records come several times, from the coordinator and from peers; they are immutable, and looked at once."""


def encode_list(envelopes: list[Envelope]) -> bytes:
    """Several signed records in one message."""
    return encoding.encode([envelope.encode() for envelope in envelopes])


def decode_list(data: bytes, *, max_bytes: int) -> list[Envelope]:
    """Raises `EncodingError`."""
    value = encoding.decode(data, max_bytes=max_bytes, max_depth=2)
    if not isinstance(value, list):
        raise EncodingError("signed records travel in a list")
    items: list[Envelope] = []
    for item in value:
        if not isinstance(item, bytes):
            raise EncodingError("signed records travel as bytes")
        items.append(Envelope.decode(item))
    return items
