"""Trainings that are not what the plan asks for: what an audit has to tell from honest noise.

The red team commits to them, and calibration measures how far from honest work they are. Each takes what honest training
takes and gives a state per segment end. The statistic sees all of them, though not in every segment: one that is honest up to
some step has honest segments before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import numpy as np
import torch

from swarm_protocol import training
from swarm_protocol.spec import RunSpec
from swarm_protocol.training import Tokens, TrainState

Batch = Callable[[int], Tokens]


class Run(Protocol):
    """`training.run_segment`, with the run's trunk, or something that reports about it."""

    def __call__(self, spec: RunSpec, state: TrainState, batch: Batch, stop: int) -> TrainState: ...


Deviation = Callable[[RunSpec, TrainState, Batch, int, Run], Iterator[TrainState]]
"""(spec, start, batch, steps, run) to the claimed state at each segment end."""


def run(spec: RunSpec, state: TrainState, batch: Batch, stop: int) -> TrainState:
    """Training itself, on this CPU, of a whole model."""
    return training.run_segment(spec, state, batch, stop)


def honest(spec: RunSpec, start: TrainState, batch: Batch, steps: int, run: Run) -> Iterator[TrainState]:
    """What was asked for."""
    state = start
    for _, stop in spec.segments(steps):
        state = run(spec, state, batch, stop)
        yield state


def half_batch(spec: RunSpec, start: TrainState, batch: Batch, steps: int, run: Run) -> Iterator[TrainState]:
    """Each step on the first half of its batch, repeated: half the data."""

    def halved(step: int) -> Tokens:
        tokens = batch(step)
        half = tokens[: (len(tokens) + 1) // 2]
        return np.concatenate([half, half])[: len(tokens)]

    return honest(spec, start, halved, steps, run)


def flipped_bit(spec: RunSpec, start: TrainState, batch: Batch, steps: int, run: Run) -> Iterator[TrainState]:
    """Everything as asked, but for one bit of one token of one sample, in the last step."""

    def flipped(step: int) -> Tokens:
        tokens = batch(step)
        if step == steps - 1:
            tokens[0, 1] ^= 1
        return tokens

    return honest(spec, start, flipped, steps, run)


def fewer_steps(spec: RunSpec, start: TrainState, batch: Batch, steps: int, run: Run) -> Iterator[TrainState]:
    """The first half of the steps; what they lead to is claimed for the rest as well."""
    enough, state = (steps + 1) // 2, start
    for _, stop in spec.segments(steps):
        if state.step < enough:
            state = run(spec, state, batch, min(stop, enough))
        yield dataclasses.replace(state, step=stop)


def skipped_step(spec: RunSpec, start: TrainState, batch: Batch, steps: int, run: Run) -> Iterator[TrainState]:
    """All steps but one in the middle."""
    skipped, state = steps // 2, start
    for _, stop in spec.segments(steps):
        if state.step <= skipped < stop:
            state = dataclasses.replace(run(spec, state, batch, skipped), step=skipped + 1)
        state = run(spec, state, batch, stop)
        yield state


def hotter(factor: float) -> Deviation:
    """Everything as asked, with learning rates `factor` times as high."""

    def deviation(spec: RunSpec, start: TrainState, batch: Batch, steps: int, run: Run) -> Iterator[TrainState]:
        optimizer = spec.training.optimizer
        rates = {"lr": optimizer.lr * factor, "adamw_lr": optimizer.adamw_lr * factor}
        recipe = spec.training.model_copy(update={"optimizer": optimizer.model_copy(update=rates)})
        return honest(spec.model_copy(update={"training": recipe}), start, batch, steps, run)

    return deviation


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Matrix products in bfloat16 inside. Weights are cast anew each time: between two of them the optimizer steps."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, torch.bfloat16, cache_enabled=False))
        yield


def low_precision(spec: RunSpec, start: TrainState, batch: Batch, steps: int, run: Run) -> Iterator[TrainState]:
    """Matrix products in bfloat16, in native numerics whatever the spec says: the cheapest way to look busy."""
    native, state = spec.model_copy(update={"numerics": "native"}), start
    for _, stop in spec.segments(steps):
        with bfloat16_products():
            state = run(native, state, batch, stop)
        yield state


def scaled(factor: float) -> Deviation:
    """Honest work, but every change of the parameters is claimed to be `factor` times as large."""

    def deviation(spec: RunSpec, start: TrainState, batch: Batch, steps: int, run: Run) -> Iterator[TrainState]:
        for state in honest(spec, start, batch, steps, run):
            change = (state.parameters - start.parameters) * np.float32(factor)
            yield dataclasses.replace(state, parameters=start.parameters + change)

    return deviation


def made_up(spec: RunSpec, start: TrainState, batch: Batch, steps: int, run: Run) -> Iterator[TrainState]:
    """Noise of a plausible norm: two honest steps show how large a step is, the rest is invented."""
    sample = run(spec, start, batch, min(2, steps))
    norm = float(np.linalg.norm(sample.parameters - start.parameters)) * steps / sample.step
    noise = np.random.default_rng().standard_normal(start.parameters.size, dtype=np.float32)
    noise *= np.float32(norm / float(np.linalg.norm(noise)))
    for _, stop in spec.segments(steps):
        yield dataclasses.replace(sample, step=stop, parameters=start.parameters + np.float32(stop / steps) * noise)


KINDS: dict[str, Deviation] = {
    "half-batch": half_batch,
    "fewer-steps": fewer_steps,
    "skipped-step": skipped_step,
    "learning-rate": hotter(1.01),
    "learning-rate-slight": hotter(1.0001),
    "low-precision": low_precision,
    "made-up": made_up,
    "scaled": scaled(1.1),
    "sign-flip": scaled(-10.0),
    "flipped-bit": flipped_bit,
}
SLIGHT = frozenset({"learning-rate-slight", "flipped-bit"})
"""So close to honest work that only exact numerics promise to see them; they gain a cheater nothing."""
PARTIAL = frozenset({"fewer-steps", "skipped-step", "flipped-bit"})
"""Kinds some of whose segments are honest, if they begin from the state that is claimed."""
