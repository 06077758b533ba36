"""The parts of a parameter vector: where they are cut, who reduces which, and how a contribution becomes their bytes.

All of it belongs to the exact domain: anybody cuts, encodes and orders alike.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from swarm_protocol import aggregate, chunks, codec, merkle
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.records import RoundPlan
from swarm_protocol.spec import RunSpec

Float32 = npt.NDArray[np.float32]

MAX_TICKETS = 16
"""Reducers count as this many times faster than others at most, whatever they say that they have measured."""

SUGGESTED_PART_BYTES = 4 << 20
"""Large enough that a call costs little beside its bytes, small enough that a few in memory are no burden."""

ALIGNMENT = 256
"""Parts begin at multiples of this many elements, a multiple of every codec's block."""


def suggested_parts(num_trainable: int, codec_name: codec.Name) -> int:
    """How many parts suit what is trained: of up to 4 MiB each when encoded, and 8 at least, to give work to 8 reducers."""
    whole = codec.get(codec_name).encoded_bytes(num_trainable)
    return max(8, -(-whole // SUGGESTED_PART_BYTES))


@lru_cache(maxsize=16)
def partition(numel: int, parts: int) -> tuple[slice, ...]:
    """Cut [0, numel) into `parts` contiguous slices whose sizes differ by at most 256, none of them empty.

    There are fewer where the vector has fewer than `parts` blocks of 256 elements.
    """
    blocks = -(-numel // ALIGNMENT)
    count = min(parts, blocks)
    bounds = [min(index * blocks // count * ALIGNMENT, numel) for index in range(count + 1)] if count else []
    return tuple(slice(start, stop) for start, stop in pairwise(bounds))


def slices(spec: RunSpec) -> tuple[slice, ...]:
    """The parts of the vector that a run trains."""
    return partition(spec.num_trainable, spec.exchange.parts)


def part_count(spec: RunSpec) -> int:
    """How many parts a run has: what its spec says, or fewer if the model is very small."""
    return len(slices(spec))


def encoded_part_bytes(spec: RunSpec, part: int) -> int:
    """The exact length of one encoded part."""
    where = slices(spec)[part]
    return codec.get(spec.exchange.codec).encoded_bytes(where.stop - where.start)


def encode_parts(spec: RunSpec, start: Float32, final: Float32) -> list[bytes]:
    """A contribution's parts: the encoded pseudo-gradient, `start - final`, of parameters before and after the round.

    Raises:
        InvalidDataError: the vectors are not this model's, or a difference is not finite.
    """
    shape = (spec.num_trainable,)
    for vector in (start, final):
        if vector.dtype != np.float32 or vector.shape != shape:
            raise InvalidDataError(
                f"{vector.dtype}{list(vector.shape)} given where parameters are float32{list(shape)}"
            )
    encode = codec.get(spec.exchange.codec).encode
    with np.errstate(over="ignore", invalid="ignore"):  # the codec refuses what is not finite
        return [encode(start[where] - final[where]) for where in slices(spec)]


def decode_part(spec: RunSpec, part: int, data: bytes | bytearray | memoryview, out: Float32 | None = None) -> Float32:
    """The values of one part, in `out` where that is given.

    Raises:
        InvalidDataError: the bytes are not a canonical encoding of this part.
    """
    where = slices(spec)[part]
    return codec.get(spec.exchange.codec).decode(data, where.stop - where.start, out)


def require_sound(spec: RunSpec, part: int, data: bytes | bytearray | memoryview) -> None:
    """Check that one part, or the average of one, decodes to finite values of a norm within the spec's bound.

    Raises:
        InvalidDataError: it does not.
    """
    where, entry = slices(spec)[part], codec.get(spec.exchange.codec)
    numel, max_norm = where.stop - where.start, spec.exchange.max_norm
    if aggregate.clearly_bounded(numel, entry.peak(data, numel), max_norm):
        return
    if not aggregate.bounded(entry.decode(data, numel), max_norm):
        raise InvalidDataError(f"part {part} exceeds the norm bound {max_norm}")


def assemble(spec: RunSpec, parts: Sequence[Float32 | None]) -> Float32:
    """The pseudo-gradient that consists of decoded parts, float32[num_trainable]; a missing part (None) is +0.

    Raises:
        InvalidDataError: wrong number or sizes of parts.
    """
    where = slices(spec)
    if len(parts) != len(where):
        raise InvalidDataError(f"{len(parts)} parts where this run has {len(where)}")
    whole = np.zeros(spec.num_trainable, np.float32)
    for index, (target, values) in enumerate(zip(where, parts, strict=True)):
        if values is None:
            continue
        if values.dtype != np.float32 or values.shape != (target.stop - target.start,):
            raise InvalidDataError(f"part {index} has {values.dtype}{list(values.shape)}, not its own size")
        whole[target] = values
    return whole


def part_hashes(encoded: Sequence[bytes]) -> list[bytes]:
    """The content hash of each encoded part."""
    return [chunks.content_hash(part) for part in encoded]


def parts_root(hashes: Sequence[bytes]) -> bytes:
    """What a commitment says of the parts: the Merkle root of their content hashes, in order."""
    return merkle.root(hashes)


def rendezvous(key: bytes, part: int, peers: Sequence[bytes], tickets: Sequence[int] | None = None) -> list[int]:
    """Positions in `peers` in the order in which they are to reduce a part: the first one there is, does.

    Highest `BLAKE3(key || part as u32, little-endian || peer)` first (Thaler and Ravishankar 1998), equals by position. A
    peer with several tickets has the highest of as many hashes (from the second on with the ticket's number as u32 behind),
    so it comes first in proportion to its tickets.

    Args:
        key: 32 bytes that nobody could choose, such as the previous round's beacon.
        peers: 32-byte public keys.
        tickets: one number above zero for each of them; None means one each.
    """
    if len(key) != 32 or any(len(peer) != 32 for peer in peers):
        raise ValueError("a rendezvous is among public keys of 32 bytes, under a key of 32 bytes")
    prefix = key + struct.pack("<I", part)

    def score(position: int) -> bytes:
        name = prefix + peers[position]
        numbers = range(1, 1 if tickets is None else tickets[position])
        return max([blake3(name).digest(), *(blake3(name + struct.pack("<I", number)).digest() for number in numbers)])

    scores = [score(position) for position in range(len(peers))]
    return sorted(range(len(peers)), key=lambda position: scores[position], reverse=True)


def reduction_tickets(uploads_bytes_per_s: Sequence[int]) -> list[int]:
    """How many tickets each reducer has: its measured upload in sixteenths of the fastest one's, rounded down, at least 1.

    Who has not measured anything has one; so have all, where nobody has.
    """
    fastest = max(uploads_bytes_per_s, default=0)
    return [max(1, upload * MAX_TICKETS // fastest) if fastest else 1 for upload in uploads_bytes_per_s]


def reduction_quotas(part_count: int, peers: Sequence[bytes], tickets: Sequence[int], percent: int) -> list[int]:
    """Of how many parts each peer is the first reducer at most; together there is room for all parts.

    Each has its tickets' share of the parts, rounded up, but no more than `percent` of them, nor less than one, unless there
    are too few peers: then an equal share. What that leaves over goes to those with room, one part each in turn, most
    tickets first, equals by key.
    """
    most = max(1, part_count * percent // 100, -(-part_count // len(peers)))
    quotas = [min(most, -(-part_count * mine // sum(tickets))) for mine in tickets]
    turns = sorted(range(len(peers)), key=lambda position: (-tickets[position], peers[position]))
    while (left := part_count - sum(quotas)) > 0:
        for position in [position for position in turns if quotas[position] < most][:left]:
            quotas[position] += 1
    return quotas


def reducer_orders(
    key: bytes,
    part_count: int,
    peers: Sequence[bytes],
    uploads_bytes_per_s: Sequence[int] | None = None,
    percent: int = 100,
) -> list[list[int]]:
    """Per part, positions in `peers` in the order in which they are to reduce it. Integer arithmetic alone.

    Rendezvous order by tickets (`reduction_tickets`), but for one thing: nobody is the first of more parts than its quota
    (`reduction_quotas`). Part by part, the first is the highest in rendezvous order who has not reached it yet; the others
    follow in rendezvous order.
    """
    if not peers:
        return [[] for _ in range(part_count)]
    tickets = reduction_tickets(uploads_bytes_per_s or [0] * len(peers))
    quotas = reduction_quotas(part_count, peers, tickets, percent)
    parts_of = [0] * len(peers)
    orders = []
    for part in range(part_count):
        order = rendezvous(key, part, peers, tickets)
        first = next(position for position in order if parts_of[position] < quotas[position])
        parts_of[first] += 1
        orders.append([first, *(position for position in order if position != first)])
    return orders


def planned_reducers(spec: RunSpec, plan: RoundPlan, committed: Container[int]) -> list[list[bytes]]:
    """Per part, the keys of its reducers in order: those that the plan names and whose slot has committed."""
    seats = [seat for slot, seat in enumerate(plan.roster) if seat.reducer and slot in committed]
    keys, uploads = [seat.peer for seat in seats], [seat.upload_bytes_per_s for seat in seats]
    orders = reducer_orders(plan.previous_beacon, part_count(spec), keys, uploads, spec.exchange.reducer_percent)
    return [[keys[position] for position in order] for order in orders]
