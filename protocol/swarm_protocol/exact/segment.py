"""The inner loop in exact arithmetic: what `training.run_segment` is for native numerics, and the same bits everywhere.

A `Trainer` takes the fastest backend that passes a self-test on this device and thread: two steps of a tiny model whose
hash is known, and on a GPU one of a wide model. Where none passes, this machine is refused. Memory beside what native
training needs: two bytes per parameter for the weights' limbs, and for activations about as much as native keeps.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from swarm_protocol.adapters import Adapted, trainable_shapes
from swarm_protocol.errors import ConfigurationError, InvalidDataError, UnsupportedPlatformError
from swarm_protocol.exact import rule
from swarm_protocol.exact.backend import Backend, candidates, multiplies_exactly
from swarm_protocol.exact.decoder import Decoder, Observe
from swarm_protocol.exact.low_rank import ExactLowRank
from swarm_protocol.exact.optimizer import Optimizer
from swarm_protocol.exact.products import Products, Scratch
from swarm_protocol.model import llama
from swarm_protocol.spec import (
    AuditSpec,
    DataSpec,
    ExchangeSpec,
    ModelSpec,
    OptimizerSpec,
    OuterSpec,
    RoundsSpec,
    RunSpec,
    TrainingSpec,
)
from swarm_protocol.training import (
    Float32,
    NonFiniteError,
    Tokens,
    TrainingCancelledError,
    TrainState,
    deterministic,
    moment_sizes,
)


class Trainer:
    """Holds buffers, so that the segments of a run share them. No result depends on it, nor on the backend."""

    def __init__(
        self,
        spec: RunSpec,
        *,
        device: str = "cpu",
        limbs: int = 2,
        grain_sequences: int | None = None,
        micro_sequences: int | None = None,
        backend: Backend | None = None,
        observe: Observe | None = None,
    ) -> None:
        """`observe` is told every operator and its result in the order of the computation, for `bisect`."""
        self._spec, self._device = spec, torch.device(device)
        model = spec.model
        if model.num_attention_heads // model.num_key_value_heads * model.max_position_embeddings > rule.K_CUT:
            raise ConfigurationError(
                f"exact training takes at most {rule.K_CUT:,} query rows per key-value head: shorten "
                "max_position_embeddings or raise num_key_value_heads"
            )
        grain = grain_sequences or rule.default_grain(model)
        wanted = micro_sequences or spec.training.micro_sequences
        self._micro = max(grain, wanted // grain * grain)
        backend = backend or trusted_backend(device)
        scratch, size = Scratch(self._device), spec.model.num_parameters
        full, gradients = (torch.zeros(size, device=self._device) for _ in range(2))
        self._moments = torch.zeros(sum(moment_sizes(spec)), device=self._device)
        self._status = torch.zeros(1, dtype=torch.int32, device=self._device)
        products = Products(backend.passes, backend.multiply, limbs, scratch)
        low_rank = ExactLowRank(products, backend.passes, scratch, self._status, limbs=limbs)
        self._adapted = Adapted(spec.model, spec.trainable, full, gradients, low_rank, observe)
        self._decoder = Decoder(
            spec.model,
            full,
            gradients,
            products,
            backend.passes,
            scratch,
            self._status,
            limbs=limbs,
            grain_sequences=grain,
            observe=observe,
        )
        self._optimizer = Optimizer(
            trainable_shapes(spec.model, spec.trainable),
            spec.training.optimizer,
            self._adapted.parameters,
            self._adapted.gradients,
            self._moments,
            products,
            backend.passes,
            scratch,
            self._status,
            limbs=limbs,
        )

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
        with deterministic(), torch.no_grad():
            self._adapted.load(state.parameters, trunk)
            self._moments.copy_(_tensor(state.moments))
            for step in range(state.step, stop):
                if cancelled is not None and cancelled():
                    raise TrainingCancelledError(f"stopped before step {step}")
                loss = self._step(step, batch(step))
                if on_step is not None:
                    on_step(step, loss)
            parameters, moments = (np.array(x.cpu().numpy()) for x in (self._adapted.parameters, self._moments))
        if not (np.isfinite(parameters).all() and np.isfinite(moments).all()):
            raise NonFiniteError(f"a parameter or moment is not finite after step {stop - 1}; lower the learning rate")
        return TrainState(stop, parameters, moments)

    def _step(self, step: int, batch: Tokens) -> float:
        model, training = self._spec.model, self._spec.training
        expected = (training.batch_sequences, model.max_position_embeddings + 1)
        if batch.shape != expected:
            raise InvalidDataError(f"a batch of {batch.shape} tokens where this run's are {expected}")
        if not 0 <= int(batch.min()) <= int(batch.max()) < model.vocab_size:
            raise InvalidDataError(f"a token is outside this model's vocabulary of {model.vocab_size}")
        self._status.zero_()
        self._adapted.merge()
        self._decoder.load()
        total, tokens = np.float32(0), _tensor(batch).to(self._device)
        divisor = training.batch_sequences * model.max_position_embeddings
        for index, micro in enumerate(torch.split(tokens, self._micro)):
            for share in self._decoder.backward(micro, divisor, first=index == 0):
                total = np.float32(total + share)
        self._decoder.finish()
        self._adapted.pull_back()
        if not math.isfinite(total):
            raise NonFiniteError(f"the loss of step {step} is {total}; a lower learning rate may help")
        self._optimizer.step(step)
        if int(self._status) > rule.HIGHEST_EXPONENT:
            raise NonFiniteError(f"a value of step {step} left the range below 2^100; a lower learning rate may help")
        return float(total)


def run_segment(
    spec: RunSpec,
    state: TrainState,
    batch: Callable[[int], Tokens],
    stop: int,
    trunk: Float32 | None = None,
    *,
    device: str = "cpu",
    limbs: int = 2,
    grain_sequences: int | None = None,
    on_step: Callable[[int, float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> TrainState:
    """The inner steps from `state.step` to `stop`, bit-identical on every machine, thread count and micro-batch.

    Args:
        batch: tokens of a step of the round, int64 [batch_sequences, max_position_embeddings + 1].
        trunk: as in `training.run_segment`.
        limbs: 2 or 3 limbs per operand, part of the run's definition; so is
        grain_sequences: sequences per grain, by default the fewest that hold 2,048 tokens.
        on_step: told the step and its mean training loss in nats per token.
        cancelled: asked before every step.

    Raises:
        NonFiniteError, TrainingCancelledError
        InvalidDataError: the state, the trunk or a batch does not fit the spec.
        UnsupportedPlatformError: this machine's arithmetic did not pass the self-test.
    """
    key = (spec, device, limbs, grain_sequences, trusted_backend(device))
    trainer = _take(key) or Trainer(spec, device=device, limbs=limbs, grain_sequences=grain_sequences)
    end = trainer.run(state, batch, stop, trunk, on_step=on_step, cancelled=cancelled)
    _keep(key, trainer)
    return end


_Key = tuple[RunSpec, str, int, int | None, Backend]
_kept: list[tuple[_Key, Trainer]] = []
_kept_lock = threading.Lock()


def _take(key: _Key) -> Trainer | None:
    """The trainer that the last segment used, if it fits. Nobody else has it meanwhile, so threads do not meet in one."""
    with _kept_lock:
        found, trainer = _kept.pop() if _kept else (None, None)
    return trainer if found == key else None


def _keep(key: _Key, trainer: Trainer) -> None:
    """For the next segment, which saves it the allocation of every buffer. One is kept, because it is large."""
    with _kept_lock:
        _kept[:] = [(key, trainer)]


_TORCH_GRAIN = 1 << 15
"""Elements for which torch wakes another thread."""

SELF_TEST_HASH = "b56c4c25eecf45e49b66ef1e4c29fb888363ae3ba463dbaf58a107f7d7f94d90"
"""What `self_test_hash` gives on every correct machine; tests hold it against the reference."""

WIDE_HASH = "6d9182ed852554d6215e51861335560853330dc6efe220ebd0d788a473661b7f"
"""What `wide_hash` gives: a GPU is asked too, because its kernels for wide matrices are not those of the tiny model's."""


def trusted_backend(device: str) -> Backend:
    """The fastest backend that computes right on `device`, in this thread and torch's own: rounding modes belong to threads.

    Raises:
        UnsupportedPlatformError: none does.
    """
    backends: dict[tuple[str, int], Backend] = _of_this_thread.__dict__.setdefault("backends", {})
    key = device, torch.get_num_threads()
    if key not in backends:
        backends[key] = _passes_self_test(*key)
    return backends[key]


_of_this_thread = threading.local()  # not a table by thread number, which the next thread inherits


def _passes_self_test(device: str, threads: int) -> Backend:
    for backend in candidates(device) if every_thread_rounds(threads) else ():
        try:
            if (
                multiplies_exactly(backend.multiply, device)
                and self_test_hash(backend, device) == SELF_TEST_HASH
                and (torch.device(device).type == "cpu" or wide_hash(backend, device) == WIDE_HASH)
            ):
                return backend
        except (RuntimeError, NotImplementedError):  # a kernel that this device lacks
            continue
    raise UnsupportedPlatformError(
        f"exact training does not give the known result on {device!r} here; join with another --device, or a native run"
    )


def every_thread_rounds(threads: int) -> bool:
    """Whether torch's threads keep subnormals and round to nearest even: a tiny model runs on this one only.

    The passes of every backend share their rows among the same threads.
    """
    cases = torch.tensor([2.0**-126, 1.0 + 2.0**-23, 1.0 + 2.0**-22 + 2.0**-23, -1.0 - 2.0**-23])
    halves = torch.tensor([2.0**-127, 0.5 + 2.0**-24, 0.5 + 2.0**-23 + 2.0**-24, -0.5 - 2.0**-24])
    sums = torch.tensor([2.0**-24, 1.0 + 2.0**-22, 1.0 + 2.0**-22 + 2.0**-22, -1.0])
    count = threads * _TORCH_GRAIN // len(cases)  # so many elements that torch gives some to every thread
    x = cases.repeat(count)
    pairs = ((x * 0.5, halves), (x + 2.0**-24, sums))
    # Bits are compared, because a thread that takes subnormals for zero finds the two equal.
    return all(torch.equal(y.view(torch.int32), right.view(torch.int32).repeat(count)) for y, right in pairs)


def self_test_hash(backend: Backend, device: str) -> str:
    """The hash of a tiny model after one step and after two; in the first, some squares of gradients are subnormal."""
    spec = self_test_spec()
    trainer = Trainer(spec, device=device, grain_sequences=1, backend=backend)
    first = trainer.run(self_test_state(spec), self_test_batch, 1)
    second = trainer.run(first, self_test_batch, 2)
    return hash_of_states(first, second)


def wide_hash(backend: Backend, device: str) -> str:
    """The hash of a model of one wide layer after a step, with sizes that are no powers of two."""
    model = ModelSpec(
        vocab_size=5003,
        hidden_size=640,
        intermediate_size=1736,
        num_hidden_layers=1,
        num_attention_heads=10,
        num_key_value_heads=5,
        max_position_embeddings=160,
    )
    spec = self_test_spec().model_copy(update={"model": model})
    trainer = Trainer(spec, device=device, grain_sequences=2, backend=backend)
    tokens = np.arange(3 * 161, dtype=np.int64).reshape(3, 161) * 37 % model.vocab_size
    start = TrainState.initial(spec, llama.initial_parameters(model, 0))
    return hash_of_states(trainer.run(start, lambda _: tokens, 1))


def hash_of_states(*states: TrainState) -> str:
    return blake3(b"".join(state.parameters.tobytes() + state.moments.tobytes() for state in states)).hexdigest()


def self_test_spec() -> RunSpec:
    nothing = "0" * 64
    return RunSpec(
        name="self-test",
        seed=0,
        numerics="native",
        coordinator=nothing,
        checkpoint=nothing,
        beacon=nothing,
        model=ModelSpec(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=24,
        ),
        data=DataSpec(root=nothing, tokenizer="bytes", train_tokens=1, held_out_windows=1),
        training=TrainingSpec(batch_sequences=3, micro_sequences=3, optimizer=OptimizerSpec(weight_decay=0.1)),
        exchange=ExchangeSpec(),
        outer=OuterSpec(),
        rounds=RoundsSpec(),
        audit=AuditSpec(),
    )


def self_test_state(spec: RunSpec) -> TrainState:
    """Initial weights, of which the final gain is so small that squared gradients are subnormal."""
    parameters = llama.initial_parameters(spec.model, 0)
    parameters[-spec.model.hidden_size :] = 2.0**-56
    return TrainState.initial(spec, parameters)


def self_test_batch(step: int) -> Tokens:
    return np.arange(3 * 25, dtype=np.int64).reshape(3, 25) * (7 + step) % 40


def _tensor(array: npt.NDArray[np.float32] | Tokens) -> torch.Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
