"""Credit in double entry: what the coordinator books and states is what `History` makes of the log, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import swarm_protocol.ledger
from swarm_coordinator import books
from swarm_coordinator.journal import Journal
from swarm_protocol import ledger_history
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.history import History
from swarm_protocol.identity import Identity
from swarm_protocol.ledger import ENTRY_BYTES, MOVE_BYTES, megaflops
from swarm_protocol.records import (
    Ban,
    CreditStatement,
    Envelope,
    Move,
    Outcome,
    RoundManifest,
    RoundPlan,
    RunEnd,
    Verdict,
)

A, R, U, I = Outcome.ACCEPTED, Outcome.REJECTED, Outcome.UNAVAILABLE, Outcome.INCONCLUSIVE  # noqa: E741
MakeStage = Callable[..., Any]


def followed(stage: Any, log: list[Envelope] | None = None) -> History:
    """The log replayed; the coordinator's books have to say the same."""
    history = History(stage.cast.spec)
    for envelope in stage.log() if log is None else log:
        history.add(envelope)
    if log is None:
        assert history.ledger.balances == stage.balances()
        assert not history.ledger.overdue
    return history


def statements(stage: Any) -> list[CreditStatement]:
    return [one for one in (envelope.open() for envelope in stage.log()) if isinstance(one, CreditStatement)]


def moves(statement: CreditStatement) -> list[tuple[str, list[tuple[int, int]]]]:
    return [(one.move.value, [(entry.round, entry.slot) for entry in one.entries]) for one in statement.moves]


def ban(stage: Any, key: bytes, reason: str = "it spams") -> None:
    with stage.journal._entry(stage.cast.now_ms) as entry:
        entry.ban(key, reason)


def test_a_statement_comes_right_before_the_next_plan_and_says_what_moved(make_stage: MakeStage) -> None:
    stage = make_stage(nodes=3, rounds=3, reductions=0.0, horizon=1)
    stage.play(0)
    assert statements(stage) == []
    stage.judge(0, A, A)
    stage.judge(1, I, I)
    stage.play(1)
    (first,) = statements(stage)
    log = stage.log()
    at = next(leaf for leaf, one in enumerate(log) if one.open() == first)
    assert isinstance(log[at + 1].open(), RoundPlan)
    assert log[at + 1].open().log_size == at + 1
    manifest = next(one.open() for one in log if isinstance(one.open(), RoundManifest))
    assert moves(first) == [("earned", [(0, 0), (0, 1), (0, 2)]), ("forfeited", [(0, 1)])]
    assert first.moves[0].cause == manifest.hash
    judged = stage.journal.read(lambda archive: archive.by_hash(first.moves[1].cause))
    assert Envelope.decode(judged.envelope).open_as(Verdict, run=stage.cast.run).slot == 1
    work = megaflops(stage.cast.spec, stage.cast.spec.standard_tokens)
    assert {entry.megaflops for move in first.moves for entry in move.entries} == {work}
    assert (first.checkpoint, first.round, first.accounts) == (manifest.root, 0, 3)
    followed(stage)


def test_credit_is_settled_when_its_horizon_has_passed_but_for_what_is_in_an_open_audit(make_stage: MakeStage) -> None:
    stage = make_stage(nodes=3, rounds=4, reductions=0.0, horizon=1)
    stage.play(0)
    stage.judge(0, A, A)
    stage.judge(1, A, A)
    first = stage.commitments[2]
    stage.play(1)
    followed(stage)
    stage.submit(*(stage.cast.verdict(auditor, first) for auditor in stage.cast.auditors))
    stage.play(2)
    followed(stage)
    second = moves(statements(stage)[1])
    # At the manifest what auditors were through with, after that the third, by its verdict.
    assert second[:3] == [
        ("earned", [(1, 0), (1, 1), (1, 2)]),
        ("settled", [(0, 0), (0, 1)]),
        ("settled", [(0, 2)]),
    ]


def test_who_loses_standing_within_a_round_earns_and_loses_it_when_it_is_sealed(
    make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(nodes=4, rounds=3, reductions=0.0)
    banned = min(node.public_key for node in stage.cast.nodes)
    report = stage.cast.report

    def banned_first(*arguments: Any) -> Envelope:
        if banned not in stage.journal.state.ended:
            ban(stage, banned)
        return report(*arguments)

    monkeypatch.setattr(stage.cast, "report", banned_first)
    stage.silent = {banned}
    stage.play(0)
    stage.standing = [node for node in stage.standing if node.public_key != banned]
    stage.play(1)
    assert moves(statements(stage)[0])[:2] == [("earned", [(0, 0), (0, 1), (0, 2), (0, 3)]), ("forfeited", [(0, 0)])]
    assert followed(stage).ledger.balances[banned].pending == 0


def test_a_ban_ends_a_standing_and_forfeits_what_is_pending(make_stage: MakeStage) -> None:
    stage = make_stage(nodes=3, rounds=3)
    stage.play(0)
    banned = stage.plan.roster[1].peer
    ban(stage, banned)
    ban(stage, banned, "once more")
    ban(stage, Identity.generate().public_key, "who never came")
    stage.standing = [node for node in stage.standing if node.public_key != banned]
    stage.play(1)
    history = followed(stage)
    assert history.accounts[banned].ended == "it spams"
    assert history.rounds[0].audits[1, None].outcome == "moot"
    balance = history.ledger.balances[banned]
    assert (balance.pending, balance.settled) == (0, 0)
    assert balance.forfeited > 0
    assert len([one for one in stage.log() if isinstance(one.open(), Ban)]) == 1
    record = Ban(run=stage.cast.run, round=0, key=stage.plan.roster[0].peer, reason="so there")
    with pytest.raises(InvalidDataError, match="who is not the run's coordinator"):
        followed(stage, [*stage.log(), Envelope.sign(stage.cast.nodes[0], record)])


def test_the_end_is_signed_once_and_after_it_each_movement_is_stated_at_once(make_stage: MakeStage) -> None:
    stage = make_stage(nodes=3, rounds=2, reductions=0.0)
    for number in range(2):
        stage.play(number)
        if number == 0:
            for slot in range(3):
                stage.judge(slot, A, A)
    silent = [slot for slot in range(3) if stage.audit(slot, -1) is not None]
    assert silent, "nobody was drawn in the second round"
    log = [one.open() for one in stage.log()]
    (end,) = [one for one in log if isinstance(one, RunEnd)]
    assert (end.round, end.root, end.reason) == (2, stage.journal.state.base, "all rounds are done")
    assert isinstance(log[-1], CreditStatement)
    followed(stage)
    before = len(statements(stage))
    stage.journal.close()
    stage.journal = Journal.open(stage.cast.home, stage.cast.now_ms + 1000)
    for count, slot in enumerate(silent, 1):
        stage.judge(slot, A, A)
        log = [one.open() for one in stage.log()]
        if isinstance(log[-1], CreditStatement):
            assert isinstance(log[-2], Verdict)
        assert len(statements(stage)) == before + count
        followed(stage)
    assert sum(one.pending for one in stage.balances().values()) == 0
    assert len([one for one in log if isinstance(one, RunEnd)]) == 1


def test_what_one_statement_has_no_room_for_goes_into_several(
    make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm_protocol.ledger, "STATEMENT_BYTES", 2 * MOVE_BYTES + 4 * ENTRY_BYTES)
    for module in (books, ledger_history):
        monkeypatch.setattr(module, "MAX_MOVES", 2)
    stage = make_stage(nodes=5, rounds=3, reductions=0.0, horizon=1)
    for number in range(3):
        stage.play(number)
        for slot in range(5):
            stage.judge(slot, A, A)
        followed(stage)
    found = statements(stage)
    assert [len(move) for _, move in moves(found[0])] == [2, 2]
    assert all(len(one.moves) <= 2 for one in found)
    assert [one.sequence for one in found] == list(range(len(found)))
    earned = [entry for one in found for move in one.moves if move.move is Move.EARNED for entry in move.entries]
    assert len(earned) == 15


def signed(stage: Any, record: Any) -> Envelope:
    return Envelope.sign(Identity.load(stage.cast.home.coordinator_key), record)


def test_a_statement_or_an_end_that_is_not_due_is_found(make_stage: MakeStage) -> None:
    stage = make_stage(nodes=3, rounds=3)
    stage.play(0)
    stage.judge(0, A, A)
    stage.play(1)
    log = stage.log()
    (statement,) = statements(stage)
    again = statement.model_copy(update={"sequence": 1})
    again = type(statement)(**again.model_dump())
    plan = max(leaf for leaf, one in enumerate(log) if isinstance(one.open(), RoundPlan))
    for place, record, named in (
        (plan + 1, again, "credit statement 1 that is not due"),
        (
            plan,
            stage.cast.registration(Identity.generate()),
            "a registration after a credit statement that no plan follows",
        ),
        (plan, RunEnd(run=stage.cast.run, round=2, root=b"x" * 32, reason="enough"), "no plan follows"),
        (plan + 1, RunEnd(run=stage.cast.run, round=2, root=b"x" * 32, reason="enough"), "the run's end names round 2"),
    ):
        envelope = record if isinstance(record, Envelope) else signed(stage, record)
        with pytest.raises(InvalidDataError, match=named):
            followed(stage, [*log[:place], envelope])


def test_a_run_may_end_early_and_then_nothing_drives_it_on(make_stage: MakeStage) -> None:
    stage = make_stage(nodes=3, rounds=8)
    stage.play(0)
    log = stage.log()
    end = RunEnd(run=stage.cast.run, round=1, root=stage.journal.state.base, reason="stopped by the run owner")
    history = followed(stage, [*log, signed(stage, end)])
    assert history.ledger.ended == end
    assert history.ledger.overdue  # what was earned has to be stated now
    sealed = next(place for place, one in enumerate(log) if isinstance(one.open(), RoundManifest))
    with pytest.raises(InvalidDataError, match="the run's end comes before the draw of round 0"):
        followed(stage, [*log[: sealed + 1], signed(stage, end)])
    plan = next(one for one in log if isinstance(one.open(), RoundPlan))
    early = RunEnd(run=stage.cast.run, round=0, root=bytes.fromhex(stage.cast.spec.checkpoint), reason="enough")
    with pytest.raises(InvalidDataError, match="after the run's end"):
        followed(stage, [*log[: log.index(plan)], signed(stage, early), plan])
    again = type(early)(**{**early.model_dump(), "sequence": 1})
    with pytest.raises(InvalidDataError, match="a second end"):
        followed(stage, [*log[: log.index(plan)], signed(stage, early), signed(stage, again)])
