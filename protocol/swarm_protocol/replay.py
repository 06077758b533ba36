"""Whether a contribution is what an honest node would have computed: comparison, and the verdict that follows from it.

An auditor replays segments with `training.run_segment`, compares each with the claimed state, checks that the committed
parts are the encoding of the claimed final parameters bit by bit, and has `judge` name the outcome. The statistic is the
relative L2 distance (never a cosine, which is blind to scaling) between the claimed and the replayed change of the
parameters, and between the claimed and replayed optimizer moments; the larger counts. It is computed in float64 in a
defined order, so two auditors with the same vectors get the same number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarm_protocol import parts, sketch, sketching
from swarm_protocol.aggregate import sum_of_squares
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.records import Comparison, Outcome, Sketches
from swarm_protocol.spec import RunSpec
from swarm_protocol.tolerances import Bounds
from swarm_protocol.training import TrainState, moment_sizes

Float32 = npt.NDArray[np.float32]

FORGED_SKETCHES = "the signed sketches are not those of the committed parts"

GROSS = 0.1
"""Distance beyond which no two runtimes can honestly be, calibrated or not: the worst that was measured, kernels in
bfloat16, are 1.2e-2 apart; an invented contribution is about 1.4 away."""


@dataclass(frozen=True)
class Compared:
    """One replayed segment against its claim. `statistic` is a relative L2 distance: 0 if equal, inf if not finite."""

    comparison: Comparison
    statistic: float


@dataclass(frozen=True)
class Judgement:
    """What goes into a verdict. `statistic` is None where it has no finite value."""

    outcome: Outcome
    comparison: Comparison | None
    statistic: float | None
    reason: str


def relative_l2(claimed: Float32, replayed: Float32, origin: Float32 | None = None) -> float:
    """‖claimed - replayed‖ / ‖replayed - origin‖ of vectors of one length; inf where the claim is not finite.

    Differences are taken in float64, where they hardly round. `origin` is zero where it is None. Of two equal vectors the
    distance is 0; it is inf where they differ and the replay did not move.
    """
    if not np.isfinite(claimed).all():
        return math.inf
    distance = math.sqrt(sum_of_squares(claimed, replayed))
    if distance == 0.0:
        return 0.0
    length = math.sqrt(sum_of_squares(replayed, origin))
    return distance / length if length else math.inf


def compare(
    spec: RunSpec, start: TrainState, claimed: TrainState, replayed: TrainState, *, bounds: Bounds | None
) -> Compared:
    """Compare the claimed end of a segment with the replayed one; `start` is where the replay began.

    Equal bits are `equal`. Otherwise, in native numerics: up to `bounds.accept` is `within`, above `bounds.reject`
    `outside`, and what lies between only `different`. Without bounds, for runtimes that are not calibrated, what is not
    equal is `different`, and `outside` beyond `GROSS`.

    Raises:
        InvalidDataError: the claimed vectors do not have this run's types and lengths.
    """
    claimed.check(spec)
    if claimed.step == replayed.step and all(
        a.tobytes() == b.tobytes()
        for a, b in ((claimed.parameters, replayed.parameters), (claimed.moments, replayed.moments))
    ):
        return Compared(Comparison.EQUAL, 0.0)
    statistic = math.inf if claimed.step != replayed.step else _statistic(spec, start, claimed, replayed)
    if statistic > (GROSS if bounds is None else min(GROSS, bounds.reject)):
        return Compared(Comparison.OUTSIDE, statistic)
    within = bounds is not None and statistic <= bounds.accept
    return Compared(Comparison.WITHIN if within else Comparison.DIFFERENT, statistic)


def parts_match(spec: RunSpec, start: Float32, final: Float32, parts_root: bytes) -> bool:
    """Whether the committed parts are, bit by bit, the encoding of the claimed parameters before and after the round."""
    try:
        encoded = parts.encode_parts(spec, start, final)
    except InvalidDataError:
        return False
    return parts.parts_root(parts.part_hashes(encoded)) == parts_root


def sketches_match(spec: RunSpec, start: Float32, final: Float32, signed: Sketches | None) -> bool:
    """Whether signed sketches, where there are any, are those of the parts of these parameters before and after the round."""
    if signed is None:
        return True
    try:
        found = sketching.of_parts(spec, signed.commitment_set, parts.encode_parts(spec, start, final))
    except InvalidDataError:
        return False
    return sketch.root(found) == signed.root


def judge_exact(*, trace_matches: bool, parts_match: bool, sketches_match: bool = True) -> Judgement:
    """The outcome of an audit with exact numerics: the replay's hashes equal the committed ones, or they do not."""
    if not trace_matches:
        reason = "the replay gives other bits, and with exact numerics there is only one right result"
        return Judgement(Outcome.REJECTED, Comparison.DIFFERENT, None, reason)
    if not parts_match:
        reason = "the parts are not the encoding of its training, which is right"
        return Judgement(Outcome.REJECTED, Comparison.DIFFERENT, None, reason)
    if not sketches_match:
        return Judgement(Outcome.REJECTED, Comparison.DIFFERENT, None, FORGED_SKETCHES)
    return Judgement(Outcome.ACCEPTED, Comparison.EQUAL, 0.0, "equal in every bit")


def unavailable(what: str) -> Judgement:
    """The node did not serve `what` in time."""
    return Judgement(Outcome.UNAVAILABLE, None, None, f"the node did not serve {what} in time")


def judge(
    compared: Sequence[Compared], *, bounds: Bounds | None, parts_match: bool, sketches_match: bool = True
) -> Judgement:
    """The outcome of an audit of one or more segments. The worst segment decides.

    A rejection here is one auditor's: `audit.rejecting_auditors` of them make it final. Where the runtimes of node and
    auditor are not calibrated (no `bounds`), nothing is earned: inconclusive, unless equal in every bit, or further apart
    than any two runtimes (`GROSS`).
    """
    worst = max(compared, key=lambda one: one.statistic)
    comparison, statistic = worst.comparison, worst.statistic if math.isfinite(worst.statistic) else None
    tolerated = f"no two runtimes are further apart than {GROSS}" if bounds is None else str(bounds)
    measured = f"distance {worst.statistic:.2e}; {tolerated}"
    match comparison:
        case Comparison.OUTSIDE if statistic is None:
            outcome, reason = Outcome.REJECTED, "the claimed state is not finite, or no state of this segment"
        case Comparison.OUTSIDE:
            outcome, reason = Outcome.REJECTED, f"the replay leads elsewhere ({measured})"
        case _ if not parts_match:
            outcome = Outcome.REJECTED
            reason = "the parts are not the encoding of the training that the node claims"
        case _ if not sketches_match:
            outcome, reason = Outcome.REJECTED, FORGED_SKETCHES
        case Comparison.EQUAL:
            outcome, reason = Outcome.ACCEPTED, "equal in every bit"
        case Comparison.WITHIN:
            outcome, reason = Outcome.ACCEPTED, f"within the tolerance ({measured})"
        case _ if bounds is None:
            outcome, reason = Outcome.INCONCLUSIVE, f"this pair of runtimes is not calibrated ({measured})"
        case _:
            outcome, reason = Outcome.INCONCLUSIVE, f"between the bounds ({measured})"
    return Judgement(outcome, comparison, statistic, reason)


def _statistic(spec: RunSpec, start: TrainState, claimed: TrainState, replayed: TrainState) -> float:
    """The largest of the distances: of the change of the parameters, and of each kind of moments."""
    distances = [relative_l2(claimed.parameters, replayed.parameters, start.parameters)]
    offset = 0
    # Kinds apart, because their sizes are: a forged second moment would vanish beside the first ones.
    for size in moment_sizes(spec):
        kind = slice(offset, offset + size)
        distances.append(relative_l2(claimed.moments[kind], replayed.moments[kind]))
        offset += size
    return max(distances)
