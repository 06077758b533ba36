"""The inner loop is a function of its inputs, bit for bit, however a round is cut."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from swarm_protocol import merkle, training
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.fingerprint import fingerprint_hash, runtime_fingerprint
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
from swarm_protocol.training import TrainState, run_segment

ZERO = "0" * 64


def run_spec(optimizer: str = "muon", micro: int = 2, **changes: Any) -> RunSpec:
    return RunSpec(
        name="test",
        seed=1,
        numerics="native",
        coordinator=ZERO,
        checkpoint=ZERO,
        beacon=ZERO,
        model=ModelSpec(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        ),
        data=DataSpec(root=ZERO, tokenizer="bytes", train_tokens=1, held_out_windows=1),
        training=TrainingSpec(
            batch_sequences=4,
            micro_sequences=micro,
            steps=10,
            optimizer=OptimizerSpec(name=optimizer, **changes),  # type: ignore[arg-type]
        ),
        exchange=ExchangeSpec(),
        outer=OuterSpec(),
        rounds=RoundsSpec(),
        audit=AuditSpec(),
    )


def batch(step: int) -> npt.NDArray[np.int64]:
    """A pattern that a model can learn: each token is the one before plus one."""
    starts = np.random.default_rng(step).integers(0, 32, (4, 1))
    return (starts + np.arange(17)) % 32


def start(spec: RunSpec) -> TrainState:
    return TrainState.initial(spec, llama.initial_parameters(spec.model, 1))


def same(a: TrainState, b: TrainState) -> bool:
    return a.manifest().root == b.manifest().root


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("micro", [1, 4])
def test_two_segments_equal_one_in_every_bit(optimizer: str, micro: int) -> None:
    spec = run_spec(optimizer, micro)
    whole = run_segment(spec, start(spec), batch, 10)
    half = run_segment(spec, start(spec), batch, 5)
    assert same(whole, run_segment(spec, half, batch, 10))
    assert not same(whole, half)


def test_a_segment_replays_from_the_bytes_of_its_start() -> None:
    spec = run_spec()
    half = run_segment(spec, start(spec), batch, 5)
    served = b"".join(bytes(buffer) for buffer in half.buffers())
    assert len(served) == training.size_bytes(spec)
    assert same(run_segment(spec, TrainState.from_bytes(spec, served), batch, 7), run_segment(spec, half, batch, 7))


def test_a_trainer_keeps_nothing_between_segments() -> None:
    spec = run_spec()
    trainer = training.Trainer(spec)
    first = trainer.run(start(spec), batch, 3)
    trainer.run(first, lambda step: batch(step + 100), 9)
    assert same(trainer.run(start(spec), batch, 3), first)


def test_another_python_thread_gets_the_same_bits() -> None:
    spec = run_spec()
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(run_segment, spec, start(spec), batch, 3).result()
    assert same(elsewhere, run_segment(spec, start(spec), batch, 3))


def test_the_state_given_is_not_written_to() -> None:
    spec = run_spec()
    state = start(spec)
    root = state.manifest().root
    run_segment(spec, state, batch, 2)
    assert state.manifest().root == root


def test_micro_batches_change_the_result_only_by_rounding() -> None:
    whole, split = (run_segment(run_spec(micro=m), start(run_spec()), batch, 1) for m in (4, 1))
    np.testing.assert_allclose(split.parameters, whole.parameters, atol=1e-5)


@pytest.mark.parametrize(("optimizer", "lr"), [("muon", 0.03), ("adamw", 0.01)])
def test_the_loss_falls(optimizer: str, lr: float) -> None:
    spec = run_spec(optimizer, lr=lr, adamw_lr=0.01)
    losses: list[float] = []
    state = run_segment(spec, start(spec), batch, 10, on_step=lambda _, loss: losses.append(loss))
    assert losses[0] == pytest.approx(math.log(32), abs=0.3)
    held_out = [batch(1000), batch(1001)]
    before = training.evaluate(spec, start(spec).parameters, held_out)
    assert training.evaluate(spec, state.parameters, held_out) < before - 0.5


def test_evaluation_weighs_every_token_alike() -> None:
    spec = run_spec()
    parameters = start(spec).parameters
    whole = training.evaluate(spec, parameters, [batch(1)])
    assert training.evaluate(spec, parameters, [batch(1)[:1], batch(1)[1:]]) == pytest.approx(whole, rel=1e-6)


def test_evaluating_on_nothing_is_refused() -> None:
    with pytest.raises(InvalidDataError, match="nothing to evaluate"):
        training.evaluate(run_spec(), start(run_spec()).parameters, [])


def test_a_callback_hears_of_every_step() -> None:
    spec = run_spec()
    steps: list[int] = []
    half = run_segment(spec, start(spec), batch, 4, on_step=lambda step, _: steps.append(step))
    run_segment(spec, half, batch, 6, on_step=lambda step, _: steps.append(step))
    assert steps == [0, 1, 2, 3, 4, 5]


def test_cancelling_stops_before_the_next_step() -> None:
    spec = run_spec()
    steps: list[int] = []
    with pytest.raises(training.TrainingCancelledError):
        run_segment(
            spec,
            start(spec),
            batch,
            10,
            on_step=lambda step, _: steps.append(step),
            cancelled=lambda: len(steps) == 3,
        )
    assert steps == [0, 1, 2]


def test_leaving_the_finite_numbers_is_an_error() -> None:
    spec = run_spec()
    broken = start(spec).parameters.copy()
    broken[0] = np.inf
    with pytest.raises(training.NonFiniteError, match="learning rate"):
        run_segment(spec, TrainState.initial(spec, broken), batch, 1)


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 16), np.int64), np.zeros((2, 17), np.int64), np.full((4, 17), 32), np.full((4, 17), -1)]
)
def test_a_batch_that_does_not_fit_is_refused(wrong: npt.NDArray[np.int64]) -> None:
    spec = run_spec()
    with pytest.raises(InvalidDataError, match=r"batch|vocabulary"):
        run_segment(spec, start(spec), lambda _: wrong, 1)


def test_a_segment_does_not_run_backwards() -> None:
    spec = run_spec()
    state = TrainState(5, start(spec).parameters, start(spec).moments)
    with pytest.raises(ValueError, match="cannot stop"):
        run_segment(spec, state, batch, 4)


def test_bytes_of_another_length_or_step_are_no_state() -> None:
    spec = run_spec()
    served = b"".join(bytes(buffer) for buffer in start(spec).buffers())
    for wrong in (served[:-1], served + b"\0", b"", served[:-8] + (11).to_bytes(8, "little")):
        with pytest.raises(InvalidDataError, match="training state"):
            TrainState.from_bytes(spec, wrong)


def test_a_round_starts_with_a_fresh_optimizer() -> None:
    spec = run_spec()
    state = start(spec)
    assert state.step == 0
    assert not state.moments.any()
    with pytest.raises(InvalidDataError, match="parameters"):
        TrainState.initial(spec, state.parameters[:-1])


def test_segments_cover_the_steps_and_the_last_may_be_short() -> None:
    spec = run_spec()
    assert spec.segments(12) == [(0, 5), (5, 10), (10, 12)]
    assert spec.segments(5) == [(0, 5)]
    assert spec.segments(1) == [(0, 1)]


def test_the_trace_root_binds_the_states_in_order() -> None:
    roots = [bytes([i]) * 32 for i in range(3)]
    assert training.trace_root(roots) == merkle.root(roots)
    assert training.trace_root(roots[::-1]) != training.trace_root(roots)


def test_deterministic_kernels_are_on_inside_and_as_before_outside() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    with training.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()) == before


def test_a_fingerprint_tells_runtimes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MKL_CBWR", raising=False)
    here = runtime_fingerprint("cpu", 1)
    assert fingerprint_hash(here) == fingerprint_hash(dict(reversed(here.items())))
    assert len(fingerprint_hash(here)) == 32
    assert fingerprint_hash(runtime_fingerprint("cpu", 2)) != fingerprint_hash(here)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert fingerprint_hash(runtime_fingerprint("cpu", 1)) != fingerprint_hash(here)
