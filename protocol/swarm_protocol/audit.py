"""One audit: which states it needs, which steps it replays, and what follows; for auditors, and for anyone at home.

A drawn segment is replayed from the state in which it is claimed to begin (the first from the checkpoint itself) and compared
with the state in which it is claimed to end; whatever the segment, the committed parts have to be the encoding of the
claimed final parameters, bit by bit. Claimed states count only if they hash to the trace that the node committed to.

Exact numerics need no claims: from the checkpoint every state can be made again. Where a node serves them all the same, an
audit costs one segment instead of all that come before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from swarm_protocol import replay, training
from swarm_protocol.errors import HashMismatchError, InvalidDataError
from swarm_protocol.records import Commitment, Comparison, Outcome, RoundPlan, Sketches
from swarm_protocol.replay import Compared, Judgement
from swarm_protocol.spec import RunSpec
from swarm_protocol.tolerances import Bounds, Tolerances, bounds_of
from swarm_protocol.training import Tokens, TrainState

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Subject:
    """A contribution as public records describe it.

    `parameters` are the checkpoint's that its round began from; `sketches` is what its holder signed, if the round had any;
    `trunk` is the frozen model's parameters, where not everything is trained.
    """

    spec: RunSpec
    plan: RoundPlan
    slot: int
    commitment: Commitment
    parameters: Float32
    sketches: Sketches | None = None
    trunk: Float32 | None = None

    @property
    def segments(self) -> list[tuple[int, int]]:
        """(start, stop) in inner steps."""
        return self.spec.segments(self.plan.roster[self.slot].steps)

    @property
    def start(self) -> TrainState:
        return TrainState.initial(self.spec, self.parameters)

    def needed_states(self, drawn: Collection[int]) -> tuple[int, ...]:
        """See the function `needed_states`."""
        return needed_states(self.spec, self.plan.roster[self.slot].steps, drawn)


@dataclass(frozen=True, eq=False)
class Claims:
    """What a node says of its training: the state root at each segment end, and some of the states, by segment."""

    roots: tuple[bytes, ...]
    states: Mapping[int, TrainState]


@dataclass(frozen=True)
class Finding:
    """A judgement, how many steps were replayed for it, and the comparisons that it rests on, by segment.

    `segment` is the one that decided, where one did; `roots` are those of the replayed ends, of exact numerics.
    """

    judgement: Judgement
    steps_replayed: int
    compared: Mapping[int, Compared]
    segment: int | None = None
    roots: Mapping[int, bytes] = field(default_factory=dict)


def needed_states(spec: RunSpec, steps: int, drawn: Collection[int]) -> tuple[int, ...]:
    """The segments whose end states a node has to serve for an audit of the `drawn` ones of a slot of `steps`, ascending.

    With exact numerics there are none where everything is replayed anyway.
    """
    last = len(spec.segments(steps)) - 1
    if spec.numerics == "exact":
        if len(drawn) == last + 1:
            return ()
        starts = {index - 1 for index in drawn if index and index - 1 not in drawn}
        return tuple(sorted(starts | ({last} - set(drawn))))
    return _ends(last, drawn)


def states_around(subject: Subject, segment: int) -> tuple[int, ...]:
    """The segments whose end states a rejection by this one rests on: its start, its end, and the end of training."""
    return _ends(len(subject.segments) - 1, (segment,))


def deciding_segment(subject: Subject, finding: Finding, roots: Sequence[bytes]) -> int:
    """The one that a rejection rests on; with exact numerics the first whose root in the trace is another, else the last."""
    if finding.segment is not None:
        return finding.segment
    others = (index for index, root in sorted(finding.roots.items()) if roots[index] != root)
    return next(others, len(subject.segments) - 1)


def _ends(last: int, drawn: Collection[int]) -> tuple[int, ...]:
    return tuple(sorted({index - 1 for index in drawn if index} | set(drawn) | {last}))


def check_trace(subject: Subject, roots: Sequence[bytes]) -> None:
    """Check that these are the state roots that the node committed to.

    Raises:
        HashMismatchError
    """
    if len(roots) != len(subject.segments) or training.trace_root(roots) != subject.commitment.trace_root:
        raise HashMismatchError("the trace is not the one that the node committed to")


def examine(
    subject: Subject,
    drawn: Collection[int],
    claims: Claims | None,
    batch: Callable[[int], Tokens],
    *,
    fingerprint: bytes,
    tolerances: Tolerances | None = None,
    device: str = "cpu",
    cancelled: Callable[[], bool] | None = None,
) -> Finding:
    """Replay the drawn segments and judge. Blocking.

    Args:
        drawn: indices of segments.
        claims: None where the node serves nothing; then exact numerics replay from the checkpoint, and native ones cannot.
        batch: the tokens of a step of this slot.
        fingerprint: of the runtime that replays.
        tolerances: the run's, where it has any (native).
    """
    if subject.spec.numerics == "exact":
        return _examine_exact(subject, drawn, claims, batch, device, cancelled)
    if claims is None or not set(subject.needed_states(drawn)) <= claims.states.keys():
        return Finding(replay.unavailable("its states"), 0, {})
    bounds = bounds_of(subject.spec, tolerances, subject.commitment.fingerprint, fingerprint)
    return _examine_native(subject, drawn, claims, batch, bounds, device, cancelled)


def examine_alone(
    subject: Subject, batch: Callable[[int], Tokens], *, fingerprint: bytes, device: str = "cpu", missing: str
) -> Finding:
    """Replay a native contribution whole without the node's states: equal bits vouch for it, others say nothing.

    `missing` says why its states are not to be had. Blocking.
    """
    spec, state = subject.spec, subject.start
    roots: list[bytes] = []
    for _, stop in subject.segments:
        state = training.run_segment(spec, state, batch, stop, subject.trunk, device=device)
        roots.append(state.manifest().root)
    if training.trace_root(roots) == subject.commitment.trace_root:
        judgement = replay.judge_exact(trace_matches=True, **_matches(subject, state))
        return Finding(judgement, state.step, {})
    runtime = "the same" if subject.commitment.fingerprint == fingerprint else "another"
    reason = f"other bits, with {runtime} runtime; the node's states have expired ({missing})"
    return Finding(Judgement(Outcome.INCONCLUSIVE, Comparison.DIFFERENT, None, reason), state.step, {})


def _examine_native(
    subject: Subject,
    drawn: Collection[int],
    claims: Claims,
    batch: Callable[[int], Tokens],
    bounds: Bounds | None,
    device: str,
    cancelled: Callable[[], bool] | None,
) -> Finding:
    spec, segments = subject.spec, subject.segments
    compared: dict[int, Compared] = {}
    for index in subject.needed_states(drawn):
        if (fault := _fault(subject, claims.states[index], segments[index][1])) is not None:
            return Finding(fault, 0, compared, index)
    steps = 0
    for index in sorted(drawn):
        start = subject.start if index == 0 else claims.states[index - 1]
        try:
            replayed = training.run_segment(
                spec, start, batch, segments[index][1], subject.trunk, device=device, cancelled=cancelled
            )
        except training.NonFiniteError as error:
            return Finding(_forged(f"training from it fails: {error}"), steps, compared, index)
        steps += segments[index][1] - segments[index][0]
        compared[index] = replay.compare(spec, start, claims.states[index], replayed, bounds=bounds)
    final = claims.states[len(segments) - 1]
    judgement = replay.judge(list(compared.values()), bounds=bounds, **_matches(subject, final))
    worst = max(compared, key=lambda index: compared[index].statistic)
    return Finding(judgement, steps, compared, worst)


def _examine_exact(
    subject: Subject,
    drawn: Collection[int],
    claims: Claims | None,
    batch: Callable[[int], Tokens],
    device: str,
    cancelled: Callable[[], bool] | None,
) -> Finding:
    spec, segments = subject.spec, subject.segments
    if claims is None or not set(subject.needed_states(drawn)) <= claims.states.keys():
        drawn, claims = range(len(segments)), None  # everything can be made again
    roots: dict[int, bytes] = {}
    state, steps = subject.start, 0
    for index in sorted(drawn):
        if claims is not None and state.step != segments[index][0]:
            state = claims.states[index - 1]
            if (fault := _fault(subject, state, segments[index][0])) is not None:
                return Finding(fault, steps, {})
        state = training.run_segment(
            spec, state, batch, segments[index][1], subject.trunk, device=device, cancelled=cancelled
        )
        steps += segments[index][1] - segments[index][0]
        roots[index] = state.manifest().root
    if claims is None:
        trace_matches = training.trace_root(list(roots.values())) == subject.commitment.trace_root
    else:
        trace_matches = all(claims.roots[index] == root for index, root in roots.items())
    final = state
    if claims is not None and state.step != segments[-1][1]:
        final = claims.states[len(segments) - 1]
        if (fault := _fault(subject, final, segments[-1][1])) is not None:
            return Finding(fault, steps, {})
    judgement = replay.judge_exact(trace_matches=trace_matches, **_matches(subject, final))
    comparison = Comparison.EQUAL if trace_matches else Comparison.DIFFERENT
    return Finding(judgement, steps, {index: Compared(comparison, 0.0) for index in roots}, roots=roots)


def _matches(subject: Subject, final: TrainState) -> dict[str, bool]:
    """Whether what was sent, and said of it, is made of this final state."""
    spec, before, after = subject.spec, subject.parameters, final.parameters
    return {
        "parts_match": replay.parts_match(spec, before, after, subject.commitment.parts_root),
        "sketches_match": replay.sketches_match(spec, before, after, subject.sketches),
    }


def _fault(subject: Subject, state: TrainState, step: int) -> Judgement | None:
    """What is wrong with a claimed state before anything is replayed."""
    try:
        state.check(subject.spec)
    except InvalidDataError as error:
        return _forged(str(error))
    if state.step != step:
        return _forged(f"a state of step {state.step} where the plan has one of step {step}")
    if not (np.isfinite(state.parameters).all() and np.isfinite(state.moments).all()):
        return _forged("a state with numbers that are not finite")
    return None


def _forged(what: str) -> Judgement:
    return Judgement(Outcome.REJECTED, Comparison.DIFFERENT, None, f"the evidence is no state of this run: {what}")
