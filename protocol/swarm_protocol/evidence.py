"""The evidence of a rejection: what an auditor judged by, in pieces by their hash, so that anybody can judge again.

Of a contribution: `trace`, the state roots; `state-K`, the claimed states at both ends of the segment that decided and at the
end of training; `part-K`, what was encoded of it, with `proofs`; `served`, bytes that a node gave out and that are none of
what it committed to. Of an average: `input-S`, by slot, with `proofs`; `receipts`; `average`, the bytes that its reducer
published. Nothing here fetches anything but the pieces themselves, and nothing loads torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from swarm_protocol import encoding, merkle, parts
from swarm_protocol.chunks import Buffer, StateManifest, chunks, manifest_of
from swarm_protocol.errors import EncodingError, InvalidDataError
from swarm_protocol.records import MAX_RECORD_BYTES, Envelope, Evidence, EvidenceItem, decode_list, encode_list
from swarm_protocol.reduction_audit import Input
from swarm_protocol.spec import RunSpec

if TYPE_CHECKING:
    from swarm_protocol.client import CoordinatorClient

STATES = 3
ITEM_BYTES, CHUNK_NAME_BYTES = 80, 34
"""What an item, and each piece of one, takes in a record at most. It has room for 28 GiB."""

MAX_PROOF_BYTES = 17 * 34
MAX_RECEIPT_BYTES = 1 << 10
MAX_SMALL_BYTES = 1 << 21


def max_bytes(spec: RunSpec, slots: int, part: int | None) -> int:
    """How much an auditor may have archived for one audit in a round of so many slots."""
    if part is None:
        state = 12 * spec.num_trainable + 8  # no optimizer has more than two moments a parameter
        count = parts.part_count(spec)
        encoded = sum(parts.encoded_part_bytes(spec, one) for one in range(count))
        return STATES * state + encoded + count * MAX_PROOF_BYTES + MAX_SMALL_BYTES
    each = parts.encoded_part_bytes(spec, part) + MAX_PROOF_BYTES + MAX_RECEIPT_BYTES
    return (slots + 1) * each + MAX_SMALL_BYTES


def size_bytes(record: Evidence) -> int:
    """Of all items together."""
    return sum(item.size_bytes for item in record.items)


def sizes(record: Evidence) -> dict[bytes, int]:
    """The pieces that a record names, with their lengths in bytes.

    Raises:
        EncodingError: an item has not as many pieces as its size asks for, or two have one name.
    """
    if len({item.name for item in record.items}) < len(record.items):
        raise EncodingError("two items of one name")
    found: dict[bytes, int] = {}
    for item in record.items:
        manifest = StateManifest(item.size_bytes, item.chunks)
        found |= {digest: manifest.chunk_size(index) for index, digest in enumerate(item.chunks)}
    return found


class Collected:
    """What an auditor has at hand, by name. Buffers are borrowed, and copied piece by piece."""

    def __init__(self) -> None:
        self._items: dict[str, tuple[StateManifest, tuple[Buffer, ...]]] = {}

    def add(self, name: str, *buffers: Buffer) -> None:
        """An item that consists of these buffers. Blocking: they are hashed."""
        self._items[name] = (manifest_of(*buffers), buffers)

    def add_inputs(self, name: str, found: Mapping[int, Input]) -> None:
        """Encoded parts as `name-K`, and their proofs."""
        for number, one in sorted(found.items()):
            self.add(f"{name}-{number}", one.data)
        if found:
            self.add("proofs", encoding.encode([[number, list(one.proof)] for number, one in sorted(found.items())]))

    def add_receipts(self, receipts: Iterable[Envelope]) -> None:
        """Signed receipts, each once."""
        listed = list(dict.fromkeys(receipts))
        if listed:
            self.add("receipts", encode_list(listed))

    @property
    def items(self) -> tuple[EvidenceItem, ...]:
        """What a record says of it.

        Raises:
            InvalidDataError: it is more than a record has room for.
        """
        needed = sum(ITEM_BYTES + CHUNK_NAME_BYTES * len(manifest.hashes) for manifest, _ in self._items.values())
        if needed > MAX_RECORD_BYTES - 1024:
            raise InvalidDataError("the evidence has more pieces than a record can name")
        return tuple(
            EvidenceItem(name=name, size_bytes=manifest.size_bytes, chunks=manifest.hashes)
            for name, (manifest, _) in sorted(self._items.items())
        )

    def pieces(self) -> Iterator[tuple[bytes, bytes]]:
        """Every piece with its hash."""
        for manifest, buffers in self._items.values():
            yield from zip(manifest.hashes, chunks(*buffers), strict=True)


async def download(client: CoordinatorClient, record: Evidence) -> dict[str, bytes]:
    """The archived bytes by name, each piece checked against its hash.

    Raises:
        InvalidDataError: the record contradicts itself, or a piece has other bytes.
        UnreachableError, RefusedError: a piece is not there.
    """
    sizes(record)
    return {item.name: b"".join([await client.chunk(digest) for digest in item.chunks]) for item in record.items}


def numbered(found: Mapping[str, bytes], name: str) -> dict[int, bytes]:
    """The items `name-K`, by K."""
    return {int(key.partition("-")[2]): data for key, data in found.items() if key.startswith(f"{name}-")}


def inputs_of(found: Mapping[str, bytes], name: str) -> dict[int, Input]:
    """What `add_inputs` added. Whether it is what was committed to, its proofs tell.

    Raises:
        InvalidDataError: the proofs are no list of proofs.
    """
    raw = found.get("proofs", encoding.encode([]))
    listed = encoding.decode(raw, max_bytes=len(raw))
    if not isinstance(listed, list):
        raise EncodingError("proofs come in a list")
    proofs: dict[int, tuple[bytes, ...]] = {}
    for entry in listed:
        match entry:
            case [int(number), [*steps]] if all(
                isinstance(step, bytes) and len(step) == merkle.DIGEST_BYTES for step in steps
            ):
                proofs[number] = tuple(step for step in steps if isinstance(step, bytes))
            case _:
                raise EncodingError("a proof is a list of hashes, after its number")
    return {number: Input(data, proofs.get(number, ())) for number, data in numbered(found, name).items()}


def receipts_of(found: Mapping[str, bytes]) -> list[Envelope]:
    """What `add_receipts` added. Raises `EncodingError`."""
    raw = found.get("receipts")
    return [] if raw is None else decode_list(raw, max_bytes=len(raw))
