"""What an audit says of each way to cheat, without a network: native, exact, whole, and segment by segment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swarm_node import contribution as contributions
from swarm_node.cheats import Kind
from swarm_node.cheats.kinds import KINDS, conduct
from swarm_node.conduct import HONEST, Conduct
from swarm_node.contribution import Contribution, Progress
from swarm_node.evidence import Evidence
from swarm_protocol import (
    audit,
    chunks,
    collecting,
    corpus,
    data,
    evidence,
    gathering,
    parts,
    reduction_audit,
    training,
)
from swarm_protocol.audit import Claims, Subject
from swarm_protocol.calls import Call
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.data import Dataset
from swarm_protocol.errors import HashMismatchError, InvalidDataError, RefusedError
from swarm_protocol.model.llama import initial_parameters
from swarm_protocol.records import Comparison, Outcome, RoundPlan, Seat
from swarm_protocol.reduction_audit import Input
from swarm_protocol.spec import (
    AuditSpec,
    DataConfig,
    DataSpec,
    ExchangeSpec,
    ModelSpec,
    OptimizerSpec,
    OuterSpec,
    RoundsSpec,
    RunSpec,
    TrainingSpec,
)
from swarm_protocol.tolerances import Pair, Precision, Tolerances
from swarm_protocol.training import TrainState

ZERO = "0" * 64
HERE, ELSEWHERE = bytes(32), b"e" * 32
NETWORK = {Kind.REFUSES_EVIDENCE, Kind.FORGED_EVIDENCE, Kind.LYING_REDUCER}
LATER = {Kind.STALE_CHECKPOINT: 1, Kind.COPIED: 1, Kind.SLEEPER: 2}
TRAINING = [kind for kind in Kind if kind not in {*NETWORK, *LATER, Kind.OTHER_PARTS, Kind.FORGED_STATES}]


@dataclass
class Rig:
    """A run without a network: rounds of one slot from given checkpoints."""

    spec: RunSpec
    dataset: Dataset
    folder: Path

    def checkpoint(self, round_number: int) -> Checkpoint:
        parameters = initial_parameters(self.spec.model, round_number)
        return Checkpoint(round_number, parameters, np.zeros_like(parameters))

    def plan(self, round_number: int) -> RoundPlan:
        seat = Seat(peer=bytes(32), steps=self.spec.training.steps, weight=1, reducer=True)
        return RoundPlan(
            run=self.spec.run_id, round=round_number, base=bytes(32), roster=(seat,), cursor=100 * round_number,
            commit_by_ms=0, exchange_by_ms=0, previous_beacon=bytes(32), log_size=0, log_root=bytes(32),
        )  # fmt: skip

    def make(self, how: Conduct, round_number: int = 0) -> Contribution:
        folder = self.folder / f"round-{round_number}"
        folder.mkdir(exist_ok=True)
        progress = Progress(lambda _step, _loss: None, lambda: False)
        return contributions.make(
            self.spec, self.plan(round_number), 0, self.checkpoint(round_number), self.dataset, folder, progress,
            how.train, how.encode,
        )  # fmt: skip

    def subject(self, made: Contribution, round_number: int = 0) -> Subject:
        plan = self.plan(round_number)
        commitment = made.commitment(self.spec, plan, HERE)
        return Subject(self.spec, plan, 0, commitment, self.checkpoint(round_number).parameters)

    def claims(self, made: Contribution) -> Claims:
        read = [made.state_path(index).read_bytes() for index in range(len(made.states))]
        states = {index: TrainState.from_bytes(self.spec, state) for index, state in enumerate(read)}
        return Claims(made.state_roots, states)

    def examine(
        self, subject: Subject, claims: Claims | None, *segments: int, auditor: bytes = HERE, **options: Any
    ) -> audit.Finding:
        def batch(step: int) -> training.Tokens:
            return data.batch(self.spec, subject.plan, 0, step, self.dataset)

        drawn = segments or range(len(subject.segments))
        return audit.examine(subject, drawn, claims, batch, fingerprint=auditor, **options)

    def audited(self, made: Contribution, round_number: int = 0, *segments: int, **options: Any) -> audit.Finding:
        return self.examine(self.subject(made, round_number), self.claims(made), *segments, **options)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("shards")

    def put(blob: bytes) -> None:
        (folder / chunks.content_hash(blob).hex()).write_bytes(blob)

    manifest = corpus.write_dataset(DataConfig(), ModelSpec(), corpus.stdlib_corpus()[:20], put)
    return Dataset.from_directory(manifest, folder)


@pytest.fixture
def rig_of(shards: Dataset, tmp_path: Path) -> Callable[[str], Rig]:
    def make(numerics: str) -> Rig:
        model = ModelSpec(hidden_size=32, intermediate_size=48, num_hidden_layers=1, max_position_embeddings=32)
        spec = RunSpec(
            name="test",
            seed=1,
            numerics=numerics,
            coordinator=ZERO,
            checkpoint=ZERO,
            beacon=ZERO,
            model=model,
            data=DataSpec(root=ZERO, tokenizer="bytes", train_tokens=1, held_out_windows=1),
            training=TrainingSpec(
                batch_sequences=4,
                micro_sequences=4,
                steps=6,
                segment_steps=2,
                optimizer=OptimizerSpec(warmup_steps=2),
            ),
            exchange=ExchangeSpec(parts=3),
            outer=OuterSpec(),
            rounds=RoundsSpec(),
            audit=AuditSpec(),
        )
        return Rig(spec, shards, tmp_path)

    return make


@pytest.fixture(params=["native", "exact"])
def rig(rig_of: Callable[[str], Rig], request: pytest.FixtureRequest) -> Rig:
    return rig_of(request.param)


@pytest.fixture
def native(rig_of: Callable[[str], Rig]) -> Rig:
    return rig_of("native")


def test_every_kind_that_the_command_line_offers_is_there() -> None:
    assert set(KINDS) == set(Kind)
    assert conduct(None) == HONEST


def test_honest_work_is_equal_whole_and_in_each_segment(rig: Rig) -> None:
    made = rig.make(HONEST)
    for segments in ((), (0,), (1,), (2,)):
        finding = rig.audited(made, 0, *segments)
        assert (finding.judgement.outcome, finding.judgement.comparison) == (Outcome.ACCEPTED, Comparison.EQUAL)


@pytest.mark.parametrize("kind", TRAINING)
def test_other_training_is_rejected_in_exact_numerics_and_unless_slight_in_native(rig: Rig, kind: Kind) -> None:
    finding = rig.audited(rig.make(conduct(kind)))
    if rig.spec.numerics == "native" and kind is Kind.LEARNING_RATE_SLIGHT:
        assert finding.judgement.outcome is Outcome.INCONCLUSIVE
        assert 5e-5 < max(one.statistic for one in finding.compared.values()) < 3e-4
        return
    assert finding.judgement.outcome is Outcome.REJECTED
    words = "leads elsewhere (distance" if rig.spec.numerics == "native" else "other bits"
    assert words in finding.judgement.reason


@pytest.mark.parametrize(
    ("kind", "segments"), [(Kind.FEWER_STEPS, {1, 2}), (Kind.SKIPPED_STEP, {1}), (Kind.FLIPPED_BIT, {2})]
)
def test_a_cheat_in_some_segments_is_seen_in_those(native: Rig, kind: Kind, segments: set[int]) -> None:
    made = native.make(conduct(kind))
    outcomes = [native.audited(made, 0, index).judgement.outcome for index in range(3)]
    assert {index for index, outcome in enumerate(outcomes) if outcome is Outcome.REJECTED} == segments
    assert outcomes.count(Outcome.ACCEPTED) == 3 - len(segments)


@pytest.mark.parametrize(("kind", "honest_rounds"), LATER.items())
def test_kinds_with_a_memory_are_honest_until_they_can_cheat(rig: Rig, kind: Kind, honest_rounds: int) -> None:
    how = conduct(kind)
    for number in range(honest_rounds):
        made = rig.make(how, number)
        assert rig.audited(made, number).judgement.outcome is Outcome.ACCEPTED
    for part, encoded in enumerate(made.part(index) for index in range(len(made.part_hashes))):
        digest = chunks.content_hash(encoded).hex()
        (made.folder / f"input-{part}-1-{digest}").write_bytes(encoded)  # what it was sent as a reducer
    made = rig.make(how, honest_rounds)
    assert rig.audited(made, honest_rounds).judgement.outcome is Outcome.REJECTED


def test_what_is_copied_is_what_another_node_sent(native: Rig) -> None:
    victim = native.make(HONEST)
    for part in range(len(victim.part_hashes)):
        (victim.folder / f"input-{part}-1-00").write_bytes(victim.part(part))
    made = native.make(conduct(Kind.COPIED), 1)
    ours, theirs = (
        np.concatenate([parts.decode_part(native.spec, part, one.part(part)) for part in range(3)])
        for one in (made, victim)
    )
    assert np.linalg.norm(ours - theirs) < 0.2 * np.linalg.norm(theirs)


@pytest.mark.parametrize("segments", [(), (0,), (1,), (2,)])
def test_other_parts_are_found_whatever_segment_is_drawn(rig: Rig, segments: tuple[int, ...]) -> None:
    judgement = rig.audited(rig.make(conduct(Kind.OTHER_PARTS)), 0, *segments).judgement
    assert judgement.outcome is Outcome.REJECTED
    assert judgement.comparison is Comparison.EQUAL or rig.spec.numerics == "exact"
    assert "the parts are not the encoding" in judgement.reason


def test_states_that_hide_what_lies_between_are_no_evidence(native: Rig) -> None:
    finding = native.audited(native.make(conduct(Kind.FORGED_STATES)))
    assert finding.judgement.outcome is Outcome.REJECTED
    assert "a state of step 6 where the plan has one of step 2" in finding.judgement.reason
    assert finding.steps_replayed == 0


@pytest.mark.parametrize(
    ("forge", "words"),
    [
        (lambda state: replace(state, step=3), "a state of step 3"),
        (lambda state: replace(state, parameters=state.parameters * np.float32("nan")), "not finite"),
        (lambda state: replace(state, moments=state.moments + np.float32("inf")), "not finite"),
        (lambda state: replace(state, parameters=state.parameters[1:]), "parameters are float32"),
        (lambda state: replace(state, moments=state.moments.astype(np.float64)), "moments are float64"),
    ],
    ids=["another step", "NaN", "infinite moments", "too short", "another type"],
)
@pytest.mark.parametrize("where", [0, 2])
def test_a_claim_that_is_no_state_of_the_run_is_rejected_before_any_replay(
    native: Rig, forge: Callable[[TrainState], TrainState], words: str, where: int
) -> None:
    made = native.make(HONEST)
    claims = native.claims(made)
    forged = Claims(claims.roots, {**claims.states, where: forge(claims.states[where])})
    finding = native.examine(native.subject(made), forged)
    assert finding.judgement.outcome is Outcome.REJECTED
    assert finding.judgement.reason.startswith("the evidence is no state of this run")
    assert words in finding.judgement.reason
    assert finding.steps_replayed == 0


def test_a_trace_of_other_roots_is_not_the_one_that_was_committed_to(native: Rig) -> None:
    made = native.make(HONEST)
    subject = native.subject(made)
    audit.check_trace(subject, made.state_roots)
    for roots in (made.state_roots[::-1], made.state_roots[1:], (*made.state_roots[:2], bytes(32))):
        with pytest.raises(HashMismatchError, match="committed"):
            audit.check_trace(subject, roots)


class Archive:
    """What an auditor collects from a node that serves what it made, and what anybody reads of it later."""

    def __init__(self, rig: Rig, made: Contribution, handlers: Any = None) -> None:
        served = Evidence()
        served.add(0, made)
        self.rig, self.made, self.subject = rig, made, rig.subject(made)
        self._handlers = handlers or served.handlers

    async def call(self, _: bytes, header: dict[str, Any], **__: Any) -> tuple[dict[str, Any], bytes]:
        answer = await self._handlers[str(header["op"])](call(**header))
        return answer.header, bytes(answer.body)

    async def committed_parts(self, *_: object) -> Any:
        for part, digest in enumerate(self.made.part_hashes):
            data = await self.call(b"", {"op": "get", "hash": digest})
            yield part, Input(data[1], self.made.proof(part))

    def of(self, finding: audit.Finding, claims: Claims | None) -> tuple[int | None, dict[str, bytes]]:
        """The segment that decided, and the archived bytes by name."""
        us: Any = self
        segment, collected = asyncio.run(collecting.contribution(us, us, self.subject, finding, claims))
        assert sum(item.size_bytes for item in collected.items) <= evidence.max_bytes(self.rig.spec, 1, None)
        pieces = dict(collected.pieces())
        return segment, {item.name: b"".join(pieces[one] for one in item.chunks) for item in collected.items}


@pytest.mark.parametrize("kind", [Kind.MADE_UP, Kind.SKIPPED_STEP, Kind.OTHER_PARTS, Kind.FORGED_STATES])
def test_what_is_archived_of_a_rejection_is_enough_to_reject_again(native: Rig, kind: Kind) -> None:
    made = native.make(conduct(kind))
    archive = Archive(native, made)
    first = native.audited(made)
    assert first.judgement.outcome is Outcome.REJECTED
    segment, found = archive.of(first, native.claims(made))
    assert segment == {Kind.SKIPPED_STEP: 1, Kind.FORGED_STATES: 0}.get(kind, segment)
    claims = gathering.archived_claims(archive.subject, found)
    assert set(claims.states) == set(audit.states_around(archive.subject, segment or 0))
    again = native.examine(archive.subject, claims, segment or 0)
    assert (again.judgement.outcome, again.judgement.reason) == (Outcome.REJECTED, first.judgement.reason)
    parts_sent = evidence.inputs_of(found, "part")
    assert all(
        reduction_audit.is_committed(native.spec, archive.subject.commitment, part, one)
        for part, one in parts_sent.items()
    )
    assert len(parts_sent) == 3


def test_archived_states_that_were_not_committed_to_prove_nothing(native: Rig) -> None:
    made = native.make(conduct(Kind.MADE_UP))
    archive = Archive(native, made)
    _, found = archive.of(native.audited(made), native.claims(made))
    honest = native.make(HONEST)
    forged = found | {"state-2": honest.state_path(2).read_bytes()}
    with pytest.raises(InvalidDataError, match="none that was committed to"):
        gathering.archived_claims(archive.subject, forged)
    with pytest.raises(InvalidDataError, match="committed"):
        gathering.archived_claims(archive.subject, found | {"trace": b"".join(honest.state_roots)})
    with pytest.raises(InvalidDataError, match="no trace"):
        gathering.archived_claims(archive.subject, {})


def test_of_an_exact_rejection_the_claimed_trace_states_and_parts_are_archived(
    rig_of: Callable[[str], Rig],
) -> None:
    exact = rig_of("exact")
    made = exact.make(conduct(Kind.FLIPPED_BIT))
    archive = Archive(exact, made)
    segment, found = archive.of(exact.examine(archive.subject, None), None)
    assert segment == 2
    assert found["trace"] == b"".join(made.state_roots)
    assert found["state-2"] == made.state_path(2).read_bytes()
    assert {name for name in found if name.startswith("part-")} == {"part-0", "part-1", "part-2"}


def test_where_a_node_serves_nothing_nothing_is_archived(rig_of: Callable[[str], Rig]) -> None:
    exact = rig_of("exact")
    made = exact.make(conduct(Kind.FLIPPED_BIT))
    silent = Archive(exact, made, Evidence().handlers)
    assert silent.of(exact.examine(silent.subject, None), None) == (None, {})


def test_without_evidence_native_audits_are_unavailable_and_exact_ones_need_none(rig: Rig) -> None:
    subject = rig.subject(rig.make(conduct(Kind.REFUSES_EVIDENCE)))
    outcome = rig.examine(subject, None).judgement.outcome
    assert outcome is (Outcome.UNAVAILABLE if rig.spec.numerics == "native" else Outcome.ACCEPTED)


def call(**header: Any) -> Call:
    async def nothing(_: object) -> None:
        return None

    return Call(bytes(32), header, 0, nothing)


def test_who_refuses_evidence_still_passes_averages_on(native: Rig, tmp_path: Path) -> None:
    served = Evidence()
    (tmp_path / "average").write_bytes(b"an average")
    served.add_piece(0, b"h" * 32, tmp_path / "average")
    handlers = conduct(Kind.REFUSES_EVIDENCE).evidence(served.handlers)
    for header in ({"op": "trace", "round": 0}, {"op": "state", "root": bytes(32)}):
        with pytest.raises(RefusedError):
            asyncio.run(_answer(handlers[str(header["op"])](call(**header))))
    assert asyncio.run(_answer(handlers["get"](call(op="get", hash=b"h" * 32)))).body == b"an average"


def test_forged_evidence_is_other_bytes_for_states_and_right_ones_for_all_else(native: Rig) -> None:
    how = conduct(Kind.FORGED_EVIDENCE)
    made = native.make(how)
    assert native.audited(made).judgement.outcome is Outcome.ACCEPTED  # as it lies on disk
    index = Evidence()
    index.add(0, made)
    handlers = how.evidence(index.handlers)
    piece, part = made.states[0].hashes[0], made.part_hashes[0]
    served = asyncio.run(_answer(handlers["get"](call(op="get", hash=piece))))
    assert chunks.content_hash(served.body) != piece
    served = asyncio.run(_answer(handlers["get"](call(op="get", hash=part))))
    assert chunks.content_hash(served.body) == part


async def _answer(answer: Any) -> Any:
    return await answer


def calibrated(spec: RunSpec, accept: float, reject: float) -> Tolerances:
    pair = Pair(runtimes=(HERE.hex(), ELSEWHERE.hex()), worst_honest=0.0, accept=accept, reject=reject)
    measured = Precision(worst_honest=0.0, mildest_cheat=1.0, margin_orders=0.0, honest={}, cheats={}, pairs=(pair,))
    return Tolerances(
        model=spec.model, training=spec.training, contributions=1, runtimes={}, precisions={"float32": measured}
    )


@pytest.mark.parametrize(
    ("kind", "bounds", "outcome"),
    [
        (Kind.LEARNING_RATE, None, Outcome.INCONCLUSIVE),
        (Kind.LEARNING_RATE, (1e-4, 3e-4), Outcome.REJECTED),
        (Kind.LEARNING_RATE, (1e-4, 5e-2), Outcome.INCONCLUSIVE),
        (Kind.LEARNING_RATE, (5e-2, 8e-2), Outcome.ACCEPTED),
        (Kind.MADE_UP, None, Outcome.REJECTED),
        (None, None, Outcome.ACCEPTED),
    ],
    ids=str,
)
def test_the_tolerances_of_a_pair_of_runtimes_decide(
    native: Rig, kind: Kind | None, bounds: tuple[float, float] | None, outcome: Outcome
) -> None:
    tolerances = None if bounds is None else calibrated(native.spec, *bounds)
    made = native.make(conduct(kind))
    finding = native.audited(made, auditor=ELSEWHERE, tolerances=tolerances)
    assert finding.judgement.outcome is outcome


def test_the_tolerances_of_other_runtimes_say_nothing(native: Rig) -> None:
    made = native.make(conduct(Kind.LEARNING_RATE))
    tolerances = calibrated(native.spec, 1e-4, 3e-4)
    judgement = native.audited(made, auditor=b"t" * 32, tolerances=tolerances).judgement
    assert judgement.outcome is Outcome.INCONCLUSIVE
    assert "not calibrated" in judgement.reason
