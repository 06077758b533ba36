"""What verdicts amount to."""

from __future__ import annotations

import pytest

from swarm_coordinator.auditing import resolve, standing_ends, whose_turn
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


def test_a_reject_ends_the_standing() -> None:
    assert "rejected" in (standing_ends(1, 0, AuditSpec()) or "")


def test_missing_evidence_ends_the_standing_only_at_the_specs_number() -> None:
    assert standing_ends(0, 2, AuditSpec(max_unavailable=3)) is None
    assert "unavailable" in (standing_ends(0, 3, AuditSpec(max_unavailable=3)) or "")


def test_auditors_take_turns_and_each_looks_once() -> None:
    auditors = [bytes([number]) * 32 for number in range(3)]
    voted: list[bytes] = []
    while turn := whose_turn(b"c" * 32, auditors, voted):
        voted.append(turn)
    assert sorted(voted) == auditors
    firsts = {whose_turn(bytes([number]) * 32, auditors, []) for number in range(30)}
    assert firsts == set(auditors)
