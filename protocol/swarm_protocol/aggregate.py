"""How decoded parts become one: named aggregators over float32 vectors, and the bound that an average must keep.

All of it belongs to the exact domain: every multiplication and addition is its own float32 rounding, and every sum has a
defined order, so any reducer and any checker get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from swarm_protocol.errors import InvalidDataError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Name = Literal["mean"]

_SLAB_ELEMENTS = 1 << 15
"""Elements that are worked on at a time, so that temporaries stay in the cache. Changes no bit of a mean."""

_LEAF_ELEMENTS = 1 << 12
"""Elements per leaf of the tree of `sum_of_squares`. Changing it changes sums."""

_LEAVES_AT_ONCE = 16
"""Leaves that are summed together. Changes no bit."""


class Aggregation(Protocol):
    """One part's aggregation under way. It holds one accumulator, whatever the number of slots."""

    def add(self, slot: int, values: Float32) -> None:
        """Take in a slot's decoded part, float32[numel]; slots come in ascending order, none is left out.

        Raises:
            InvalidDataError: values of the wrong size, or not finite; nothing was taken in.
            ValueError: not this slot's turn.
        """

    def result(self) -> Float32:
        """The aggregate, float32[numel].

        Raises:
            InvalidDataError: it is not finite.
            ValueError: a slot is still missing.
        """


class Mean:
    """The mean weighted by `weights`, {slot: weight in tokens}: from +0 on, in slot order, `acc + share · x`.

    A share is the weight over the total, rounded to float32. Product and sum are rounded one after the other.
    """

    def __init__(self, weights: Mapping[int, int], numel: int) -> None:
        total = sum(weights.values())
        if total <= 0 or min(weights.values()) < 0:
            raise InvalidDataError("a mean needs weights that are not negative and not all zero")
        self._waiting = [(slot, np.float32(weights[slot] / total)) for slot in sorted(weights, reverse=True)]
        self._sum = np.zeros(numel, np.float32)

    def add(self, slot: int, values: Float32) -> None:
        if not self._waiting or self._waiting[-1][0] != slot:
            raise ValueError(f"slot {slot} is not the next one of this mean")
        if values.dtype != np.float32 or values.shape != self._sum.shape:
            raise InvalidDataError(f"slot {slot} sent {values.dtype}{list(values.shape)}, not {self._sum.size} float32")
        if not np.isfinite(values).all():
            raise InvalidDataError(f"slot {slot} sent a value that is not finite")
        _, share = self._waiting.pop()
        product = np.empty(min(_SLAB_ELEMENTS, values.size), np.float32)
        with np.errstate(over="ignore"):  # `result` refuses what is not finite
            for start in range(0, values.size, _SLAB_ELEMENTS):
                part = values[start : start + _SLAB_ELEMENTS]
                np.multiply(part, share, out=product[: part.size])
                self._sum[start : start + part.size] += product[: part.size]

    def result(self) -> Float32:
        if self._waiting:
            raise ValueError(f"slot {self._waiting[-1][0]} is missing from this mean")
        if not np.isfinite(self._sum).all():
            raise InvalidDataError("the mean is not finite")
        return self._sum


_AGGREGATORS: dict[Name, Callable[[Mapping[int, int], int], Aggregation]] = {"mean": Mean}


def start(name: Name, weights: Mapping[int, int], numel: int) -> Aggregation:
    """Begin to aggregate a part of `numel` elements from the slots in `weights`, by the aggregator that the spec names.

    Raises:
        InvalidDataError: the weights do not make an aggregate.
    """
    return _AGGREGATORS[name](weights, numel)


def mean(parts: Iterable[tuple[int, int, Float32]]) -> Float32:
    """The weighted mean of (slot, weight in tokens, float32[numel]), in slot order whatever the order given.

    Raises:
        InvalidDataError: no parts, no weight, a slot twice, sizes that differ, or a value or result that is not finite.
    """
    ordered = sorted(parts, key=lambda part: part[0])
    weights = {slot: weight for slot, weight, _ in ordered}
    if len(weights) != len(ordered) or not ordered:
        raise InvalidDataError("a mean is over one or more slots, each once")
    aggregation = Mean(weights, ordered[0][2].size)
    for slot, _, values in ordered:
        aggregation.add(slot, values)
    return aggregation.result()


def bounded(values: Float32, max_norm: float) -> bool:
    """Whether all values are finite and their L2 norm is at most `max_norm`: everybody decides alike."""
    peak = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    if not np.isfinite(peak):
        return False
    return clearly_bounded(values.size, peak, max_norm) or sum_of_squares(values) <= max_norm * max_norm


def clearly_bounded(numel: int, peak: float, max_norm: float) -> bool:
    """Whether `numel` values of at most this magnitude are `bounded` for certain: the rounding of sums is far below 1 %."""
    return numel * peak * peak <= 0.99 * max_norm * max_norm


def sum_of_squares(values: Float32, origin: Float32 | None = None) -> float:
    """The sum of (values - origin)² in float64, in a defined order; `origin` is zero where it is None.

    The vector is padded with +0 to leaves of 4096 elements. A leaf is summed as a tree by halves, x[i] + x[i + n/2];
    the leaves' sums, padded with +0 to a power of two, likewise.
    """
    leaves = -(-values.size // _LEAF_ELEMENTS)
    sums = np.zeros(1 << max(leaves - 1, 0).bit_length())
    for leaf in range(0, leaves, _LEAVES_AT_ONCE):
        slab = slice(leaf * _LEAF_ELEMENTS, min(leaf + _LEAVES_AT_ONCE, leaves) * _LEAF_ELEMENTS)
        part = values[slab].astype(np.float64)
        if origin is not None:
            part -= origin[slab]
        squares = np.zeros((-(-part.size // _LEAF_ELEMENTS), _LEAF_ELEMENTS))
        np.multiply(part, part, out=squares.reshape(-1)[: part.size])
        sums[leaf : leaf + len(squares)] = _sum_by_halves(squares)
    return float(_sum_by_halves(sums[None])[0])


def _sum_by_halves(rows: Float64) -> Float64:
    """The sum of each row of a power of two of values. Overwrites them."""
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows[:, :half] += rows[:, half:]
        rows = rows[:, :half]
    return rows[:, 0]
