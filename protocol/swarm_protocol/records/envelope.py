"""Signed records as they travel: encoded, decoded, and opened only with a valid signature."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import ValidationError

from swarm_protocol import encoding
from swarm_protocol.errors import EncodingError, InvalidDataError, SignatureError
from swarm_protocol.identity import Identity, peer_id, verify
from swarm_protocol.records.base import MAX_RECORD_BYTES, Record
from swarm_protocol.records.kinds import KINDS

_SMALL_BYTES = 1 << 12

R = TypeVar("R", bound=Record)


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
