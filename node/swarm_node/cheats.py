"""Dishonest ways to make a contribution, for tests and for `swarm-node demo --cheaters`: what audits must catch."""

from __future__ import annotations

import dataclasses

import numpy as np

from swarm_node.contribution import Progress, Train, Trained, train
from swarm_protocol import data, training
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.data import Dataset
from swarm_protocol.errors import ConfigurationError
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


KINDS: dict[str, Train] = {"made-up": made_up}


def kind(name: str | None) -> Train:
    """The way of making contributions that goes by this name; honest without one."""
    if name is None:
        return train
    if name not in KINDS:
        raise ConfigurationError(f"no cheat is called {name!r}; there are: {', '.join(KINDS)}")
    return KINDS[name]
