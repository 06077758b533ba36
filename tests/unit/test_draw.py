"""The beacon chain and the audit draw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol.draw import (
    Drawable,
    chain_end,
    chain_value,
    drawn,
    drawn_parts,
    nonce_hash,
    probability,
    verify_value,
)
from swarm_protocol.errors import HashMismatchError
from swarm_protocol.records import BeaconReveal, SlotNonce
from swarm_protocol.spec import AuditSpec

SEED = bytes(range(32))
NEVER = AuditSpec(probation=0, floor=0.0)


def nonce(slot: int) -> bytes:
    return bytes([slot + 1]) * 32


def reveal(slots: range, value: bytes = SEED) -> BeaconReveal:
    openings = tuple(SlotNonce(slot=slot, nonce=nonce(slot)) for slot in slots)
    return BeaconReveal(run=bytes(32), round=0, value=value, manifest=b"m" * 32, openings=openings)


STANDARD = 1000
"""Tokens of a contribution of full size."""

MUCH = 1 << 40
"""Vouched tokens with which the floor is what counts."""


def contributions(count: int, vouched: int = MUCH) -> list[Drawable]:
    return [Drawable(slot, nonce_hash(nonce(slot)), STANDARD, 5, vouched) for slot in range(count)]


def slots(audit: AuditSpec, revealed: BeaconReveal, listed: list[Drawable]) -> list[int]:
    return list(drawn(audit, STANDARD, revealed, listed))


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


def test_an_identity_on_probation_is_always_audited_whole() -> None:
    audit = AuditSpec(probation=10, floor=0.0)
    found = drawn(audit, STANDARD, reveal(range(2)), contributions(2, 10 * STANDARD - 1))
    assert found == {0: (0, 1, 2, 3, 4), 1: (0, 1, 2, 3, 4)}


def test_a_nonce_that_was_not_opened_means_an_audit_of_everything() -> None:
    assert drawn(NEVER, STANDARD, reveal(range(2)), contributions(4)) == {2: (0, 1, 2, 3, 4), 3: (0, 1, 2, 3, 4)}


def test_a_nonce_that_was_not_committed_to_means_an_audit() -> None:
    lying = Drawable(1, nonce_hash(b"another"), STANDARD, 5, MUCH)
    assert slots(NEVER, reveal(range(3)), [contributions(1)[0], lying, contributions(3)[2]]) == [1]


def test_floor_zero_and_floor_one_draw_nobody_and_everybody() -> None:
    assert slots(NEVER, reveal(range(50)), contributions(50)) == []
    assert slots(AuditSpec(probation=0, floor=1.0), reveal(range(50)), contributions(50)) == list(range(50))


def test_a_trusted_identity_is_audited_in_one_segment_and_each_is_as_likely() -> None:
    audit = AuditSpec(probation=0, floor=1.0)
    found = [segments for number in range(20) for segments in drawn_segments(audit, number)]
    assert all(len(segments) == 1 for segments in found)
    counts = [sum(segments == (index,) for segments in found) for index in range(5)]
    assert min(counts) > 150


def drawn_segments(audit: AuditSpec, number: int) -> list[tuple[int, ...]]:
    return list(drawn(audit, STANDARD, reveal(range(50), chain_value(SEED, number, 20)), contributions(50)).values())


@pytest.mark.parametrize(("vouched", "share"), [(9, 1.0), (10, 1.0), (11, 0.5), (13, 0.25), (109, 0.02), (1000, 0.02)])
def test_trust_grows_with_what_audits_have_vouched_for(vouched: int, share: float) -> None:
    likely = probability(
        AuditSpec(probation=10, floor=0.02),
        tokens=STANDARD,
        standard_tokens=STANDARD,
        vouched_tokens=vouched * STANDARD,
    )
    assert likely / 2**64 == pytest.approx(share)


def test_a_smaller_contribution_is_drawn_in_proportion() -> None:
    audit = AuditSpec(probation=0, floor=0.5)
    whole, half = (
        probability(audit, tokens=tokens, standard_tokens=STANDARD, vouched_tokens=MUCH) for tokens in (1000, 500)
    )
    assert half == whole // 2


def test_the_floor_is_about_the_share_that_is_drawn() -> None:
    audit = AuditSpec(probation=0, floor=0.2)
    count = sum(len(drawn_segments_of(audit, number)) for number in range(20))
    assert 300 < count < 500


def drawn_segments_of(audit: AuditSpec, number: int) -> dict[int, tuple[int, ...]]:
    return drawn(audit, STANDARD, reveal(range(100), chain_value(SEED, number, 20)), contributions(100))


def test_over_the_budget_the_silent_come_first_and_then_the_lowest_draws() -> None:
    on_probation = contributions(10, vouched=0)
    everything = drawn(AuditSpec(budget=1.0), STANDARD, reveal(range(8)), on_probation)
    assert len(everything) == 10
    some = drawn(AuditSpec(budget=0.5), STANDARD, reveal(range(8)), on_probation)
    fewer = drawn(AuditSpec(budget=0.3), STANDARD, reveal(range(8)), on_probation)
    assert (len(some), len(fewer)) == (5, 3)
    assert {8, 9} <= fewer.keys() <= some.keys()


def test_the_draw_does_not_depend_on_the_order_in_which_contributions_are_listed() -> None:
    audit = AuditSpec(probation=0, floor=0.5)
    listed = contributions(40)
    assert slots(audit, reveal(range(40)), listed) == slots(audit, reveal(range(40)), listed[::-1])


def parts_of(audit: AuditSpec, revealed: BeaconReveal, reducers: dict[int, int], slots: int = 3) -> tuple[int, ...]:
    return drawn_parts(audit, STANDARD, revealed, contributions(slots), reducers)


def test_all_averages_of_a_reducer_on_probation_are_audited() -> None:
    audit = AuditSpec(probation=10, reductions=1e-9)
    reducers = {0: MUCH, 1: 10 * STANDARD - 1, 2: 10 * STANDARD, 4: 0}
    assert parts_of(audit, reveal(range(3)), reducers) == (1, 4)


def test_of_a_trusted_reducer_about_the_share_that_the_spec_names_is_audited() -> None:
    reducers = dict.fromkeys(range(200), MUCH)
    found = [parts_of(AuditSpec(), reveal(range(3), chain_value(SEED, number, 20)), reducers) for number in range(20)]
    assert 0.04 < sum(map(len, found)) / 4000 < 0.06
    assert len(set(found)) == 20


def test_share_one_audits_all_averages_and_zero_none_even_on_probation() -> None:
    reducers = {0: MUCH, 1: 0}
    assert parts_of(AuditSpec(reductions=1.0), reveal(range(3)), reducers) == (0, 1)
    assert parts_of(AuditSpec(reductions=0.0), reveal(range(3)), reducers) == ()


def test_any_nonce_that_is_opened_changes_which_averages_are_drawn() -> None:
    audit, reducers = AuditSpec(reductions=0.5), dict.fromkeys(range(64), MUCH)
    every = parts_of(audit, reveal(range(3)), reducers)
    assert every != parts_of(audit, reveal(range(2)), reducers)
    invented = SlotNonce(slot=2, nonce=b"another" + bytes(25))
    forged = BeaconReveal(**{**reveal(range(2)).model_dump(), "openings": (*reveal(range(2)).openings, invented)})
    assert parts_of(audit, forged, reducers) == parts_of(audit, reveal(range(2)), reducers)


def test_golden_vectors(golden: Callable[[str, dict[str, object]], None]) -> None:
    audit = AuditSpec(probation=0, floor=0.5)
    golden(
        "draw",
        {
            "chain": [chain_end(SEED, 4).hex()] + [chain_value(SEED, number, 4).hex() for number in range(4)],
            "nonce_hash": nonce_hash(nonce(0)).hex(),
            "drawn": [
                [slot, *found] for slot, found in drawn(audit, 1000, reveal(range(40)), contributions(40)).items()
            ],
            "drawn_parts": parts_of(AuditSpec(reductions=0.25), reveal(range(3)), dict.fromkeys(range(64), MUCH)),
            "drawn_partly_opened": slots(audit, reveal(range(10)), contributions(14)),
        },
    )
