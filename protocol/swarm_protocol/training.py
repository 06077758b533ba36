"""The inner loop: the one piece of code that a node trains with and an auditor replays with.

`run_segment` is a function of (spec, state, batches) and of nothing else. On one runtime (`fingerprint`) it gives the same
bits every time and however a round is cut into segments; on another it is close, and `replay` says how close is close
enough. A process calls `configure` once, before its first tensor.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from swarm_protocol import chunks, merkle, optimizers
from swarm_protocol.adapters import Adapted, Native, full_parameters, trainable_shapes
from swarm_protocol.errors import InvalidDataError, SwarmError
from swarm_protocol.model import llama
from swarm_protocol.optimizers import Optimizer
from swarm_protocol.spec import RunSpec

Float32 = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]

_STEP = struct.Struct("<Q")

_settings: Any = torch.utils.deterministic  # a module of properties, which type checkers do not see


class NonFiniteError(SwarmError):
    """Training left the finite numbers: the learning rate is too high, or the checkpoint is damaged."""


class TrainingCancelledError(SwarmError):
    """The caller asked for a stop before the segment was done; there is no result."""


def configure(threads: int) -> None:
    """Pin what this process's results depend on: the number of threads and the kernels. Once, before the first tensor.

    CUDA reads its setting when it starts, hence the environment variable.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    _choose_kernels(deterministic=True, warn_only=False, fill=False, precision="highest")


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms and full float32 products inside, whatever the process does elsewhere."""
    before = {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": _settings.fill_uninitialized_memory,
        "precision": torch.get_float32_matmul_precision(),
    }
    _choose_kernels(deterministic=True, warn_only=False, fill=False, precision="highest")
    try:
        yield
    finally:
        _choose_kernels(**before)


def _choose_kernels(*, deterministic: bool, warn_only: bool, fill: bool, precision: str) -> None:
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    _settings.fill_uninitialized_memory = fill  # off: every tensor here is written before it is read
    torch.set_float32_matmul_precision(precision)


@dataclass(frozen=True, eq=False)
class TrainState:
    """Between two inner steps of a round: `step` steps are done. Both vectors are float32 and flat, and not written to."""

    step: int
    parameters: Float32
    moments: Float32

    @classmethod
    def initial(cls, spec: RunSpec, parameters: Float32) -> Self:
        """The start of a round: the checkpoint's parameters and a fresh optimizer.

        Raises:
            InvalidDataError: the parameters are not this model's.
        """
        state = cls(0, parameters, np.zeros(sum(moment_sizes(spec)), np.float32))
        state.check(spec)
        return state

    @classmethod
    def from_bytes(cls, spec: RunSpec, data: bytes | bytearray | memoryview) -> Self:
        """The inverse of joining `buffers`. Shares memory with `data`.

        Raises:
            InvalidDataError: the length is not `size_bytes(spec)`, or the step is beyond the spec's.
        """
        if len(data) != size_bytes(spec):
            raise InvalidDataError(f"a training state of {len(data)} bytes where this run's have {size_bytes(spec)}")
        floats = np.frombuffer(data, "<f4", count=(len(data) - _STEP.size) // 4)
        (step,) = _STEP.unpack_from(data, len(data) - _STEP.size)
        if step > spec.training.steps:
            raise InvalidDataError(f"a training state at step {step} of a round of {spec.training.steps}")
        return cls(step, floats[: spec.num_trainable], floats[spec.num_trainable :])

    def buffers(self) -> tuple[Float32, Float32, bytes]:
        """Parameters, moments, and the step as 8 little-endian bytes: what state roots are made of."""
        return self.parameters, self.moments, _STEP.pack(self.step)

    def manifest(self) -> chunks.StateManifest:
        """The hashes of the state's chunks; its `root` is an entry of the trace."""
        return chunks.manifest_of(*self.buffers())

    def check(self, spec: RunSpec) -> None:
        """Raises `InvalidDataError` if the vectors do not have the types and lengths that the spec asks for."""
        expected = (spec.num_trainable, sum(moment_sizes(spec)))
        for name, vector, size in zip(
            ("parameters", "moments"), (self.parameters, self.moments), expected, strict=True
        ):
            if vector.dtype != np.float32 or vector.shape != (size,):
                raise InvalidDataError(
                    f"{name} are {vector.dtype}{list(vector.shape)} where this run's are float32[{size}]"
                )


def size_bytes(spec: RunSpec) -> int:
    """Length of a training state's bytes."""
    return 4 * (spec.num_trainable + sum(moment_sizes(spec))) + _STEP.size


def moment_sizes(spec: RunSpec) -> tuple[int, ...]:
    """Lengths of the runs of the moments vector: see `optimizers.moment_sizes`."""
    return optimizers.moment_sizes(trainable_shapes(spec.model, spec.trainable), spec.training.optimizer)


def trace_root(state_roots: Sequence[bytes]) -> bytes:
    """What a commitment says of the training: the Merkle root of the state roots at the segment ends, in order."""
    return merkle.root(state_roots)


class Trainer:
    """Holds a model and its buffers on a device, so that the segments of a run share them. No result depends on it."""

    def __init__(self, spec: RunSpec, *, device: str = "cpu") -> None:
        self._spec = spec
        self._device = device
        self._model = llama.build(spec.model, device=device)
        self._gradients = torch.zeros_like(self._model.flat)
        self._adapted = Adapted(spec.model, spec.trainable, self._model.flat, self._gradients, Native())
        self._moments = torch.zeros(sum(moment_sizes(spec)), device=device)
        self._optimizer = Optimizer(
            trainable_shapes(spec.model, spec.trainable),
            spec.training.optimizer,
            self._adapted.parameters,
            self._adapted.gradients,
            self._moments,
        )
        gradients = llama.views(spec.model, self._gradients)
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            parameter.grad = gradient  # backward adds to it in place

    def run(
        self,
        state: TrainState,
        batch: Callable[[int], Tokens],
        stop: int,
        trunk: Float32 | None = None,
        *,
        on_step: Callable[[int, float], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> TrainState:
        """See `run_segment`."""
        if stop < state.step:
            raise ValueError(f"a segment from step {state.step} cannot stop at step {stop}")
        state.check(self._spec)
        with deterministic():
            self._adapted.load(state.parameters, trunk)
            self._moments.copy_(_tensor(state.moments))
            for step in range(state.step, stop):
                if cancelled is not None and cancelled():
                    raise TrainingCancelledError(f"stopped before step {step}")
                self._adapted.merge()
                loss = self._backward(batch(step))
                if not math.isfinite(loss):
                    raise NonFiniteError(f"the loss of step {step} is {loss}; a lower learning rate may help")
                self._adapted.pull_back()
                self._optimizer.step(step)
                if on_step is not None:
                    on_step(step, loss)
            parameters, moments = (np.array(x.cpu().numpy()) for x in (self._adapted.parameters, self._moments))
        if not (np.isfinite(parameters).all() and np.isfinite(moments).all()):
            raise NonFiniteError(f"a parameter or moment is not finite after step {stop - 1}; lower the learning rate")
        return TrainState(stop, parameters, moments)

    def evaluate(self, parameters: Float32, batches: Iterable[Tokens], trunk: Float32 | None = None) -> float:
        """See the function `evaluate`."""
        total, count = 0.0, 0
        with deterministic(), torch.no_grad():
            self._adapted.load_full(full_parameters(self._spec, parameters, trunk))
            for batch in batches:
                tokens = self._tokens(batch)
                predicted = tokens.shape[0] * (tokens.shape[1] - 1)
                total += float(llama.loss(self._model, tokens)) * predicted
                count += predicted
        if not count:
            raise InvalidDataError("there is nothing to evaluate on")
        return total / count

    def _backward(self, batch: Tokens) -> float:
        """Fill the gradients of one step's mean loss, and return that."""
        training = self._spec.training
        expected = (training.batch_sequences, self._spec.model.max_position_embeddings + 1)
        if batch.shape != expected:
            raise InvalidDataError(f"a batch of {batch.shape} tokens where this run's are {expected}")
        share = training.micro_sequences / training.batch_sequences
        self._gradients.zero_()
        total = torch.zeros((), device=self._device)
        for micro in torch.split(self._tokens(batch), training.micro_sequences):
            loss = llama.loss(self._model, micro) * share
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return float(total)

    def _tokens(self, batch: Tokens) -> torch.Tensor:
        if batch.size and not 0 <= int(batch.min()) <= int(batch.max()) < self._spec.model.vocab_size:
            raise InvalidDataError(f"a token is outside this model's vocabulary of {self._spec.model.vocab_size}")
        return _tensor(batch).to(self._device)

    def _parameters(self) -> list[torch.nn.Parameter]:
        named = dict(self._model.named_parameters())
        return [named[name] for name in llama.parameter_shapes(self._spec.model)]


def run_segment(
    spec: RunSpec,
    state: TrainState,
    batch: Callable[[int], Tokens],
    stop: int,
    trunk: Float32 | None = None,
    *,
    device: str = "cpu",
    on_step: Callable[[int, float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> TrainState:
    """The inner steps from `state.step` to `stop`, in the numerics that the spec names.

    Args:
        batch: tokens of a step of the round, int64 [batch_sequences, max_position_embeddings + 1].
        trunk: all parameters of the frozen model, float32[num_parameters], where not everything is trained. An array that
            was given before counts as the same trunk; it must not be written to.
        on_step: told the step and its mean training loss in nats per token.
        cancelled: asked before every step.

    Raises:
        NonFiniteError, TrainingCancelledError
        InvalidDataError: the state, the trunk or a batch does not fit the spec.
    """
    if spec.numerics == "exact":
        from swarm_protocol import exact  # which builds on this module

        return exact.run_segment(
            spec,
            state,
            batch,
            stop,
            trunk,
            device=device,
            limbs=spec.training.limbs,
            grain_sequences=spec.training.grain_sequences,
            on_step=on_step,
            cancelled=cancelled,
        )
    return Trainer(spec, device=device).run(state, batch, stop, trunk, on_step=on_step, cancelled=cancelled)


def evaluate(
    spec: RunSpec,
    parameters: Float32,
    batches: Iterable[Tokens],
    trunk: Float32 | None = None,
    *,
    device: str = "cpu",
) -> float:
    """Mean loss in nats per token over batches of tokens, each int64 [any number, S + 1]; in the tolerant domain.

    `parameters` and `trunk` are as in `run_segment`.

    Raises:
        InvalidDataError: no batches, or vectors that do not fit the spec.
    """
    return Trainer(spec, device=device).evaluate(parameters, batches, trunk)


def _tensor(array: npt.NDArray[np.float32] | Tokens) -> torch.Tensor:
    """A tensor of the array's values, without a copy where the array may be written to."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
