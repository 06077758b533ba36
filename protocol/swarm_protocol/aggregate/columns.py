"""The coordinate-wise aggregators: the median and the trimmed mean of the slots' values, element by element.

Every slot with a weight above zero has one vote, however large its weight is. The values of an element are put in order
by a sorting network over the slots (Batcher's merge exchange; Knuth, The Art of Computer Programming, 5.2.2, algorithm
M), cut down to the places that the result looks at. A comparison rounds nothing, so no bit depends on the network;
neither of -0 and +0 is smaller, so -0 is made +0 first. Source of both: Yin et al. 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from swarm_protocol.aggregate.intake import Float32, Turns, finite
from swarm_protocol.errors import InvalidDataError

_WORKING_SET_ELEMENTS = 1 << 17
"""Elements of all slots that are put in order together, so that they stay in the cache. Changes no bit."""

_HALF = np.float32(0.5)


class Columns:
    """An aggregation that looks at some places of each element's values in ascending order.

    It keeps a reference to every part that it takes in, n parts for n slots; they must not be written to meanwhile.
    """

    def __init__(
        self,
        weights: Mapping[int, int],
        numel: int,
        places: Callable[[int], range],
        combine: Callable[[Sequence[Float32], Float32], None],
    ) -> None:
        """`places(count)` are the places of `count` values that `combine(values at the places, out)` makes one of."""
        self._turns = Turns(weights, numel)
        self._voters = {slot for slot, weight in weights.items() if weight}
        self._out = np.empty(numel, np.float32)
        self._places = places(len(self._voters))
        self._combine = combine
        self._parts: list[Float32] = []

    def add(self, slot: int, values: Float32) -> None:
        self._turns.take(slot, values)
        if slot in self._voters:
            self._parts.append(values)

    def result(self) -> Float32:
        self._turns.end()
        steps = network(len(self._parts), self._places)
        slab_elements = max(256, min(self._out.size, _WORKING_SET_ELEMENTS // (len(self._parts) + 1)))
        rows = list(np.empty((len(self._parts), slab_elements), np.float32))
        spare = np.empty(slab_elements, np.float32)
        for start in range(0, self._out.size, slab_elements):
            target = self._out[start : start + slab_elements]
            size = target.size
            for row, part in zip(rows, self._parts, strict=True):
                np.add(part[start : start + size], np.float32(0), out=row[:size])
            for low, high, keep_low, keep_high in steps:
                a, b = rows[low], rows[high]
                if keep_low:
                    np.minimum(a[:size], b[:size], out=spare[:size])
                if keep_high:
                    np.maximum(a[:size], b[:size], out=b[:size])
                if keep_low:
                    rows[low], spare = spare, a
            with np.errstate(over="ignore"):  # refused below
                self._combine([rows[place][:size] for place in self._places], target)
        if not finite(self._out):
            raise InvalidDataError("the aggregate is not finite")
        return self._out


def median(weights: Mapping[int, int], numel: int) -> Columns:
    """The middle value; of an even number of votes half of one middle value plus half of the other."""
    return Columns(weights, numel, lambda count: range((count - 1) // 2, count // 2 + 1), _middle)


def trimmed_mean(weights: Mapping[int, int], numel: int, *, trim_fraction: float) -> Columns:
    """The mean without the largest and the smallest `floor(trim_fraction · n)` of n values, at least one being left.

    What is left is added in ascending order and divided by its count, every operation rounded to float32 on its own.
    """

    def places(count: int) -> range:
        trimmed = min(math.floor(trim_fraction * count), (count - 1) // 2)
        return range(trimmed, count - trimmed)

    return Columns(weights, numel, places, _mean)


class Step(NamedTuple):
    """Put the smaller of two rows in the lower one and the larger in the higher one, as far as each is looked at."""

    low: int
    high: int
    keep_low: bool
    keep_high: bool


@lru_cache(maxsize=64)
def network(count: int, places: range) -> tuple[Step, ...]:
    """The steps that bring the values of these places, in the order of `count` values, to the rows of these numbers."""
    steps: list[Step] = []
    wanted = set(places)
    for low, high in reversed(_merge_exchange(count)):
        if low in wanted or high in wanted:
            steps.append(Step(low, high, low in wanted, high in wanted))
            wanted |= {low, high}
    return tuple(reversed(steps))


def _merge_exchange(count: int) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    top = 1 << max(count - 1, 0).bit_length() >> 1
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
    return pairs


def _middle(values: Sequence[Float32], out: Float32) -> None:
    if len(values) == 1:
        out[:] = values[0]
        return
    low, high = values
    np.multiply(low, _HALF, out=low)
    np.multiply(high, _HALF, out=high)
    np.add(low, high, out=out)


def _mean(values: Sequence[Float32], out: Float32) -> None:
    out[:] = values[0]
    for value in values[1:]:
        np.add(out, value, out=out)
    np.divide(out, np.float32(len(values)), out=out)
