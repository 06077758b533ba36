"""What verdicts amount to."""

from __future__ import annotations

import pytest

from swarm_protocol.policy import Account, reduction_ruling, resolve, ruling, whose_turn
from swarm_protocol.records import Outcome
from swarm_protocol.spec import AuditSpec

A, R, I, U = Outcome.ACCEPTED, Outcome.REJECTED, Outcome.INCONCLUSIVE, Outcome.UNAVAILABLE  # noqa: E741


@pytest.mark.parametrize(
    ("outcomes", "auditors", "expected"),
    [
        ([], 2, None),
        ([A], 2, A),
        ([R], 2, None),
        ([R, R], 2, R),
        ([R, A], 2, I),
        ([R, A], 3, None),
        ([R, A, A], 3, A),
        ([R, A, R], 3, R),
        ([U], 2, None),
        ([U, U], 2, U),
        ([U], 1, U),
        ([U, A], 2, A),
        ([U, I], 2, I),
        ([I], 2, None),
        ([I, I], 3, I),
        ([R], 1, I),
        ([R, U, I], 3, I),
    ],
)
def test_an_audit_resolves_by_agreement(outcomes: list[Outcome], auditors: int, expected: Outcome | None) -> None:
    verdicts = {bytes([number]): outcome for number, outcome in enumerate(outcomes)}
    assert resolve(verdicts, auditors, AuditSpec()) == expected


def test_one_auditor_rejects_where_the_spec_asks_for_one() -> None:
    assert resolve({b"a": R}, 2, AuditSpec(rejecting_auditors=1)) == R


def test_an_accepted_contribution_is_vouched_for() -> None:
    after = ruling(Account(vouched_tokens=100, accepted=1), A, round=7, tokens=50, policy=AuditSpec())
    assert after.account == Account(vouched_tokens=150, accepted=2)
    assert not after.forfeits_contribution
    assert not after.forfeits_everything


def test_a_reject_ends_the_standing_and_all_pending_credit() -> None:
    after = ruling(Account(vouched_tokens=100, accepted=1), R, round=7, tokens=50, policy=AuditSpec())
    assert "round 7" in (after.account.ended or "")
    assert after.forfeits_everything


def test_missing_evidence_costs_the_contribution_and_probation_starts_anew() -> None:
    after = ruling(Account(vouched_tokens=100, accepted=1), U, round=7, tokens=50, policy=AuditSpec())
    assert after.account == Account(vouched_tokens=0, accepted=1, unavailable=(7,))
    assert after.forfeits_contribution
    assert not after.forfeits_everything


def test_evidence_missing_too_often_within_the_window_ends_the_standing() -> None:
    audit = AuditSpec(max_unavailable=3, unavailable_window=20)
    account = Account()
    for number, ended in ((1, False), (10, False), (22, False), (25, True)):
        account = ruling(account, U, round=number, tokens=50, policy=audit).account
        assert (account.ended is not None) == ended
    assert "3 audits within 20 rounds" in (account.ended or "")


def test_an_inconclusive_audit_costs_the_contribution_and_accuses_nobody() -> None:
    before = Account(vouched_tokens=100, accepted=1)
    after = ruling(before, I, round=7, tokens=50, policy=AuditSpec())
    assert after.account == before
    assert after.forfeits_contribution


def test_a_rejected_average_ends_the_standing_and_all_pending_credit_for_its_own_reason() -> None:
    before = Account(vouched_tokens=100, accepted=1)
    after = reduction_ruling(before, R, "wrong average of part 3 in round 5", round=5, policy=AuditSpec())
    assert after.account == Account(vouched_tokens=100, accepted=1, ended="wrong average of part 3 in round 5")
    assert after.forfeits_everything
    again = reduction_ruling(after.account, R, "wrong average of part 4 in round 5", round=5, policy=AuditSpec())
    assert again.account == after.account


def test_a_reducer_that_withholds_its_own_input_is_unavailable_once_a_round() -> None:
    account = Account(vouched_tokens=100, accepted=1)
    for _ in range(3):
        found = reduction_ruling(account, U, "withheld", round=4, policy=AuditSpec(max_unavailable=2))
        account = found.account
    assert account == Account(vouched_tokens=0, accepted=1, unavailable=(4,))
    assert not found.forfeits_contribution
    assert not found.forfeits_everything
    found = reduction_ruling(account, U, "withheld", round=5, policy=AuditSpec(max_unavailable=2))
    assert found.forfeits_everything
    assert found.account.ended == "its evidence was unavailable in 2 audits within 20 rounds"


@pytest.mark.parametrize("outcome", [A, I])
def test_no_other_audit_of_an_average_costs_anybody_anything(outcome: Outcome) -> None:
    before = Account(vouched_tokens=100, accepted=1, unavailable=(1, 2))
    after = reduction_ruling(before, outcome, "nobody serves the committed inputs", round=3, policy=AuditSpec())
    assert after.account == before
    assert not after.forfeits_contribution
    assert not after.forfeits_everything


def test_auditors_take_turns_and_each_looks_once() -> None:
    auditors = [bytes([number]) * 32 for number in range(3)]
    voted: list[bytes] = []
    while turn := whose_turn(b"c" * 32, auditors, voted):
        voted.append(turn)
    assert sorted(voted) == auditors
    firsts = {whose_turn(bytes([number]) * 32, auditors, []) for number in range(30)}
    assert firsts == set(auditors)
