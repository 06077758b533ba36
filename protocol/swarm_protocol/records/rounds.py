"""The records of a round, from those who present themselves to the manifest that seals it."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, Strict

from swarm_protocol.records.base import (
    MAX_PARTS,
    MAX_SLOTS,
    Bytes32,
    Frozen,
    Label,
    Milliseconds,
    Multiaddr,
    Part,
    Reason,
    Record,
    Role,
    Slot,
    SlotHash,
    Text,
)

MAX_SAMPLE_CHARACTERS = 2000


class Registration(Record):
    """A node introduces itself. What it earns from now on counts for `team` as well; empty for none."""

    kind: ClassVar[str] = "registration"
    protocol: int
    name: Label
    agent: Annotated[Text, Field(max_length=100, description="software and its version")]
    device: Annotated[Text, Field(max_length=100)]
    fingerprint: Bytes32
    team: Label = ""


class Appointment(Record):
    """The coordinator gives a key an office in the run."""

    kind: ClassVar[str] = "appointment"
    role: Annotated[Role, Strict(False)]
    key: Bytes32


class Dismissal(Record):
    """The coordinator takes an auditor's office back, for good. The sequence is its own count of dismissals.

    From here on the key's verdicts are refused, and those that it gave do not count in audits that have no outcome yet.
    """

    kind: ClassVar[str] = "dismissal"
    key: Bytes32
    reason: Reason


class Addresses(Record):
    """Where the signer can be dialled on the peer plane; the checkpoint worker's are everybody's way in."""

    kind: ClassVar[str] = "addresses"
    multiaddrs: Annotated[tuple[Multiaddr, ...], Strict(False), Field(min_length=1, max_length=16)]


class Holding(Record):
    """The signer serves a checkpoint to whoever downloads it; it stands in the DHT, and nowhere else."""

    kind: ClassVar[str] = "holding"
    root: Bytes32


class TransportKey(Record):
    """The signer's gossip process goes by this key, until then. Of round 0; a process that starts anew signs a new one."""

    kind: ClassVar[str] = "transport-key"
    key: Bytes32
    expires_ms: Milliseconds


class Ready(Record):
    """A node holds the checkpoint that round `round` starts from, and would take a slot in it. Repeated as a heartbeat."""

    kind: ClassVar[str] = "ready"
    base: Bytes32
    tokens_per_s: Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
    can_reduce: bool
    upload_bytes_per_s: Annotated[int, Field(ge=0, lt=1 << 53, description="measured; 0 if not yet known")]


class Seat(Frozen):
    """A slot of a roster: who holds it, how many inner steps it does, whether it may reduce, what it weighs in the mean.

    `upload_bytes_per_s` is what the node measured, 0 if that is not known: by it the parts are shared out among reducers.
    """

    peer: Bytes32
    steps: Annotated[int, Field(ge=1, le=10_000)]
    weight: Annotated[int, Field(ge=0, le=1 << 24, description="tokens, capped by the spec")]
    reducer: bool
    upload_bytes_per_s: Annotated[int, Field(ge=0, lt=1 << 53)] = 0


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


class CommitmentSet(Record):
    """Closes a round's contributions: the commitments that count, in slot order."""

    kind: ClassVar[str] = "commitment-set"
    plan: Bytes32
    commitments: Annotated[tuple[SlotHash, ...], Strict(False), Field(max_length=MAX_SLOTS)]


class PartRecord(Record):
    """A reducer's average of one part: `result` is the hash of its encoding, `slots` those that are in it. The sequence
    is the part."""

    kind: ClassVar[str] = "part-record"
    part: Part
    commitment_set: Bytes32
    result: Bytes32
    size_bytes: Annotated[int, Field(ge=1, lt=1 << 40)]
    slots: Annotated[tuple[Slot, ...], Strict(False), Field(min_length=1, max_length=MAX_SLOTS)]


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


class Evaluation(Record):
    """Held-out loss of the checkpoint that round `round` starts from. Informative: this number is in the tolerant domain.

    `sample` is what the model writes after a prompt of held-out text, now and then: prompt, " ‖ ", continuation.
    """

    kind: ClassVar[str] = "evaluation"
    root: Bytes32
    loss: Annotated[float, Field(ge=0, allow_inf_nan=False, description="nats per token")]
    tokens: Annotated[int, Field(ge=1, lt=1 << 53)]
    sample: Annotated[Text, Field(max_length=MAX_SAMPLE_CHARACTERS)] | None = None
