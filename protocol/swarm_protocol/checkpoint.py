"""A checkpoint, and how the averages of a sealed round turn it into the next one. Exact domain.

A checkpoint is everything that the next round needs beside the trunk, if the run has one: float32 parameters, of what is
trained, and the outer momentum, under one root. `advance` is the one function that nodes and the checkpoint worker both call,
so that everybody ends with the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from swarm_protocol import chunks, outer, parts
from swarm_protocol.chunks import StateManifest
from swarm_protocol.errors import HashMismatchError, InvalidDataError
from swarm_protocol.spec import RunSpec

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Checkpoint:
    """What round `round` starts from: flat float32 parameters and momentum of equal length."""

    round: int
    parameters: F32
    momentum: F32

    @property
    def buffers(self) -> tuple[F32, F32]:
        """What its root is made of, in this order."""
        return self.parameters, self.momentum

    @cached_property
    def manifest(self) -> StateManifest:
        return chunks.manifest_of(*self.buffers)

    @property
    def root(self) -> bytes:
        return self.manifest.root

    @classmethod
    def initial(cls, parameters: F32) -> Checkpoint:
        return cls(0, parameters, np.zeros_like(parameters))

    @classmethod
    def from_bytes(cls, spec: RunSpec, round_number: int, data: Any, root: bytes) -> Checkpoint:
        """Parse parameters || momentum.

        Raises:
            HashMismatchError: another length than this run's, or another root.
        """
        checkpoint = cls._parse(spec, round_number, data)
        if checkpoint.root != root:
            raise HashMismatchError("the checkpoint's bytes do not have the root that was asked for")
        return checkpoint

    @classmethod
    def from_verified(cls, spec: RunSpec, round_number: int, data: Any, manifest: StateManifest) -> Checkpoint:
        """Parse parameters || momentum, every chunk of which was verified by this manifest: nothing is hashed again.

        Raises:
            HashMismatchError: another length than this run's.
        """
        checkpoint = cls._parse(spec, round_number, data)
        checkpoint.__dict__["manifest"] = manifest  # where `cached_property` keeps it
        return checkpoint

    @classmethod
    def _parse(cls, spec: RunSpec, round_number: int, data: Any) -> Checkpoint:
        count = spec.num_trainable
        if memoryview(data).nbytes != size_bytes(spec):
            raise HashMismatchError(f"a checkpoint of this run has {size_bytes(spec)} bytes")
        values = np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)
        return cls(round_number, values[:count], values[count:])


def size_bytes(spec: RunSpec) -> int:
    """The size of a run's checkpoints."""
    return 8 * spec.num_trainable


def decode_average(spec: RunSpec, part: int, data: bytes | bytearray, out: F32 | None = None) -> F32:
    """The averaged pseudo-gradient of one part from its encoding, in `out` where that is given.

    Raises:
        InvalidDataError: not an encoding of this part, or not finite, or beyond the norm bound: by rule, missing.
    """
    parts.require_sound(spec, part, data)
    return parts.decode_part(spec, part, data, out)


def advance(spec: RunSpec, checkpoint: Checkpoint, averages: Sequence[bytes | None]) -> Checkpoint:
    """The next checkpoint, from one encoded average per part; None, or one that is not sound, is a zero pseudo-gradient.

    Raises:
        InvalidDataError: another number of parts than this run has, or the result is not finite.
    """
    if len(averages) != parts.part_count(spec):
        raise InvalidDataError(f"{len(averages)} averages where this run has {parts.part_count(spec)} parts")
    pseudo_gradient = np.zeros(spec.num_trainable, np.float32)
    for part, (where, data) in enumerate(zip(parts.slices(spec), averages, strict=True)):
        if data is not None:
            with contextlib.suppress(InvalidDataError):  # not sound: by rule, missing
                decode_average(spec, part, data, pseudo_gradient[where])
    return step(spec, checkpoint, pseudo_gradient)


def step(spec: RunSpec, checkpoint: Checkpoint, pseudo_gradient: F32) -> Checkpoint:
    """The next checkpoint, from the averaged pseudo-gradient, float32[num_trainable], +0 where parts are missing.

    Raises:
        InvalidDataError: the result is not finite.
    """
    parameters, momentum = outer.outer_step(spec.outer, checkpoint.parameters, checkpoint.momentum, pseudo_gradient)
    return Checkpoint(checkpoint.round + 1, parameters, momentum)
