"""The beacon chain and the audit draw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol.draw import Drawable, chain_end, chain_value, drawn, nonce_hash, verify_value
from swarm_protocol.errors import HashMismatchError
from swarm_protocol.records import BeaconReveal, SlotNonce
from swarm_protocol.spec import AuditSpec

SEED = bytes(range(32))
NEVER = AuditSpec(probation=0, rate=0.0)


def nonce(slot: int) -> bytes:
    return bytes([slot + 1]) * 32


def reveal(slots: range, value: bytes = SEED) -> BeaconReveal:
    openings = tuple(SlotNonce(slot=slot, nonce=nonce(slot)) for slot in slots)
    return BeaconReveal(run=bytes(32), round=0, value=value, manifest=b"m" * 32, openings=openings)


def contributions(count: int, earlier: int = 100) -> list[Drawable]:
    return [Drawable(slot, bytes([slot]) * 32, earlier, nonce_hash(nonce(slot))) for slot in range(count)]


@given(st.binary(min_size=32, max_size=32), st.integers(1, 20))
def test_every_value_of_the_chain_leads_to_the_one_before_it(seed: bytes, rounds: int) -> None:
    previous = chain_end(seed, rounds)
    for number in range(rounds):
        value = chain_value(seed, number, rounds)
        verify_value(value, previous)
        previous = value
    assert previous == seed


def test_a_value_of_another_chain_is_refused() -> None:
    with pytest.raises(HashMismatchError):
        verify_value(bytes(32), chain_end(SEED, 5))


def test_a_round_beyond_the_run_has_no_value() -> None:
    with pytest.raises(ValueError, match="round 3"):
        chain_value(SEED, 3, 3)


def test_an_identity_on_probation_is_always_audited() -> None:
    audit = AuditSpec(probation=10, rate=0.0)
    assert drawn(audit, reveal(range(3)), contributions(2, 9) + contributions(3, 10)[2:]) == [0, 1]


def test_a_nonce_that_was_not_opened_means_an_audit() -> None:
    assert drawn(NEVER, reveal(range(2)), contributions(4)) == [2, 3]


def test_a_nonce_that_was_not_committed_to_means_an_audit() -> None:
    lying = Drawable(1, bytes(32), 100, nonce_hash(b"another"))
    assert drawn(NEVER, reveal(range(3)), [contributions(1)[0], lying, contributions(3)[2]]) == [1]


def test_rate_zero_and_rate_one_draw_nobody_and_everybody() -> None:
    assert drawn(NEVER, reveal(range(50)), contributions(50)) == []
    assert drawn(AuditSpec(probation=0, rate=1.0), reveal(range(50)), contributions(50)) == list(range(50))


def test_the_rate_is_about_the_share_that_is_drawn() -> None:
    audit = AuditSpec(probation=0, rate=0.2)
    count = sum(
        len(drawn(audit, reveal(range(100), chain_value(SEED, number, 20)), contributions(100))) for number in range(20)
    )
    assert 300 < count < 500


def test_the_draw_does_not_depend_on_the_order_in_which_contributions_are_listed() -> None:
    audit = AuditSpec(probation=0, rate=0.5)
    listed = contributions(40)
    assert drawn(audit, reveal(range(40)), listed) == drawn(audit, reveal(range(40)), listed[::-1])


def test_golden_vectors(golden: Callable[[str, dict[str, object]], None]) -> None:
    audit = AuditSpec(probation=0, rate=0.5)
    golden(
        "draw",
        {
            "chain": [chain_end(SEED, 4).hex()] + [chain_value(SEED, number, 4).hex() for number in range(4)],
            "nonce_hash": nonce_hash(nonce(0)).hex(),
            "drawn": drawn(audit, reveal(range(40)), contributions(40)),
            "drawn_partly_opened": drawn(audit, reveal(range(10)), contributions(14)),
        },
    )
