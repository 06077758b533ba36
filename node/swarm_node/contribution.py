"""One contribution: train a slot of a round, encode its pseudo-gradient, and put all of it on disk before committing.

A contribution depends on nothing but public inputs (checkpoint, plan, slot, spec); only its nonce is random. Once
`contribution.cbor` is in the round's folder the work is whole: after a crash it is loaded again, never remade.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swarm_protocol import chunks, data, draw, encoding, merkle, parts, training
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.data import Dataset
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.files import write_atomic
from swarm_protocol.records import Commitment, RoundPlan
from swarm_protocol.spec import RunSpec
from swarm_protocol.training import TrainState

Float32 = npt.NDArray[np.float32]
Train = Callable[[RunSpec, RoundPlan, int, Checkpoint, Dataset, "Progress"], "Trained"]
Encode = Callable[[RunSpec, Float32, Float32], list[bytes]]
"""`parts.encode_parts`, or what a cheater sends in its place."""


@dataclass(frozen=True)
class Progress:
    """How training reports, how it is stopped, and what it has here: a device, the trunk where the run has one.

    `segment_end` takes the state at the end of each segment, in order; `folder` is where the round's work is kept, if it is.
    """

    step: Callable[[int, float], None]
    cancelled: Callable[[], bool]
    device: str = "cpu"
    segment_end: Callable[[TrainState], None] = lambda _: None
    folder: Path | None = None
    trunk: Float32 | None = None


@dataclass(frozen=True)
class Trained:
    """The state after a slot's inner steps, and the mean training loss."""

    final: TrainState
    loss: float


@dataclass(frozen=True)
class Contribution:
    """A finished contribution as it lies on disk. `states` are the chunk hashes of the state at each segment end."""

    plan_hash: bytes
    slot: int
    nonce: bytes
    loss: float
    states: tuple[chunks.StateManifest, ...]
    part_hashes: tuple[bytes, ...]
    folder: Path

    @property
    def parts_root(self) -> bytes:
        return parts.parts_root(self.part_hashes)

    @property
    def state_roots(self) -> tuple[bytes, ...]:
        """What the trace root is made of."""
        return tuple(state.root for state in self.states)

    def state_path(self, segment: int) -> Path:
        """The state at the end of a segment: parameters || moments || step. It is kept for as long as it may be asked for."""
        return _state_path(self.folder, segment)

    def part_path(self, part: int) -> Path:
        return self.folder / f"part-{part}"

    def part(self, part: int) -> bytes:
        return self.part_path(part).read_bytes()

    def proof(self, part: int) -> tuple[bytes, ...]:
        """That this part is among those committed to."""
        return merkle.proof(self.part_hashes, part)

    def commitment(self, spec: RunSpec, plan: RoundPlan, fingerprint: bytes) -> Commitment:
        return Commitment(
            run=spec.run_id,
            round=plan.round,
            plan=self.plan_hash,
            slot=self.slot,
            tokens=plan.roster[self.slot].steps * spec.tokens_per_step,
            trace_root=training.trace_root(self.state_roots),
            parts_root=self.parts_root,
            nonce_hash=draw.nonce_hash(self.nonce),
            fingerprint=fingerprint,
            train_loss=self.loss,
        )


def train(
    spec: RunSpec,
    plan: RoundPlan,
    slot: int,
    checkpoint: Checkpoint,
    dataset: Dataset,
    progress: Progress,
    *,
    batch: Callable[[int], npt.NDArray[np.int64]] | None = None,
) -> Trained:
    """The honest way: all inner steps of the slot, one segment after another, on the batches that the plan assigns."""
    batch = batch or (lambda step: data.batch(spec, plan, slot, step, dataset))
    losses: list[float] = []

    def on_step(step: int, loss: float) -> None:
        losses.append(loss)
        progress.step(step, loss)

    state = TrainState.initial(spec, checkpoint.parameters)
    for _, stop in spec.segments(plan.roster[slot].steps):
        state = training.run_segment(
            spec, state, batch, stop, progress.trunk,
            device=progress.device, on_step=on_step, cancelled=progress.cancelled,
        )  # fmt: skip
        progress.segment_end(state)
    return Trained(state, sum(losses) / len(losses))


def make(
    spec: RunSpec,
    plan: RoundPlan,
    slot: int,
    checkpoint: Checkpoint,
    dataset: Dataset,
    folder: Path,
    progress: Progress,
    how: Train = train,
    encode: Encode = parts.encode_parts,
) -> Contribution:
    """Train, encode, and write everything to `folder`. Blocking; run it in a thread."""
    states: list[chunks.StateManifest] = []

    def keep(state: TrainState) -> None:
        write_atomic(_state_path(folder, len(states)), *state.buffers())
        states.append(state.manifest())

    trained = how(spec, plan, slot, checkpoint, dataset, replace(progress, segment_end=keep, folder=folder))
    encoded = encode(spec, checkpoint.parameters, trained.final.parameters)
    contribution = Contribution(
        plan_hash=plan.hash,
        slot=slot,
        nonce=secrets.token_bytes(32),
        loss=trained.loss,
        states=tuple(states),
        part_hashes=tuple(parts.part_hashes(encoded)),
        folder=folder,
    )
    for index, part in enumerate(encoded):
        write_atomic(contribution.part_path(index), part)
    write_atomic(folder / "contribution.cbor", encoding.encode(_fields(contribution)))
    return contribution


def load(spec: RunSpec, folder: Path, plan_hash: bytes | None = None) -> Contribution | None:
    """The contribution in a round's folder, if it is whole (and belongs to this plan)."""
    path = folder / "contribution.cbor"
    if not path.exists():
        return None
    try:
        fields: Any = encoding.decode(path.read_bytes(), max_bytes=1 << 26)
        contribution = Contribution(
            plan_hash=fields["plan"],
            slot=fields["slot"],
            nonce=fields["nonce"],
            loss=fields["loss"],
            states=tuple(
                chunks.StateManifest.decode(state, max_size_bytes=training.size_bytes(spec))
                for state in fields["states"]
            ),
            part_hashes=_hashes(fields["parts"]),
            folder=folder,
        )
    except (InvalidDataError, KeyError, TypeError):
        return None
    return contribution if plan_hash in (None, contribution.plan_hash) else None


def _fields(contribution: Contribution) -> dict[str, encoding.Value]:
    return {
        "plan": contribution.plan_hash,
        "slot": contribution.slot,
        "nonce": contribution.nonce,
        "loss": contribution.loss,
        "states": [state.encode() for state in contribution.states],
        "parts": b"".join(contribution.part_hashes),
    }


def _state_path(folder: Path, segment: int) -> Path:
    return folder / f"state-{segment}"


def _hashes(joined: bytes) -> tuple[bytes, ...]:
    return tuple(joined[start : start + 32] for start in range(0, len(joined), 32))
