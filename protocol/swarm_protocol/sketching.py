"""Sketches in a round: who publishes them, what one sender's have to be, and which slots are selected by them.

A round needs them where its aggregator looks at distances between contributions (`aggregate.needs_sketches`). All of it
belongs to the exact domain: senders, reducers, the checkpoint worker, auditors and readers of the log decide alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from swarm_protocol import aggregate, chunks, merkle, parts, sketch
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.records import Commitment, Seat, Sketches, SketchObjection
from swarm_protocol.spec import RunSpec

Float32 = npt.NDArray[np.float32]


def candidates(roster: Sequence[Seat], slots: Iterable[int]) -> dict[int, int]:
    """Those of the committed `slots` that have a say in the aggregate, {slot: weight above zero}, in slot order."""
    return {slot: roster[slot].weight for slot in sorted(slots) if roster[slot].weight > 0}


def needed(name: aggregate.Name, roster: Sequence[Seat], slots: Iterable[int]) -> bool:
    """Whether a round with these committed slots needs sketches."""
    count = len(candidates(roster, slots))
    return count > 0 and aggregate.needs_sketches(name, count)


def blob_bytes(spec: RunSpec) -> int:
    """The exact length of one sender's sketches, one after the other in the order of parts."""
    return parts.part_count(spec) * sketch.SIZE_BYTES


def split(blob: bytes | bytearray | memoryview) -> list[bytes]:
    """One sender's sketches, encoded, in the order of parts."""
    return [bytes(blob[start : start + sketch.SIZE_BYTES]) for start in range(0, len(blob), sketch.SIZE_BYTES)]


def projection(spec: RunSpec, commitment_set: bytes, part: int) -> sketch.Projection:
    """The map from a part's values to its sketch in the round of this CommitmentSet (its hash)."""
    where = parts.slices(spec)[part]
    return sketch.projection(commitment_set, part, where.stop - where.start)


def of_parts(spec: RunSpec, commitment_set: bytes, encoded: Iterable[bytes]) -> list[bytes]:
    """The encoded sketches of a contribution's encoded parts, given in order.

    Raises:
        InvalidDataError: a part that does not decode, or not to finite values.
    """
    return [
        sketch.encode(sketch.of(projection(spec, commitment_set, part), parts.decode_part(spec, part, data)))
        for part, data in enumerate(encoded)
    ]


def part_matches(
    spec: RunSpec, where: sketch.Projection, part: int, encoded: bytes | bytearray | memoryview, claimed: bytes
) -> bool:
    """Whether an encoded part is sound, and `claimed` its sketch: what a reducer asks, and who judges its objection."""
    try:
        parts.require_sound(spec, part, encoded)
        return sketch.matches(where, parts.decode_part(spec, part, encoded), claimed)
    except InvalidDataError:
        return False


def require_for(record: Sketches, commitment_set: bytes, commitment: Commitment) -> None:
    """Check that signed sketches belong to a commitment of this CommitmentSet.

    Raises:
        InvalidDataError: they do not.
    """
    named = (record.run, record.round, record.sequence, record.slot, record.commitment_set, record.commitment)
    slot = commitment.slot
    if named != (commitment.run, commitment.round, slot, slot, commitment_set, commitment.hash):
        raise InvalidDataError(f"sketches that do not belong to the commitment of slot {slot}")


def require_sketch(spec: RunSpec, record: Sketches, part: int, claimed: bytes, proof: Sequence[bytes]) -> None:
    """Check that this is the sketch of a part that was signed.

    Raises:
        InvalidDataError: it is none, or it is not under the signed root.
    """
    sketch.decode(claimed)
    merkle.verify(record.root, chunks.content_hash(claimed), part, parts.part_count(spec), proof)


def require_committed(spec: RunSpec, objection: SketchObjection, commitment: Commitment) -> None:
    """Check that an objection is about a part that was committed to.

    Raises:
        InvalidDataError: it is not.
    """
    merkle.verify(
        commitment.parts_root, objection.part_hash, objection.part, parts.part_count(spec), objection.proof
    )  # fmt: skip


def decode(spec: RunSpec, record: Sketches, blob: bytes | bytearray | memoryview) -> list[Float32]:
    """One sender's sketches, per part float32[1024], finite.

    Raises:
        InvalidDataError: these are not the bytes that were signed, or no sketches.
    """
    if len(blob) != blob_bytes(spec):
        raise InvalidDataError(f"sketches of {len(blob)} bytes where this run has {blob_bytes(spec)}")
    if chunks.content_hash(blob) != record.blob:
        raise InvalidDataError("other bytes than the signed sketches")
    encoded = split(blob)
    if sketch.root(encoded) != record.root:
        raise InvalidDataError("the sketches are not those under the signed root")
    return [sketch.decode(one) for one in encoded]


def select(
    spec: RunSpec, roster: Sequence[Seat], slots: Iterable[int], sketches: Mapping[int, Sequence[Float32]]
) -> dict[int, int]:
    """The slots that a round's averages are made of, {slot: weight above zero}; none where no sketches count.

    Args:
        slots: those that committed.
        sketches: the sketches that count, per slot those of all parts.
    """
    weights = candidates(roster, slots)
    if not weights.keys() & sketches.keys():
        return {}
    return aggregate.select(spec.exchange.aggregator, weights, sketches, clip_radius=spec.exchange.clip_radius)
