"""Where two exact computations part: the first differing step, and in it the first differing layer and operator.

A dispute between a node and an auditor narrows to one operator on a few thousand numbers, which anybody can then recompute
with `reference`. Two honest machines never differ at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from swarm_protocol.exact import rule
from swarm_protocol.exact.segment import Trainer
from swarm_protocol.spec import RunSpec
from swarm_protocol.sums import of_squares as sum_of_squares
from swarm_protocol.training import Float32, Tokens, TrainState


@dataclass(frozen=True)
class Observation:
    """One operator's result: `grain` counts from 0, `operator` names layer and operator, `digest` is a BLAKE3 hash.

    For people to look at: `norm`, the L2 norm, and `first`, the first four values.
    """

    grain: int
    operator: str
    digest: bytes
    norm: float
    first: tuple[float, ...]

    @classmethod
    def of(cls, grain: int, operator: str, values: npt.NDArray[np.float32]) -> Observation:
        flat = values.reshape(-1)
        first = tuple(float(value) for value in flat[:4])
        return cls(grain, operator, blake3(values.tobytes()).digest(), math.sqrt(sum_of_squares(flat)), first)


def first_differing_step(ours: Callable[[int], bytes], theirs: Callable[[int], bytes], start: int, stop: int) -> int:
    """The step whose result differs first, by bisection over state roots; each is asked for O(log(stop - start)) of them.

    A root is that of the state before the step of its number; those of `start` are equal and those of `stop` differ.

    Raises:
        ValueError: the roots of `start` differ, or those of `stop` are equal.
    """
    if ours(start) != theirs(start) or ours(stop) == theirs(stop):
        raise ValueError("a bisection starts from equal states and ends with different ones")
    while stop - start > 1:
        middle = (start + stop) // 2
        if ours(middle) == theirs(middle):
            start = middle
        else:
            stop = middle
    return start


def observe_step(
    spec: RunSpec,
    state: TrainState,
    tokens: Tokens,
    trunk: Float32 | None = None,
    *,
    device: str = "cpu",
    limbs: int = 2,
    grain_sequences: int | None = None,
) -> tuple[TrainState, list[Observation]]:
    """The inner step that follows `state`: the state after it, and every operator, grain by grain, the optimizer last.

    Raises:
        As `run_segment`.
    """
    found: list[Observation] = []
    grain = -1

    def observe(operator: str, result: torch.Tensor) -> None:
        nonlocal grain
        grain += operator == "embedding"
        values = result.detach().cpu().contiguous().numpy().astype(np.float32, copy=False)
        found.append(Observation.of(max(grain, 0), operator, values))  # adapters are merged before the first grain

    sequences = grain_sequences or rule.default_grain(spec.model)
    trainer = Trainer(
        spec, device=device, limbs=limbs, grain_sequences=sequences, micro_sequences=sequences, observe=observe
    )
    end = trainer.run(state, lambda _: tokens, state.step + 1, trunk)
    for operator, vector in (("optimizer, parameters", end.parameters), ("optimizer, moments", end.moments)):
        found.append(Observation.of(grain, operator, vector))
    return end, found


def first_differing_operator(ours: Sequence[Observation], theirs: Sequence[Observation]) -> Observation | None:
    """The first of our observations that theirs contradict or lack; None where all are equal."""
    for index, one in enumerate(ours):
        if index >= len(theirs) or theirs[index] != one:
            return one
    return None
