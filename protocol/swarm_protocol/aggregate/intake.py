"""What every aggregation does at its door: one slot after the other, each a finite part of the right size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from swarm_protocol.errors import InvalidDataError

Float32 = npt.NDArray[np.float32]

_SLAB_ELEMENTS = 1 << 15
"""Elements that are looked at together."""


class Turns:
    """Whose turn it is, among the slots of `weights` in ascending order.

    Raises:
        InvalidDataError: a weight is negative, or there is none above zero.
    """

    def __init__(self, weights: Mapping[int, int], numel: int) -> None:
        if min(weights.values(), default=0) < 0 or not any(weights.values()):
            raise InvalidDataError("an aggregate needs weights that are not negative and not all zero")
        self._waiting = sorted(weights, reverse=True)
        self._numel = numel

    def take(self, slot: int, values: Float32) -> None:
        """Let a slot's part in; see `Aggregation.add` for what is refused."""
        if not self._waiting or self._waiting[-1] != slot:
            raise ValueError(f"slot {slot} is not the next one of this aggregate")
        if values.dtype != np.float32 or values.shape != (self._numel,):
            raise InvalidDataError(f"slot {slot} sent {values.dtype}{list(values.shape)}, not {self._numel} float32")
        if not finite(values):
            raise InvalidDataError(f"slot {slot} sent a value that is not finite")
        self._waiting.pop()

    def end(self) -> None:
        """Raises `ValueError` while a slot is missing."""
        if self._waiting:
            raise ValueError(f"slot {self._waiting[-1]} is missing from this aggregate")


def finite(values: Float32) -> bool:
    """Whether every value is a finite number."""
    return all(
        bool(np.isfinite(values[start : start + _SLAB_ELEMENTS]).all())
        for start in range(0, values.size, _SLAB_ELEMENTS)
    )
