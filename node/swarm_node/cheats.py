"""Dishonest ways to make a contribution, for tests and for `swarm-node demo --cheaters`: what audits must catch."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from swarm_node.contribution import Progress, Train, Trained, train
from swarm_protocol import data, training
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.data import Dataset
from swarm_protocol.records import RoundPlan
from swarm_protocol.spec import RunSpec
from swarm_protocol.training import TrainState


def made_up(
    spec: RunSpec, plan: RoundPlan, slot: int, checkpoint: Checkpoint, dataset: Dataset, progress: Progress
) -> Trained:
    """Noise of a plausible norm: two honest steps show how large a step is, the rest is invented."""
    steps = plan.roster[slot].steps
    start = TrainState.initial(spec, checkpoint.parameters)
    sample = training.run_segment(
        spec, start, lambda step: data.batch(spec, plan, slot, step, dataset), min(2, steps), device=progress.device
    )
    norm = float(np.linalg.norm(sample.parameters - checkpoint.parameters)) * steps / sample.step
    noise = np.random.default_rng().standard_normal(checkpoint.parameters.size, dtype=np.float32)
    noise *= np.float32(norm / float(np.linalg.norm(noise)))
    roots, state = [], start
    for _, stop in training.segments(spec, steps):
        share = np.float32(stop / steps)
        state = dataclasses.replace(sample, step=stop, parameters=checkpoint.parameters + share * noise)
        roots.append(state.manifest().root)
    return Trained(state, tuple(roots), 3.0)


def learning_rate(
    spec: RunSpec, plan: RoundPlan, slot: int, checkpoint: Checkpoint, dataset: Dataset, progress: Progress
) -> Trained:
    """Everything as asked, with a learning rate that is 0.01 % too high."""
    optimizer = spec.training.optimizer
    hotter = optimizer.model_copy(update={"lr": optimizer.lr * 1.0001, "adamw_lr": optimizer.adamw_lr * 1.0001})
    training = spec.training.model_copy(update={"optimizer": hotter})
    return train(spec.model_copy(update={"training": training}), plan, slot, checkpoint, dataset, progress)


def flipped_bit(
    spec: RunSpec, plan: RoundPlan, slot: int, checkpoint: Checkpoint, dataset: Dataset, progress: Progress
) -> Trained:
    """Everything as asked, but for one bit of one token of one sample, in the last step."""

    def batch(step: int) -> npt.NDArray[np.int64]:
        tokens = data.batch(spec, plan, slot, step, dataset)
        if step == plan.roster[slot].steps - 1:
            tokens[0, 1] ^= 1
        return tokens

    return train(spec, plan, slot, checkpoint, dataset, progress, batch=batch)


KINDS: dict[str, Train] = {"made-up": made_up, "learning-rate": learning_rate, "flipped-bit": flipped_bit}


def kind(name: str | None) -> Train:
    """The way of making contributions that goes by this name; honest without one."""
    return train if name is None else KINDS[name]
