"""What all records have in common: types of fields, bounds, canonical bodies, hashes."""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property
from typing import Annotated, ClassVar

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer

from swarm_protocol import encoding

MAX_RECORD_BYTES = 1 << 20
MAX_SLOTS = 10_000
MAX_PARTS = 1 << 16

HexBytes = PlainSerializer(bytes.hex, when_used="json")
Bytes32 = Annotated[bytes, Field(min_length=32, max_length=32), HexBytes]
Round = Annotated[int, Field(ge=0, lt=1 << 31)]
Sequence = Annotated[int, Field(ge=0, lt=1 << 62)]
Slot = Annotated[int, Field(ge=0, lt=MAX_SLOTS)]
Part = Annotated[int, Field(ge=0, lt=MAX_PARTS)]
Milliseconds = Annotated[int, Field(ge=0, lt=1 << 53, description="Unix time in milliseconds")]
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""Without U+0000, which PostgreSQL stores in no text."""

Label = Annotated[Text, Field(max_length=64)]
Reason = Annotated[Text, Field(max_length=500)]
Multiaddr = Annotated[str, Field(min_length=1, max_length=256)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Role(StrEnum):
    AUDITOR = "auditor"
    CHECKPOINT_WORKER = "checkpoint-worker"


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Record(Frozen):
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


def record_hash(kind: str, body: bytes) -> bytes:
    """BLAKE3 of a body under its kind's key."""
    return blake3(body, derive_key_context=f"swarm-node 2026 record {kind}").digest()


class SlotHash(Frozen):
    slot: Slot
    hash: Bytes32
