"""How long a node keeps what auditors may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from swarm_node.evidence import is_wanted

ME, OTHER = "12D3KooWme", "12D3KooWother"


def detail(mine: str | None = None, other: str | None = None, *averages: str | None) -> dict[str, Any]:
    roster = [{"peer": ME, "audit": mine}, {"peer": OTHER, "audit": other}]
    return {"roster": roster, "part_records": [{"reducer": OTHER, "audit": audit} for audit in averages]}


@pytest.mark.parametrize("mine", [None, "accepted", "moot"])
def test_a_round_without_an_open_audit_of_ours_or_of_an_average_may_go(mine: str | None) -> None:
    assert not is_wanted(detail(mine, "pending", None, "accepted", "moot"), ME)


def test_a_round_is_kept_until_the_audit_of_our_contribution_is_over() -> None:
    assert is_wanted(detail("pending"), ME)


def test_inputs_and_receipts_are_kept_until_the_audit_of_anybodys_average_is_over() -> None:
    assert is_wanted(detail("accepted", "accepted", "accepted", "pending"), ME)
