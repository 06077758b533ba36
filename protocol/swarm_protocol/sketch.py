"""Linear sketches of parts: 4 KiB each, from which everybody gets the distances between whole contributions.

A robust aggregator has to know how far contributions are from each other, and no reducer sees a whole one. So every sender
publishes, per part, a count sketch of the part's decoded values (Charikar et al. 2002): the values with random signs,
added up in 1024 buckets. The squared distance of two sketches estimates that of the parts: it is right in the mean, its
standard deviation is at most √(2/1024) = 4.4 % of it, and less for a whole contribution, over whose parts it is summed.

- Signs and buckets are keyed by the hash of the round's CommitmentSet. Contributions are fixed by then, so nobody can
  choose one whose sketch hides something.
- Exact domain: values become integers by a power of two, the sums are of integers and hence exact in any order, and each
  bucket is rounded to float32 once. A reducer who holds the part recomputes its sketch bit for bit (`matches`).

Blocks of 1024 consecutive values are rotated by a random number of places and added up: values of one block never meet in
a bucket, two of different blocks with probability 1/1024, which is all that the variance of a count sketch asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarm_protocol import chunks, merkle, seeds, sums
from swarm_protocol.errors import InvalidDataError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

BUCKETS = 1024
SIZE_BYTES = 4 * BUCKETS
"""Length of an encoded sketch."""

MAX_ELEMENTS = 1 << 31
"""Of a part: sums of so many integers are exact in float64."""

_SLAB_BLOCKS = 32
_INTEGER_BITS = 30
_LARGEST = float(np.finfo(np.float32).max)

_SIGN_BITS = np.array(
    [[(byte >> bit & 1) << 31 for bit in range(8)] for byte in range(256)],
    np.uint32,
)
"""What the eight bits of a byte, lowest first, do to the signs of eight float32: uint32 [256, 8]."""


@dataclass(frozen=True)
class Projection:
    """The linear map from one part's values to its sketch, the same for every slot: numel / 8 bytes and a little more."""

    numel: int
    signs: npt.NDArray[np.uint8]
    shifts: tuple[int, ...]


def projection(commitment_set: bytes, part: int, numel: int) -> Projection:
    """The map for a part of `numel` elements in the round that this CommitmentSet (its hash, 32 bytes) has closed.

    The first 8 bytes of the hash, little-endian, take the place of the run seed, and the part that of the round: the bits
    of stream "sketch signs" give the signs, lowest bit first, 1 for minus; its words of stream "sketch shifts", modulo
    1024, the places by which the blocks are rotated towards higher buckets.
    """
    if len(commitment_set) != 32 or not 0 <= numel <= MAX_ELEMENTS:
        raise ValueError("a sketch has a key of 32 bytes, and a part of at most 2^31 elements")
    seed = int.from_bytes(commitment_set[:8], "little")
    signs = seeds.raw(seed, "sketch signs", part, 0, 0, -(-numel // 64)).astype("<u8").view(np.uint8)
    shifts = seeds.raw(seed, "sketch shifts", part, 0, 0, -(-numel // BUCKETS)) % np.uint64(BUCKETS)
    return Projection(numel, signs, tuple(int(shift) for shift in shifts))


def of(where: Projection, values: Float32) -> Float32:
    """The sketch of a part's decoded values: float32[1024], finite.

    With e the exponent of the largest magnitude, at most 2^e, each value counts as its multiple of 2^(e - 30), rounded
    half to even. A bucket beyond float32 is the largest finite value.

    Raises:
        InvalidDataError: values of another size, or not finite.
    """
    if values.dtype != np.float32 or values.shape != (where.numel,):
        raise InvalidDataError(f"{values.dtype}{list(values.shape)} where a part of {where.numel} float32 was expected")
    peak = float(max(values.max(), -values.min())) if values.size else 0.0
    if not math.isfinite(peak):
        raise InvalidDataError("a part with a value that is not finite has no sketch")
    exponent = math.frexp(peak)[1]
    to_integers = np.float64(math.ldexp(1.0, _INTEGER_BITS - exponent))  # as a Python float it would act in float32
    folded = np.zeros(2 * BUCKETS)
    bits = values.view(np.uint32)
    slab = _SLAB_BLOCKS * BUCKETS
    integers = np.empty(min(slab, values.size))
    for start in range(0, values.size, slab):
        flips = _SIGN_BITS.take(where.signs[start // 8 : (start + slab) // 8], axis=0).reshape(-1)
        here = bits[start : start + slab]
        part = integers[: here.size]
        np.multiply((here ^ flips[: here.size]).view(np.float32), to_integers, out=part)
        np.rint(part, out=part)
        for first in range(0, part.size, BUCKETS):
            block = part[first : first + BUCKETS]
            shift = where.shifts[(start + first) // BUCKETS]
            bucket = folded[shift : shift + block.size]
            np.add(bucket, block, out=bucket)
    total = (folded[:BUCKETS] + folded[BUCKETS:]) / to_integers
    return np.clip(total, -_LARGEST, _LARGEST).astype(np.float32) + np.float32(0)


def encode(sketch: Float32) -> bytes:
    """4096 bytes: the buckets, little-endian."""
    return sketch.astype("<f4", copy=False).tobytes()


def decode(data: bytes | bytearray | memoryview) -> Float32:
    """The buckets, float32[1024].

    Raises:
        InvalidDataError: another length, or a bucket that is not finite.
    """
    if len(data) != SIZE_BYTES:
        raise InvalidDataError(f"a sketch of {len(data)} bytes; it has {SIZE_BYTES}")
    sketch = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(sketch).all():
        raise InvalidDataError("a sketch with a bucket that is not finite")
    return sketch


def matches(where: Projection, values: Float32, claimed: bytes) -> bool:
    """Whether these are the bytes of the sketch of a part that decodes to `values`: what a reducer asks, and an umpire."""
    return encode(of(where, values)) == claimed


def root(sketches: Sequence[bytes]) -> bytes:
    """What a sender signs of its sketches: the Merkle root of the content hashes of their bytes, in the order of parts."""
    return merkle.root([chunks.content_hash(sketch) for sketch in sketches])


def squared_distances(sketches: Mapping[int, Sequence[Float32]]) -> Float64:
    """The squared distances between contributions, float64[n, n], in the order of slots; symmetric, zero on the diagonal.

    Per part, differences, squares and their tree by halves in float64; the parts' distances are added in the order of parts.

    Args:
        sketches: per slot, the sketch of every part.

    Raises:
        InvalidDataError: slots with different numbers of parts, or sketches of another size.
    """
    slots = sorted(sketches)
    if len({len(sketches[slot]) for slot in slots}) > 1:
        raise InvalidDataError("every slot has one sketch for each part")
    if any(row.dtype != np.float32 or row.shape != (BUCKETS,) for rows in sketches.values() for row in rows):
        raise InvalidDataError(f"a sketch is float32[{BUCKETS}]")
    found = np.zeros((len(slots), len(slots)))
    for rows in zip(*(sketches[slot] for slot in slots), strict=True):
        stack = np.array(rows, np.float64)
        for first in range(len(slots) - 1):
            difference = stack[first + 1 :] - stack[first]
            np.multiply(difference, difference, out=difference)
            found[first, first + 1 :] += sums.by_halves(difference)
    return found + found.T
