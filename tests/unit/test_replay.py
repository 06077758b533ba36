"""Honest work is accepted, other work is rejected, and the verdict says why."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from swarm_protocol import parts, replay, sketch, sketching
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.model import llama
from swarm_protocol.records import Comparison, Outcome, Sketches
from swarm_protocol.replay import Compared, compare, judge, relative_l2
from swarm_protocol.spec import (
    AuditSpec,
    DataSpec,
    ExchangeSpec,
    ModelSpec,
    OuterSpec,
    RoundsSpec,
    RunSpec,
    TrainingSpec,
)
from swarm_protocol.tolerances import Bounds
from swarm_protocol.training import TrainState, run_segment

Float32 = npt.NDArray[np.float32]
ZERO = "0" * 64
EQUAL = Compared(Comparison.EQUAL, 0.0)
BOUNDS = Bounds(1e-4, 3e-4)


def run_spec(**audit: Any) -> RunSpec:
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
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        ),
        data=DataSpec(root=ZERO, tokenizer="bytes", train_tokens=1, held_out_windows=1),
        training=TrainingSpec(batch_sequences=4, micro_sequences=4),
        exchange=ExchangeSpec(parts=3),
        outer=OuterSpec(),
        rounds=RoundsSpec(),
        audit=AuditSpec(**audit),
    )


SPEC = run_spec()


def batch(step: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(step).integers(0, 32, (4, 17))


@pytest.fixture(scope="module")
def start() -> TrainState:
    return TrainState.initial(SPEC, llama.initial_parameters(SPEC.model, 1))


@pytest.fixture(scope="module")
def end(start: TrainState) -> TrainState:
    return run_segment(SPEC, start, batch, 5)


def near(end: TrainState, start: TrainState, distance: float) -> TrainState:
    """A state whose parameters are this relative distance away from those of `end`."""
    noise = np.random.default_rng(1).standard_normal(end.parameters.size)
    noise *= distance * np.linalg.norm(end.parameters - start.parameters) / np.linalg.norm(noise)
    return replace(end, parameters=(end.parameters + noise).astype(np.float32))


def test_a_replay_of_the_same_work_is_equal_and_accepted(start: TrainState, end: TrainState) -> None:
    compared = compare(SPEC, start, end, run_segment(SPEC, start, batch, 5), bounds=BOUNDS)
    assert compared == EQUAL
    assert judge([compared], bounds=BOUNDS, parts_match=True).outcome is Outcome.ACCEPTED


def test_micro_batching_differs_in_bits_and_stays_within_the_tolerance(start: TrainState, end: TrainState) -> None:
    other = SPEC.model_copy(update={"training": SPEC.training.model_copy(update={"micro_sequences": 2})})
    compared = compare(SPEC, start, run_segment(other, start, batch, 5), end, bounds=BOUNDS)
    assert compared.comparison is Comparison.WITHIN
    assert 0 < compared.statistic < SPEC.audit.accept


def learning_rate_up(spec: RunSpec) -> RunSpec:
    optimizer = spec.training.optimizer
    changed = optimizer.model_copy(update={"lr": optimizer.lr * 1.001, "adamw_lr": optimizer.adamw_lr * 1.001})
    return spec.model_copy(update={"training": spec.training.model_copy(update={"optimizer": changed})})


def test_a_learning_rate_one_permille_higher_is_outside(start: TrainState, end: TrainState) -> None:
    claimed = run_segment(learning_rate_up(SPEC), start, batch, 5)
    compared = compare(SPEC, start, claimed, end, bounds=BOUNDS)
    assert compared.comparison is Comparison.OUTSIDE
    assert judge([compared], bounds=BOUNDS, parts_match=True).outcome is Outcome.REJECTED


def test_made_up_work_of_the_right_norm_is_far_outside(start: TrainState, end: TrainState) -> None:
    delta = end.parameters - start.parameters
    made_up = np.random.default_rng(2).permutation(delta)
    claimed = replace(end, parameters=start.parameters + made_up)
    compared = compare(SPEC, start, claimed, end, bounds=None)
    assert compared.statistic > 1
    assert judge([compared], bounds=BOUNDS, parts_match=True).outcome is Outcome.REJECTED


def test_forged_moments_are_found_even_where_they_are_small(start: TrainState, end: TrainState) -> None:
    moments = end.moments.copy()
    moments[-1000:] *= np.float32(1.01)  # AdamW's second moments, whose norm is far below Muon's momenta
    compared = compare(SPEC, start, replace(end, moments=moments), end, bounds=BOUNDS)
    assert compared.comparison is Comparison.OUTSIDE


@pytest.mark.parametrize(
    ("distance", "comparison", "outcome"),
    [
        (5e-5, Comparison.WITHIN, Outcome.ACCEPTED),
        (2e-4, Comparison.DIFFERENT, Outcome.INCONCLUSIVE),
        (5e-4, Comparison.OUTSIDE, Outcome.REJECTED),
    ],
)
def test_the_bounds_decide(
    start: TrainState, end: TrainState, distance: float, comparison: Comparison, outcome: Outcome
) -> None:
    compared = compare(SPEC, start, near(end, start, distance), end, bounds=BOUNDS)
    assert compared.statistic == pytest.approx(distance, rel=0.05)
    assert compared.comparison is comparison
    judgement = judge([EQUAL, compared, EQUAL], bounds=BOUNDS, parts_match=True)
    assert (judgement.outcome, judgement.comparison) == (outcome, comparison)
    assert "distance" in judgement.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_claim_that_is_not_finite_is_outside(start: TrainState, end: TrainState, bad: float) -> None:
    parameters = end.parameters.copy()
    parameters[7] = bad
    compared = compare(SPEC, start, replace(end, parameters=parameters), end, bounds=None)
    assert compared == Compared(Comparison.OUTSIDE, math.inf)
    judgement = judge([compared], bounds=BOUNDS, parts_match=True)
    assert judgement.outcome is Outcome.REJECTED
    assert judgement.statistic is None
    assert "not finite" in judgement.reason


def test_a_state_of_another_step_is_outside(start: TrainState, end: TrainState) -> None:
    compared = compare(SPEC, start, replace(end, step=4), end, bounds=BOUNDS)
    assert compared.comparison is Comparison.OUTSIDE


def test_a_claim_of_the_wrong_size_is_refused(start: TrainState, end: TrainState) -> None:
    with pytest.raises(InvalidDataError, match="moments"):
        compare(SPEC, start, replace(end, moments=end.moments[1:]), end, bounds=BOUNDS)


def test_parts_that_encode_something_else_are_a_rejection_of_their_own(start: TrainState, end: TrainState) -> None:
    encoded = parts.encode_parts(SPEC, start.parameters, end.parameters)
    root = parts.parts_root(parts.part_hashes(encoded))
    assert replay.parts_match(SPEC, start.parameters, end.parameters, root)
    nudged = end.parameters.copy()
    nudged += np.float32(1e-3) * (start.parameters - end.parameters)
    assert not replay.parts_match(SPEC, start.parameters, nudged, root)
    judgement = judge([EQUAL], bounds=BOUNDS, parts_match=False)
    assert judgement.outcome is Outcome.REJECTED
    assert "parts" in judgement.reason


def test_signed_sketches_of_other_parts_are_a_rejection_of_their_own(start: TrainState, end: TrainState) -> None:
    def signed(final: Float32) -> Sketches:
        made = sketching.of_parts(SPEC, bytes(32), parts.encode_parts(SPEC, start.parameters, final))
        return Sketches(
            run=SPEC.run_id, round=0, commitment_set=bytes(32), commitment=bytes(32), slot=0, root=sketch.root(made),
            blob=bytes(32),
        )  # fmt: skip

    here = (SPEC, start.parameters, end.parameters)
    assert replay.sketches_match(*here, None)
    assert replay.sketches_match(*here, signed(end.parameters))
    assert not replay.sketches_match(*here, signed(start.parameters))
    for judgement in (
        judge([EQUAL], bounds=BOUNDS, parts_match=True, sketches_match=False),
        replay.judge_exact(trace_matches=True, parts_match=True, sketches_match=False),
    ):
        assert judgement.outcome is Outcome.REJECTED
        assert "sketches" in judgement.reason


def test_parameters_that_cannot_be_encoded_match_no_parts(start: TrainState) -> None:
    assert not replay.parts_match(SPEC, start.parameters, np.full_like(start.parameters, math.nan), bytes(32))


@pytest.mark.parametrize(
    ("distance", "comparison", "outcome"),
    [
        (0.0, Comparison.EQUAL, Outcome.ACCEPTED),
        (1e-6, Comparison.DIFFERENT, Outcome.INCONCLUSIVE),
        (1e-2, Comparison.DIFFERENT, Outcome.INCONCLUSIVE),
        (0.5, Comparison.OUTSIDE, Outcome.REJECTED),
    ],
)
def test_runtimes_that_are_not_calibrated_earn_nothing_unless_equal(
    start: TrainState, end: TrainState, distance: float, comparison: Comparison, outcome: Outcome
) -> None:
    compared = compare(SPEC, start, near(end, start, distance), end, bounds=None)
    assert compared.comparison is comparison
    assert judge([compared], bounds=None, parts_match=True).outcome is outcome


def test_evidence_that_was_not_served_is_unavailable() -> None:
    judgement = replay.unavailable("its final parameters")
    assert judgement.outcome is Outcome.UNAVAILABLE
    assert judgement.comparison is None
    assert "its final parameters" in judgement.reason


def test_the_distance_is_blind_to_nothing_that_a_cosine_is_blind_to() -> None:
    delta = np.random.default_rng(4).standard_normal(1000).astype(np.float32)
    assert relative_l2(delta * np.float32(1.5), delta) == pytest.approx(0.5, rel=1e-6)
    assert relative_l2(-delta, delta) == pytest.approx(2.0)
    assert relative_l2(delta, delta) == 0.0
    assert relative_l2(delta + 1, delta + 1, delta) == 0.0


def test_a_replay_that_does_not_move_is_matched_only_by_itself() -> None:
    still = np.ones(4, np.float32)
    assert relative_l2(still, still, still) == 0.0
    assert relative_l2(still * 2, still, still) == math.inf
