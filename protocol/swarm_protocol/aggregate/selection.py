"""Which slots a robust aggregate is made of, and with what weights, from nothing but their pairwise distances.

The three rules here need whole contributions, which no reducer sees; they get squared distances between sketches of them
(`sketch`). What they find is a mean over slots, so that every reducer takes the mean of its part with the same weights.
Everything is float64 in the exact domain: + - × ÷ and sqrt one by one, sums as trees by halves (`sums`), ties by slot.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from swarm_protocol import sums

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

ITERATIONS = 64
"""Iterations of `geometric_median` and `centered_clip`."""

WEIGHT_UNITS = 1 << 30
"""The weights that these two find are integers, in units of one over this."""

_FAR = 1024.0
"""A slot this many times the typical distance away is left out before they begin: its pull would be next to nothing, and
float64 could not hold its distances together with those of the others."""

_NEAR = 2.0**-20
"""No squared distance from the centre counts as less than this share of the typical one (smoothed Weiszfeld)."""


def krum_tolerates(slots: int) -> int:
    """f, the number of liars among this many slots that `multi_krum` is made for: floor((n - 3) / 4), never below 0."""
    return max(0, (slots - 3) // 4)


def multi_krum(weights: Int64, squared_distances: Float64) -> Int64:
    """Leave out the f slots with the highest scores; the others keep their weights (Blanchard et al. 2017, section 4).

    A score is the sum of the squared distances to the n - f - 2 closest other slots, added in ascending order. Of equal
    scores the lower slot is kept.

    Args:
        weights: int64[n], above zero.
        squared_distances: float64[n, n], symmetric, zero on the diagonal.
    """
    count = weights.size
    liars = krum_tolerates(count)
    if not liars:
        return weights.copy()
    others = squared_distances.copy()
    np.fill_diagonal(others, np.inf)
    others.sort(axis=1)
    scores = np.zeros(count)
    for column in range(count - liars - 2):
        scores += others[:, column]
    chosen = np.argsort(scores, kind="stable")[: count - liars]
    found = np.zeros_like(weights)
    found[chosen] = weights[chosen]
    return found


def geometric_median(weights: Int64, squared_distances: Float64) -> Int64:
    """The weights that make the geometric median a mean, after 64 steps of Weiszfeld's iteration from the weighted mean.

    It works on the Gram form, |x_j - z|² = Σ c_i d²_ij - ½ Σ c_i c_k d²_ik for z = Σ c_i x_i with Σ c_i = 1, and is
    smoothed near the slots (Pillutla et al. 2019, algorithm 2). Arguments as for `multi_krum`; the result is in units of
    2^-30.
    """
    prior, typical, _ = _without_the_far(weights, squared_distances)
    if typical == 0.0:
        return _in_units(prior)
    share = prior
    for _ in range(ITERATIONS):
        pull = prior / _radii(share, squared_distances, typical)
        share = pull / _sum(pull)
    return _in_units(share)


def centered_clip(weights: Int64, squared_distances: Float64, clip_radius: float) -> Int64:
    """The weights that make CenteredClip a mean: v <- v + Σ w_i (x_i - v) min(1, τ / |x_i - v|), 64 times.

    It starts from the most central slot, the one with the least median distance to the slots; τ is `clip_radius` times
    that distance, so that it needs no unit (Karimireddy et al. 2021, algorithm 2; iterated to its fixed point as in
    BTARD, Gorbunov et al. 2021). Arguments as for `multi_krum`; the result is in units of 2^-30.
    """
    prior, typical, centre = _without_the_far(weights, squared_distances)
    if typical == 0.0:
        return _in_units(prior)
    threshold = clip_radius * np.sqrt(typical)
    share = np.zeros_like(prior)
    share[centre] = 1.0
    for _ in range(ITERATIONS):
        pull = prior * np.minimum(1.0, threshold / _radii(share, squared_distances, typical))
        share = share * max(0.0, 1.0 - _sum(pull)) + pull
    return _in_units(share)


def _without_the_far(weights: Int64, squared_distances: Float64) -> tuple[Float64, float, int]:
    """Weights that add up to one, zero where a slot is too far out; the typical squared distance; the central slot."""
    count = weights.size
    medians = np.sort(squared_distances, axis=1)[:, count // 2]
    centre = int(np.argmin(medians))
    typical = float(medians[centre])
    near = squared_distances[centre] <= _FAR * _FAR * typical
    kept = np.where(near, weights, 0).astype(np.float64)
    return kept / _sum(kept), typical, centre


def _radii(share: Float64, squared_distances: Float64, typical: float) -> Float64:
    """The distance of every slot from the mean with these shares, float64[n]."""
    moments = _sums(squared_distances * share)
    squares = moments - 0.5 * _sum(share * moments)
    return np.sqrt(np.maximum(squares, _NEAR * typical))


def _in_units(share: Float64) -> Int64:
    return np.rint(share * WEIGHT_UNITS).astype(np.int64)


def _sum(values: Float64) -> float:
    return float(_sums(values[None])[0])


def _sums(rows: Float64) -> Float64:
    padded = np.zeros((rows.shape[0], 1 << max(rows.shape[1] - 1, 0).bit_length()))
    padded[:, : rows.shape[1]] = rows
    return sums.by_halves(padded)
