"""Audits of averages at the coordinator: which are drawn, whose verdict counts, and what a rejection costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from swarm_coordinator.api.models import RunStatus
from swarm_coordinator.api.status import round_detail, run_status
from swarm_coordinator.db.archive import opened
from swarm_coordinator.journal import Journal
from swarm_protocol.errors import RefusedError
from swarm_protocol.ledger import megaflops
from swarm_protocol.records import CommitmentSet, Envelope, Outcome, PartVerdict, Role, RoundPlan

MakeCast = Callable[..., Any]

A, R, U, I = Outcome.ACCEPTED, Outcome.REJECTED, Outcome.UNAVAILABLE, Outcome.INCONCLUSIVE  # noqa: E741


class Stage:
    """A round of two parts, the first reduced by slot 0 and the second by slot 1, after its draw."""

    def __init__(self, cast: Any) -> None:
        self.cast = cast
        self.journal = Journal.open(cast.home, cast.now_ms)
        self.journal.appoint(Role.CHECKPOINT_WORKER, cast.worker.public_key, cast.now_ms)
        for auditor in cast.auditors:
            self.journal.appoint(Role.AUDITOR, auditor.public_key, cast.now_ms)
        for node in cast.nodes:
            self.submit(cast.registration(node))
        self.averages = self.play(0)
        self.work = megaflops(cast.spec, cast.spec.standard_tokens)
        assert self.work

    def submit(self, envelope: Envelope) -> bool:
        """Whether it is new."""
        receipt, _ = self.journal.submit(envelope, envelope.open(), None, self.cast.now_ms)
        if isinstance(receipt, RefusedError):
            raise receipt
        return receipt.new

    def play(self, number: int) -> list[Envelope]:
        """A round up to its draw; returns its part records."""
        cast, journal = self.cast, self.journal
        for node in cast.nodes:
            self.submit(cast.ready(node, number, journal.state.base))
        self.plan = plan = self.newest(RoundPlan)
        self.commitments = [cast.commitment(plan, slot) for slot in range(len(plan.roster))]
        for commitment in self.commitments:
            self.submit(commitment)
        averages = [cast.part_record(plan, self.newest(CommitmentSet), part, slot=part) for part in range(2)]
        for average in averages:
            self.submit(average)
            self.submit(cast.part_held(average))
        self.submit(cast.report(plan, journal.state.parts, bytes([50 + number]) * 32))
        for slot in range(len(plan.roster)):
            self.submit(cast.opening(plan, slot))
        return averages

    def newest(self, kind: Any) -> Any:
        return self.journal.read(lambda archive: opened(archive.newest(kind.kind, 1)[0]))

    def verdict(self, auditor: int, part: int, outcome: Outcome, **changes: object) -> Envelope:
        signed = self.cast.part_verdict(self.cast.auditors[auditor], self.averages[part], part, outcome)
        return self.cast.changed(self.cast.auditors[auditor], signed.open(), **changes)

    def refuse(self, envelope: Envelope, status: int, code: str) -> None:
        with pytest.raises(RefusedError) as refusal:
            self.submit(envelope)
        assert (refusal.value.status, refusal.value.code) == (status, code)

    def status(self) -> RunStatus:
        return self.journal.read(lambda archive: run_status(self.cast.spec, self.journal.state, archive))

    def open_parts(self, auditor: bytes) -> list[tuple[int, int, int]]:
        """Round, slot and part of the averages that an auditor is asked about."""
        found = self.journal.read(lambda archive: archive.open_audits(auditor))
        return [(audit.round, audit.slot, audit.part) for audit, _ in found if audit.part >= 0]

    def outcomes(self, number: int = 0) -> list[str | None]:
        """Of the audits of a round's part records."""
        detail = self.journal.read(lambda archive: round_detail(archive, number))
        assert detail is not None
        return [record.audit for record in detail.part_records]


@pytest.fixture
def stage(make_cast: MakeCast) -> Any:
    stage = Stage(make_cast(reductions=1.0))
    yield stage
    stage.journal.close()


def test_the_averages_of_a_round_are_drawn_for_every_auditor_but_their_reducer(stage: Stage) -> None:
    for auditor in stage.cast.auditors:
        assert stage.open_parts(auditor.public_key) == [(0, 0, 0), (0, 1, 1)]
    assert stage.open_parts(stage.plan.roster[0].peer) == [(0, 1, 1)]
    assert stage.outcomes() == ["pending", "pending"]
    assert stage.status().part_audits.drawn == stage.status().audits.drawn == 2
    assert [node.pending_audits for node in stage.status().nodes] == [2, 2]


def test_where_the_spec_has_no_share_no_average_is_drawn(make_cast: MakeCast) -> None:
    stage = Stage(make_cast())
    assert stage.outcomes() == [None, None]
    assert stage.status().part_audits.drawn == 0
    stage.refuse(stage.verdict(0, 0, A), 422, "no-audit")
    stage.journal.close()


def test_two_auditors_reject_an_average_and_its_reducer_loses_standing_and_credit(stage: Stage) -> None:
    stage.submit(stage.verdict(0, 1, R))
    assert stage.outcomes() == ["pending", "pending"]
    stage.submit(stage.verdict(1, 1, R))
    assert stage.outcomes() == ["pending", "rejected"]
    status = stage.status()
    (rejected,) = status.rejected
    liar = stage.cast.holder(stage.plan, 1)
    assert (rejected.peer, rejected.round, rejected.slot, rejected.part) == (liar.peer_id, 0, 1, 1)
    assert rejected.reason == "wrong average of part 1"
    nodes = {node.peer: node for node in status.nodes}
    assert (nodes[liar.peer_id].standing, nodes[liar.peer_id].reason) == ("ended", "wrong average of part 1")
    assert (nodes[liar.peer_id].credit.pending, nodes[liar.peer_id].credit.forfeited) == (0, stage.work)
    honest = nodes[stage.cast.holder(stage.plan, 0).peer_id]
    assert (honest.standing, honest.credit.pending, honest.credit.forfeited) == ("good", stage.work, 0)
    # Its contribution needs no audit any more, and it takes no further part.
    assert status.audits.moot == 1
    stage.refuse(stage.cast.ready(liar, 1, stage.journal.state.base), 403, "standing-ended")


def test_the_same_verdict_twice_is_one_verdict(stage: Stage) -> None:
    verdict = stage.verdict(0, 0, R)
    assert stage.submit(verdict)
    assert not stage.submit(verdict)
    assert stage.outcomes() == ["pending", "pending"]
    assert not stage.status().rejected
    stage.refuse(stage.verdict(0, 0, R, reason="changed my mind"), 409, "equivocation")
    assert stage.outcomes() == ["pending", "pending"]


def test_only_appointed_auditors_judge_and_only_what_was_drawn(stage: Stage) -> None:
    cast, average = stage.cast, stage.averages[0]
    stage.refuse(cast.part_verdict(cast.nodes[0], average, 0), 403, "not-appointed")
    stage.refuse(stage.verdict(0, 0, A, slot=1), 422, "no-audit")
    stage.refuse(stage.verdict(0, 0, A, sequence=1), 422, "no-audit")
    stage.refuse(stage.verdict(0, 0, A, round=1), 422, "no-audit")
    stage.refuse(stage.verdict(0, 0, A, part_record=b"x" * 32), 422, "wrong-record")
    reducer = cast.holder(stage.plan, 0)
    stage.journal.appoint(Role.AUDITOR, reducer.public_key, cast.now_ms)
    stage.refuse(cast.part_verdict(reducer, average, 0), 403, "own-average")


@pytest.mark.parametrize("outcomes", [(I, I), (R, U), (R, A)])
def test_an_average_that_auditors_do_not_reject_together_costs_nobody_anything(
    stage: Stage, outcomes: tuple[Outcome, Outcome]
) -> None:
    for auditor, outcome in enumerate(outcomes):
        stage.submit(stage.verdict(auditor, 0, outcome))
    counts = stage.status().part_audits
    assert (counts.rejected, counts.accepted, counts.unavailable + counts.inconclusive) == (0, 0, 1)
    for node in stage.status().nodes:
        assert (node.standing, node.credit.pending, node.credit.forfeited) == ("good", stage.work, 0)


def test_an_average_is_not_vouched_for_as_a_contribution_is(stage: Stage) -> None:
    for auditor in range(2):
        stage.submit(stage.verdict(auditor, 0, A))
    assert stage.outcomes() == ["accepted", "pending"]
    assert [node.accepted for node in stage.status().nodes] == [0, 0]


def test_at_the_end_of_a_run_credit_waits_for_the_audits_of_its_holders_averages(make_cast: MakeCast) -> None:
    stage = Stage(make_cast(rounds=1, reductions=1.0))
    for auditor in stage.cast.auditors:
        for commitment in stage.commitments:
            stage.submit(stage.cast.verdict(auditor, commitment))
    assert [node.credit.pending for node in stage.status().nodes] == [stage.work] * 2
    for part, outcome in ((0, A), (1, R)):
        for auditor in range(2):
            stage.submit(stage.verdict(auditor, part, outcome))
    credit = {node.peer: node.credit for node in stage.status().nodes}
    honest, liar = (stage.cast.holder(stage.plan, slot).peer_id for slot in range(2))
    assert (credit[honest].settled, credit[honest].forfeited) == (stage.work, 0)
    assert (credit[liar].settled, credit[liar].forfeited) == (0, stage.work)
    stage.journal.close()


def test_a_restart_finds_audits_and_verdicts_as_they_were(stage: Stage) -> None:
    stage.submit(stage.verdict(0, 1, R))
    before, head = stage.status(), stage.journal.log_head
    stage.journal.close()
    stage.journal = Journal.open(stage.cast.home, stage.cast.now_ms)
    assert (stage.status(), stage.journal.log_head) == (before, head)
    stage.submit(stage.verdict(1, 1, R))
    assert stage.outcomes() == ["pending", "rejected"]


def test_verdicts_are_leaves_of_the_log(stage: Stage) -> None:
    stage.submit(stage.verdict(0, 0, A))
    rows = stage.journal.read(lambda archive: archive.of_round(PartVerdict.kind, 0))
    assert [row.leaf is not None for row in rows] == [True]
