"""An audit needs few states, replays what was drawn, and finds what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest

from swarm_protocol import audit, parts, training
from swarm_protocol.audit import Claims, Subject, needed_states
from swarm_protocol.errors import HashMismatchError, InvalidDataError
from swarm_protocol.exact import tracing
from swarm_protocol.model import llama
from swarm_protocol.records import Commitment, Comparison, Outcome, RoundPlan, Seat
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
from swarm_protocol.training import TrainState

Numerics = Literal["native", "exact"]
ZERO = "0" * 64
STEPS = 5
HERE = bytes(32)


def run_spec(numerics: Numerics) -> RunSpec:
    return RunSpec(
        name="test",
        seed=1,
        numerics=numerics,
        coordinator=ZERO,
        checkpoint=ZERO,
        beacon=ZERO,
        model=ModelSpec(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=8,
        ),
        data=DataSpec(root=ZERO, tokenizer="bytes", train_tokens=1, held_out_windows=1),
        training=TrainingSpec(batch_sequences=2, micro_sequences=2, steps=STEPS, segment_steps=2),
        exchange=ExchangeSpec(parts=2),
        outer=OuterSpec(),
        rounds=RoundsSpec(),
        audit=AuditSpec(),
    )


def batch(step: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(step).integers(0, 32, (2, 9))


def other_batch(step: int) -> npt.NDArray[np.int64]:
    return batch(step + 100)


def contribution(numerics: Numerics, *, cheat_in: int | None = None) -> tuple[Subject, list[TrainState]]:
    """A contribution that was committed to, and its states at the segment ends; one segment may be on other data."""
    spec = run_spec(numerics)
    start = TrainState.initial(spec, llama.initial_parameters(spec.model, 1))
    states, state = [], start
    for index, (_, stop) in enumerate(spec.segments(STEPS)):
        state = training.run_segment(spec, state, other_batch if index == cheat_in else batch, stop)
        states.append(state)
    return committed(spec, start, states), states


def committed(spec: RunSpec, start: TrainState, states: Sequence[TrainState]) -> Subject:
    seat = Seat(peer=bytes(32), steps=STEPS, weight=1, reducer=True)
    plan = RoundPlan(
        run=spec.run_id,
        round=0,
        base=bytes(32),
        roster=(seat,),
        cursor=0,
        commit_by_ms=0,
        exchange_by_ms=0,
        previous_beacon=bytes(32),
        log_size=0,
        log_root=bytes(32),
    )
    encoded = parts.encode_parts(spec, start.parameters, states[-1].parameters)
    commitment = Commitment(
        run=spec.run_id,
        round=0,
        plan=plan.hash,
        slot=0,
        tokens=STEPS * spec.tokens_per_step,
        trace_root=training.trace_root([state.manifest().root for state in states]),
        parts_root=parts.parts_root(parts.part_hashes(encoded)),
        nonce_hash=bytes(32),
        fingerprint=HERE,
        train_loss=1.0,
    )
    return Subject(spec, plan, 0, commitment, start.parameters)


def claims(states: Sequence[TrainState], needed: Sequence[int]) -> Claims:
    return Claims(tuple(state.manifest().root for state in states), {index: states[index] for index in needed})


def examined(subject: Subject, states: Sequence[TrainState], drawn: Sequence[int]) -> audit.Finding:
    return audit.examine(subject, drawn, claims(states, subject.needed_states(drawn)), batch, fingerprint=HERE)


@pytest.mark.parametrize("drawn", [[0], [1], [2], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("numerics", ["native", "exact"])
def test_honest_work_is_accepted_whatever_is_drawn(numerics: Numerics, drawn: list[int]) -> None:
    subject, states = contribution(numerics)
    finding = examined(subject, states, drawn)
    assert (finding.judgement.outcome, finding.judgement.comparison) == (Outcome.ACCEPTED, Comparison.EQUAL)
    lengths = [stop - start for start, stop in subject.segments]
    assert finding.steps_replayed == sum(lengths[index] for index in drawn)


@pytest.mark.parametrize("numerics", ["native", "exact"])
def test_a_cheat_is_caught_if_its_segment_is_drawn_and_only_then(numerics: Numerics) -> None:
    subject, states = contribution(numerics, cheat_in=1)
    outcomes = [examined(subject, states, [index]).judgement.outcome for index in range(3)]
    assert outcomes == [Outcome.ACCEPTED, Outcome.REJECTED, Outcome.ACCEPTED]
    assert examined(subject, states, [0, 1, 2]).judgement.outcome is Outcome.REJECTED


@pytest.mark.parametrize("drawn", [[0], [2]])
@pytest.mark.parametrize("numerics", ["native", "exact"])
def test_other_parts_than_those_of_the_training_are_caught_in_any_audit(numerics: Numerics, drawn: list[int]) -> None:
    subject, states = contribution(numerics)
    lying = replace(subject, commitment=subject.commitment.model_copy(update={"parts_root": bytes(32)}))
    judgement = examined(lying, states, drawn).judgement
    assert judgement.outcome is Outcome.REJECTED
    assert "not the encoding" in judgement.reason


@pytest.mark.parametrize("numerics", ["native", "exact"])
@pytest.mark.parametrize("fault", ["another step", "not finite"])
def test_a_state_that_hashes_to_the_trace_and_is_none_is_rejected(numerics: Numerics, fault: str) -> None:
    subject, states = contribution(numerics)
    forged = list(states)
    if fault == "another step":
        forged[0] = replace(states[0], step=states[0].step + 1)
    else:
        forged[0] = replace(states[0], moments=np.full_like(states[0].moments, np.nan))
    subject = committed(subject.spec, subject.start, forged)
    judgement = examined(subject, forged, [1]).judgement
    assert judgement.outcome is Outcome.REJECTED
    assert "no state of this run" in judgement.reason


def test_without_evidence_a_native_contribution_is_unavailable_and_an_exact_one_is_replayed_whole() -> None:
    native, _ = contribution("native")
    assert audit.examine(native, [1], None, batch, fingerprint=HERE).judgement.outcome is Outcome.UNAVAILABLE
    exact, _ = contribution("exact")
    finding = audit.examine(exact, [1], None, batch, fingerprint=HERE)
    assert (finding.judgement.outcome, finding.steps_replayed) == (Outcome.ACCEPTED, STEPS)
    cheat, _ = contribution("exact", cheat_in=2)
    assert audit.examine(cheat, [0], None, batch, fingerprint=HERE).judgement.outcome is Outcome.REJECTED


def test_a_verifier_without_evidence_vouches_for_equal_bits_and_accuses_nobody() -> None:
    subject, _ = contribution("native")
    found = audit.examine_alone(subject, batch, fingerprint=HERE, missing="gone").judgement
    assert found.outcome is Outcome.ACCEPTED
    found = audit.examine_alone(subject, other_batch, fingerprint=HERE, missing="gone").judgement
    assert found.outcome is Outcome.INCONCLUSIVE
    assert "expired (gone)" in found.reason


def test_few_states_are_asked_for() -> None:
    native, exact = run_spec("native"), run_spec("exact")
    assert needed_states(native, STEPS, [0]) == (0, 2)
    assert needed_states(native, STEPS, [1]) == (0, 1, 2)
    assert needed_states(exact, STEPS, [0]) == (2,)
    assert needed_states(exact, STEPS, [1]) == (0, 2)
    assert needed_states(exact, STEPS, [2]) == (1,)
    assert needed_states(exact, STEPS, [0, 1, 2]) == ()


def test_another_trace_than_the_committed_one_is_refused() -> None:
    subject, states = contribution("native")
    roots = [state.manifest().root for state in states]
    audit.check_trace(subject, roots)
    for wrong in (roots[:-1], [*roots, roots[0]], roots[::-1]):
        with pytest.raises(HashMismatchError, match="committed"):
            audit.check_trace(subject, wrong)


# Traces of exact contributions


def traced(subject: Subject, *, cheat_at: int | None = None) -> tracing.Trace:
    return tracing.record(subject, lambda step: (other_batch if step == cheat_at else batch)(step), runtime="here")


def test_a_trace_survives_its_encoding_and_equals_itself() -> None:
    subject, states = contribution("exact")
    trace = traced(subject)
    assert tracing.Trace.decode(trace.encode()) == trace
    assert [trace.steps[stop - 1].root for _, stop in subject.segments] == [state.manifest().root for state in states]
    assert tracing.first_difference(trace, trace) is None


def test_two_traces_part_at_the_first_operator_that_saw_something_else() -> None:
    subject, _ = contribution("exact")
    found = tracing.first_difference(traced(subject), traced(subject, cheat_at=3))
    assert found is not None
    assert (found.segment, found.step) == (1, 3)
    assert found.ours is not None
    assert found.ours.operator == "embedding"
    assert found.theirs is not None
    assert found.ours.first != found.theirs.first


def test_what_is_no_trace_is_refused() -> None:
    subject, _ = contribution("exact")
    trace = traced(subject)
    for wrong in (b"", b"\x80", trace.encode()[:-1]):
        with pytest.raises(InvalidDataError):
            tracing.Trace.decode(wrong)
    with pytest.raises(InvalidDataError, match="different contributions"):
        tracing.first_difference(trace, replace(trace, slot=1))
