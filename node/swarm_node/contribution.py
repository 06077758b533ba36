"""One contribution: train a slot of a round, encode its pseudo-gradient, and put all of it on disk before committing.

A contribution depends on nothing but public inputs (checkpoint, plan, slot, spec); only its nonce is random. Once
`contribution.cbor` is in the round's folder the work is whole: after a crash it is loaded again, never remade.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
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

Train = Callable[[RunSpec, RoundPlan, int, Checkpoint, Dataset, "Progress"], "Trained"]


@dataclass(frozen=True)
class Progress:
    """How training reports, and how it is stopped."""

    step: Callable[[int, float], None]
    cancelled: Callable[[], bool]
    device: str = "cpu"


@dataclass(frozen=True)
class Trained:
    """The state after a slot's inner steps, the state roots at its segment ends, and the mean training loss."""

    final: TrainState
    state_roots: tuple[bytes, ...]
    loss: float


@dataclass(frozen=True)
class Contribution:
    """A finished contribution as it lies on disk."""

    plan_hash: bytes
    slot: int
    nonce: bytes
    loss: float
    state_roots: tuple[bytes, ...]
    final_manifest: chunks.StateManifest
    part_hashes: tuple[bytes, ...]
    folder: Path

    @property
    def parts_root(self) -> bytes:
        return parts.parts_root(self.part_hashes)

    @property
    def state_path(self) -> Path:
        """The final state: parameters || moments || step."""
        return self.folder / "final.state"

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
    roots: list[bytes] = []
    for _, stop in training.segments(spec, plan.roster[slot].steps):
        state = training.run_segment(
            spec, state, batch, stop, device=progress.device, on_step=on_step, cancelled=progress.cancelled
        )
        roots.append(state.manifest().root)
    return Trained(state, tuple(roots), sum(losses) / len(losses))


def make(
    spec: RunSpec,
    plan: RoundPlan,
    slot: int,
    checkpoint: Checkpoint,
    dataset: Dataset,
    folder: Path,
    progress: Progress,
    how: Train = train,
) -> Contribution:
    """Train, encode, and write everything to `folder`. Blocking; run it in a thread."""
    trained = how(spec, plan, slot, checkpoint, dataset, progress)
    encoded = parts.encode_parts(spec, checkpoint.parameters, trained.final.parameters)
    contribution = Contribution(
        plan_hash=plan.hash,
        slot=slot,
        nonce=secrets.token_bytes(32),
        loss=trained.loss,
        state_roots=trained.state_roots,
        final_manifest=trained.final.manifest(),
        part_hashes=tuple(parts.part_hashes(encoded)),
        folder=folder,
    )
    write_atomic(contribution.state_path, *trained.final.buffers())
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
            state_roots=_hashes(fields["state_roots"]),
            final_manifest=chunks.StateManifest.decode(fields["final"], max_size_bytes=training.size_bytes(spec)),
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
        "state_roots": b"".join(contribution.state_roots),
        "final": contribution.final_manifest.encode(),
        "parts": b"".join(contribution.part_hashes),
    }


def _hashes(joined: bytes) -> tuple[bytes, ...]:
    return tuple(joined[start : start + 32] for start in range(0, len(joined), 32))
