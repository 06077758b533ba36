"""How decoded parts become one: named aggregators over float32 vectors, and the bound that an average must keep.

All of it belongs to the exact domain: every operation is its own float32 (or float64) rounding, and every sum has a
defined order, so any reducer and any checker get the same bits.

| name | what it is | memory of a reducer | sketches |
| --- | --- | --- | --- |
| `mean` | weighted mean | one part | no |
| `trimmed_mean`, `median` | per element, one vote for each slot with a weight above zero | a part per slot | no |
| `multi_krum` | weighted mean without the f slots furthest from their neighbours, f = floor((n - 3) / 4) | one part | yes |
| `geometric_median`, `centered_clip` | the mean with weights found by iteration | one part | yes |

A round aggregates in three moves:

1. `needs_sketches(name, n)` says whether n slots with weight have to publish sketches (`sketch`) of their parts. For
   `multi_krum` among fewer than 7 slots f is 0: it is the plain mean.
2. `select(name, plan weights, sketches)` is what everybody computes alike: {slot: weight}. A slot without weight in the plan,
   or (where they are needed) without a sound sketch for each of its parts, is not in it.
3. `start(name, selected weights, numel)` per part, for those of the selected slots whose part arrived; `add` in slot order;
   `result`. The two parameters, `clip_radius` and `trim_fraction`, are the spec's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from swarm_protocol import sketch, sums
from swarm_protocol.aggregate import columns, selection
from swarm_protocol.aggregate.weighted import Mean
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.sums import of_squares as sum_of_squares

__all__ = [
    "CLIP_RADIUS",
    "TRIM_FRACTION",
    "Aggregation",
    "Float32",
    "Mean",
    "Name",
    "bounded",
    "clearly_bounded",
    "mean",
    "needs_sketches",
    "select",
    "start",
    "sum_of_squares",
]

Float32 = npt.NDArray[np.float32]
Name = Literal["mean", "trimmed_mean", "median", "multi_krum", "geometric_median", "centered_clip"]

TRIM_FRACTION = 0.2
"""Share of the slots that `trimmed_mean` leaves out at either end, unless the spec says otherwise."""

CLIP_RADIUS = 1.0
"""τ of `centered_clip` over the typical distance, unless the spec says otherwise."""


class Aggregation(Protocol):
    """One part's aggregation under way."""

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


def needs_sketches(name: Name, slots: int | None = None) -> bool:
    """Whether `select` needs the sketches of all parts, among this many slots with weight (None: of however many)."""
    if name == "multi_krum":
        return slots is None or selection.krum_tolerates(slots) > 0
    return name in ("geometric_median", "centered_clip")


def select(
    name: Name,
    weights: Mapping[int, int],
    sketches: Mapping[int, Sequence[Float32]],
    *,
    clip_radius: float = CLIP_RADIUS,
) -> dict[int, int]:
    """The slots that the round's aggregate is made of, {slot: weight above zero}, in slot order.

    Args:
        weights: the plan's, for the slots in the commitment set. Without weight a slot has no say in the selection either.
        sketches: per slot, the checked sketches of all parts; looked at only where `needs_sketches(name, n)`, n being the
            number of weights above zero.

    Raises:
        InvalidDataError: nothing to select from, or sketches that do not fit together.
    """
    candidates = {slot: weights[slot] for slot in sorted(weights) if weights[slot] > 0}
    if needs_sketches(name, len(candidates)):
        candidates = {slot: weight for slot, weight in candidates.items() if slot in sketches}
    if not candidates:
        raise InvalidDataError("there is no slot with a weight to aggregate")
    if not needs_sketches(name, len(candidates)):
        return candidates
    distances = sketch.squared_distances({slot: sketches[slot] for slot in candidates})
    plan_weights = np.array(list(candidates.values()), np.int64)
    match name:
        case "multi_krum":
            found = selection.multi_krum(plan_weights, distances)
        case "geometric_median":
            found = selection.geometric_median(plan_weights, distances)
        case _:
            found = selection.centered_clip(plan_weights, distances, clip_radius)
    return {slot: int(weight) for slot, weight in zip(candidates, found, strict=True) if weight > 0}


def start(name: Name, weights: Mapping[int, int], numel: int, *, trim_fraction: float = TRIM_FRACTION) -> Aggregation:
    """Begin to aggregate a part of `numel` elements from the slots in `weights`, by the aggregator that the spec names.

    Where the aggregator needs sketches, the weights are those that `select` returned; without them it is a plain mean.

    Raises:
        InvalidDataError: the weights do not make an aggregate.
    """
    if name == "median":
        return columns.median(weights, numel)
    if name == "trimmed_mean":
        return columns.trimmed_mean(weights, numel, trim_fraction=trim_fraction)
    return Mean(weights, numel)


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
    if not math.isfinite(peak):
        return False
    return clearly_bounded(values.size, peak, max_norm) or sums.of_squares(values) <= max_norm * max_norm


def clearly_bounded(numel: int, peak: float, max_norm: float) -> bool:
    """Whether `numel` values of at most this magnitude are `bounded` for certain: the rounding of sums is far below 1 %."""
    return numel * peak * peak <= 0.99 * max_norm * max_norm
