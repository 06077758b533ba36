"""Sums of a defined order, so that everybody gets the same bits: exact domain."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_LEAF_ELEMENTS = 1 << 12
"""Elements per leaf of the tree of `of_squares`. Changing it changes sums."""

_LEAVES_AT_ONCE = 16
"""Leaves that are summed together. Changes no bit."""


def of_squares(values: Float32, origin: Float32 | None = None) -> float:
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
        sums[leaf : leaf + len(squares)] = by_halves(squares)
    return float(by_halves(sums[None])[0])


def by_halves(rows: Float64) -> Float64:
    """The sum of each row of a power of two of values, as a tree x[i] + x[i + n/2]. Overwrites them."""
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows[:, :half] += rows[:, half:]
        rows = rows[:, :half]
    return rows[:, 0]
