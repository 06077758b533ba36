"""The weighted mean, taken in slot by slot, with one accumulator whatever the number of slots."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from swarm_protocol.aggregate.intake import Float32, Turns
from swarm_protocol.errors import InvalidDataError

_SLAB_ELEMENTS = 1 << 15
"""Elements that are worked on at a time, so that temporaries stay in the cache. Changes no bit of a mean."""


class Mean:
    """The mean weighted by `weights`, {slot: weight}: from +0 on, in slot order, `acc + share · x`.

    A share is the weight over the total, rounded to float32. Product and sum are rounded one after the other.
    """

    def __init__(self, weights: Mapping[int, int], numel: int) -> None:
        self._turns = Turns(weights, numel)
        total = sum(weights.values())
        self._shares = {slot: np.float32(weight / total) for slot, weight in weights.items()}
        self._sum: npt.NDArray[np.float32] = np.zeros(numel, np.float32)

    def add(self, slot: int, values: Float32) -> None:
        self._turns.take(slot, values)
        share = self._shares[slot]
        product = np.empty(min(_SLAB_ELEMENTS, values.size), np.float32)
        with np.errstate(over="ignore"):  # `result` refuses what is not finite
            for start in range(0, values.size, _SLAB_ELEMENTS):
                part = values[start : start + _SLAB_ELEMENTS]
                np.multiply(part, share, out=product[: part.size])
                self._sum[start : start + part.size] += product[: part.size]

    def result(self) -> Float32:
        self._turns.end()
        if not np.isfinite(self._sum).all():
            raise InvalidDataError("the mean is not finite")
        return self._sum
