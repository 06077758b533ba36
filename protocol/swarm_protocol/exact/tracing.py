"""A whole contribution in exact arithmetic, written down operator by operator, so that two parties can see where they part.

Honest machines write the same file but for its `runtime`. Where two traces differ, everything before the first difference is
agreed on: what remains is one operator on inputs that both have, which anybody can compute by docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

from swarm_protocol import encoding
from swarm_protocol.audit import Subject
from swarm_protocol.errors import ConfigurationError, InvalidDataError
from swarm_protocol.exact.bisect import Observation, observe_step
from swarm_protocol.training import Tokens

MAX_BYTES = 1 << 28
_FORMAT = "swarm-node exact trace 1"


@dataclass(frozen=True)
class Step:
    """An inner step: its operators in the order of the computation, and the root of the state after it."""

    observations: tuple[Observation, ...]
    root: bytes


@dataclass(frozen=True)
class Trace:
    """One party's account of a contribution. `runtime` says in words what it was computed with."""

    run: bytes
    plan: bytes
    round: int
    slot: int
    segment_steps: int
    runtime: str
    steps: tuple[Step, ...]

    def encode(self) -> bytes:
        """Canonical bytes."""
        steps = [[step.root, [_fields(one) for one in step.observations]] for step in self.steps]
        return encoding.encode(
            {
                "format": _FORMAT,
                "run": self.run,
                "plan": self.plan,
                "round": self.round,
                "slot": self.slot,
                "segment_steps": self.segment_steps,
                "runtime": self.runtime,
                "steps": steps,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises `InvalidDataError` where the bytes are no trace."""
        value: Any = encoding.decode(data, max_bytes=MAX_BYTES)
        try:
            if value.pop("format") != _FORMAT:
                raise ValueError
            steps = tuple(
                Step(tuple(_observation(*fields) for fields in observations), root)
                for root, observations in value.pop("steps")
            )
            return cls(steps=steps, **value)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidDataError(f"no trace of an exact contribution ({_FORMAT!r})") from error


@dataclass(frozen=True)
class Difference:
    """Where two traces part. An observation is None where one has nothing at that place; all is in trace order."""

    segment: int
    step: int
    ours: Observation | None
    theirs: Observation | None


def record(
    subject: Subject,
    batch: Callable[[int], Tokens],
    *,
    runtime: str,
    device: str = "cpu",
    on_step: Callable[[int], None] = lambda _: None,
) -> Trace:
    """Compute a contribution from its checkpoint, and write down every operator. Blocking.

    Raises:
        ConfigurationError: the run's numerics are native, whose operators differ between honest machines.
    """
    spec, state = subject.spec, subject.start
    if spec.numerics != "exact":
        raise ConfigurationError("only exact runs can be traced operator by operator; this one has native numerics")
    steps: list[Step] = []
    for number in range(subject.plan.roster[subject.slot].steps):
        state, observations = observe_step(
            spec,
            state,
            batch(number),
            subject.trunk,
            device=device,
            limbs=spec.training.limbs,
            grain_sequences=spec.training.grain_sequences,
        )
        steps.append(Step(tuple(observations), state.manifest().root))
        on_step(number)
    return Trace(
        run=spec.run_id,
        plan=subject.plan.hash,
        round=subject.plan.round,
        slot=subject.slot,
        segment_steps=spec.training.segment_steps,
        runtime=runtime,
        steps=tuple(steps),
    )


def first_difference(ours: Trace, theirs: Trace) -> Difference | None:
    """The first place where two traces of one contribution part; None where they agree.

    Raises:
        InvalidDataError: they are of different contributions.
    """
    if (ours.run, ours.plan, ours.slot) != (theirs.run, theirs.plan, theirs.slot):
        raise InvalidDataError("the two traces are of different contributions")
    for step, (mine, other) in enumerate(_padded(ours.steps, theirs.steps)):
        if mine == other:
            continue
        pairs = _padded(() if mine is None else mine.observations, () if other is None else other.observations)
        first = next(((a, b) for a, b in pairs if a != b), (None, None))
        return Difference(step // ours.segment_steps, step, *first)
    return None


def _padded(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> Iterable[tuple[Any, Any]]:
    longest = max(len(ours), len(theirs))
    return (
        (ours[index] if index < len(ours) else None, theirs[index] if index < len(theirs) else None)
        for index in range(longest)
    )


def _observation(grain: int, operator: str, digest: bytes, norm: float, first: list[float]) -> Observation:
    return Observation(grain, operator, digest, float(norm), tuple(float(value) for value in first))


def _fields(one: Observation) -> list[Any]:
    return [one.grain, one.operator, one.digest, one.norm, list(one.first)]
