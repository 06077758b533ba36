"""What a reducer makes of a part: the encoded aggregate of encoded inputs. Exact domain.

The inputs are decoded, added and encoded a piece at a time, so that floats stay in the cache and memory holds encodings
alone. Every aggregator and codec works element by element or block by block, so the cut changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from swarm_protocol import aggregate, codec, parts
from swarm_protocol.calls import Bytes
from swarm_protocol.spec import RunSpec

_PIECE_ELEMENTS = 1 << 16
"""Elements that are worked on at a time: a multiple of `codec.PIECE_ELEMENTS`."""


def average(
    spec: RunSpec, part: int, inputs: Mapping[int, Bytes | memoryview], weights: Mapping[int, int]
) -> bytearray:
    """The encoded aggregate of these encoded parts by slot, as every reducer has to make it.

    Args:
        inputs: each of them sound (`parts.require_sound`).
        weights: of each of these slots: the plan's, or where the aggregator selects, those that it selected.

    Raises:
        InvalidDataError: an input is not canonical, or there is no such aggregate.
    """
    where, exchange = parts.slices(spec)[part], spec.exchange
    entry, numel = codec.get(exchange.codec), where.stop - where.start
    shares = {slot: weights[slot] for slot in sorted(inputs)}
    read = {slot: entry.read(inputs[slot], numel) for slot in shares}
    out = entry.write(numel)
    for start in range(0, numel, _PIECE_ELEMENTS):
        size = min(_PIECE_ELEMENTS, numel - start)
        aggregation = aggregate.start(exchange.aggregator, shares, size, trim_fraction=exchange.trim_fraction)
        for slot, reading in read.items():
            piece = np.empty(size, np.float32)  # an aggregation may keep it
            reading.values(start, piece)
            aggregation.add(slot, piece)
        out.put(start, aggregation.result())
    return out.result()
