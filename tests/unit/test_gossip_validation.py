"""What gossip passes on, and what it holds against whom: decided without a socket or a clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol.gossip import validation
from swarm_protocol.gossip.validation import (
    BANNED_S,
    HEADS_BACK,
    MAX_MESSAGE_BYTES,
    MESSAGES_AT_ONCE,
    MESSAGES_PER_S,
    ROUNDS_BACK,
    VERDICT_ROUNDS_BACK,
    WORST_SCORE,
    Gate,
    Outcome,
    Standings,
)
from swarm_protocol.identity import Identity
from swarm_protocol.records import (
    KINDS,
    Appointment,
    Dismissal,
    Envelope,
    Equivocation,
    LogHead,
    NonceOpening,
    Ready,
    Record,
    Role,
    RoundManifest,
    RoundPlan,
    Seat,
    Verdict,
)

RUN = bytes([1]) * 32
OWNER, AUDITOR, NODE, STRANGER = (Identity.from_seed(bytes([number]) * 32) for number in (2, 3, 4, 5))
ZERO = bytes(32)


def plan(round: int = 0, *, cursor: int = 0, run: bytes = RUN) -> RoundPlan:
    return RoundPlan(
        run=run,
        round=round,
        base=ZERO,
        roster=(Seat(peer=NODE.public_key, steps=1, weight=1, reducer=True),),
        cursor=cursor,
        commit_by_ms=1,
        exchange_by_ms=2,
        previous_beacon=ZERO,
        log_size=0,
        log_root=ZERO,
    )


def manifest(round: int = 0, *, root: bytes = ZERO) -> RoundManifest:
    return RoundManifest(run=RUN, round=round, plan=ZERO, commitment_set=ZERO, parts=(None,), base=ZERO, root=root)


def head(size: int, root: bytes = ZERO) -> LogHead:
    return LogHead(run=RUN, round=0, sequence=size, root=root)


def verdict(round: int = 0, slot: int = 0) -> Verdict:
    return Verdict(
        run=RUN,
        round=round,
        sequence=slot,
        slot=slot,
        commitment=ZERO,
        outcome="accepted",  # type: ignore[arg-type]
        comparison="equal",  # type: ignore[arg-type]
        statistic=0.0,
        reason="",
        steps_replayed=1,
        fingerprint=ZERO,
    )


def appointment(key: bytes, sequence: int = 0) -> Appointment:
    return Appointment(run=RUN, round=0, sequence=sequence, role=Role.AUDITOR, key=key)


def signed(record: Record, by: Identity = OWNER) -> bytes:
    return Envelope.sign(by, record).encode()


def proof(by: Identity, first: Record, second: Record, *, sequence: int = 0, reporter: Identity = STRANGER) -> bytes:
    report = Equivocation(
        run=RUN, round=first.round, sequence=sequence, first=signed(first, by), second=signed(second, by)
    )
    return signed(report, reporter)


@pytest.fixture
def gate() -> Gate:
    return Gate(RUN, OWNER.public_key)


def outcomes(gate: Gate, *messages: bytes) -> list[str]:
    return [gate.judge(message).outcome.value for message in messages]


def test_what_the_coordinator_announces_is_passed_on_once(gate: Gate) -> None:
    messages = [signed(plan()), signed(manifest()), signed(head(3)), signed(appointment(AUDITOR.public_key))]
    assert outcomes(gate, *messages) == ["accepted"] * 4
    assert outcomes(gate, *messages) == ["duplicate"] * 4


def test_a_message_is_judged_by_its_size_before_anything_else(gate: Gate) -> None:
    assert outcomes(gate, bytes(MAX_MESSAGE_BYTES + 1)) == ["invalid"]


@pytest.mark.parametrize(
    "forge",
    [
        lambda: signed(plan(), STRANGER),
        lambda: signed(plan(run=bytes([9]) * 32)),
        lambda: signed(plan())[:-1],
        lambda: signed(plan()) + b"\x00",
        lambda: signed(plan()).replace(RUN, bytes([7]) * 32),
        lambda: signed(Ready(run=RUN, round=0, base=ZERO, tokens_per_s=1.0, can_reduce=True, upload_bytes_per_s=0), NODE),
        lambda: signed(NonceOpening(run=RUN, round=0, slot=0, nonce=ZERO), NODE),
        lambda: proof(OWNER, plan(), plan()),
        lambda: proof(OWNER, plan(), plan(round=1)),
        lambda: b"",
        lambda: b"\xff" * 200,
    ],
    ids=[
        "forged", "foreign", "cut", "longer", "changed", "heartbeat", "nonce", "same twice", "two rounds", "empty", "garbage",
    ],
)  # fmt: skip
def test_what_nobody_honest_sends_is_invalid_and_stays_so(gate: Gate, forge: Callable[[], bytes]) -> None:
    message = forge()
    assert outcomes(gate, message, message) == ["invalid", "invalid"]
    assert gate.newest_round is None


def test_a_verdict_counts_once_its_signer_is_appointed_and_its_round_is_known(gate: Gate) -> None:
    message = signed(verdict(), AUDITOR)
    assert outcomes(gate, message) == ["ignored"]
    gate.judge(signed(appointment(AUDITOR.public_key)))
    assert outcomes(gate, message) == ["ignored"]
    gate.judge(signed(plan()))
    assert outcomes(gate, message, message) == ["accepted", "duplicate"]
    assert outcomes(gate, signed(verdict(), STRANGER)) == ["ignored"]


def test_a_dismissed_auditor_is_heard_no_more_whatever_comes_first(gate: Gate) -> None:
    gate.judge(signed(plan()))
    dismissal = signed(Dismissal(run=RUN, round=0, key=AUDITOR.public_key, reason="gone"))
    gate.judge(signed(appointment(AUDITOR.public_key)))
    assert outcomes(gate, signed(verdict(slot=1), AUDITOR), dismissal) == ["accepted", "accepted"]
    assert outcomes(gate, signed(verdict(slot=2), AUDITOR)) == ["ignored"]
    newcomer = Gate(RUN, OWNER.public_key)
    for message in (dismissal, *gate.newest()):
        newcomer.judge(message)
    assert outcomes(newcomer, signed(verdict(slot=2), AUDITOR)) == ["ignored"]


def test_old_rounds_are_stale_and_rounds_are_counted_by_the_coordinator_alone(gate: Gate) -> None:
    gate.judge(signed(plan(round=1000), STRANGER))
    assert gate.newest_round is None
    gate.judge(signed(plan(round=100)))
    inside, outside = 100 - ROUNDS_BACK, 100 - ROUNDS_BACK - 1
    assert outcomes(gate, signed(manifest(inside)), signed(manifest(outside))) == ["accepted", "stale"]
    gate.judge(signed(appointment(AUDITOR.public_key)))
    late, too_late = 100 - VERDICT_ROUNDS_BACK, 100 - VERDICT_ROUNDS_BACK - 1
    assert outcomes(gate, signed(verdict(late), AUDITOR), signed(verdict(too_late), AUDITOR)) == ["accepted", "stale"]
    assert outcomes(gate, signed(verdict(101), AUDITOR)) == ["ignored"]


def test_heads_behind_the_last_ones_are_stale(gate: Gate) -> None:
    for size in range(10, 10 + HEADS_BACK):
        assert outcomes(gate, signed(head(size))) == ["accepted"]
    assert outcomes(gate, signed(head(9)), signed(head(10 + HEADS_BACK))) == ["stale", "accepted"]


@pytest.mark.parametrize(
    ("first", "second"), [(manifest(), manifest(root=RUN)), (plan(), plan(cursor=5)), (head(7), head(7, RUN))]
)
def test_two_records_under_one_name_are_noticed_with_both_at_hand(gate: Gate, first: Record, second: Record) -> None:
    gate.judge(signed(first))
    decision = gate.judge(signed(second))
    assert decision.outcome is Outcome.CONFLICT
    assert decision.conflict == signed(first)
    assert outcomes(gate, signed(first)) == ["duplicate"]


def test_a_proof_is_passed_on_whoever_hands_it_in_and_once_per_name(gate: Gate) -> None:
    one = proof(OWNER, manifest(), manifest(root=RUN))
    assert outcomes(gate, one, one) == ["accepted", "duplicate"]
    assert outcomes(gate, proof(OWNER, manifest(), manifest(root=RUN), reporter=NODE)) == ["duplicate"]
    assert one in gate.newest()


def test_proofs_about_keys_that_take_no_part_go_nowhere(gate: Gate) -> None:
    assert outcomes(gate, proof(NODE, head(1), head(1, RUN))) == ["ignored"]
    gate.judge(signed(plan()))
    assert outcomes(gate, proof(NODE, head(1), head(1, RUN))) == ["accepted"]
    assert outcomes(gate, proof(STRANGER, head(1), head(1, RUN))) == ["ignored"]


def test_a_newcomer_gets_appointments_proofs_and_the_newest_of_what_moves(gate: Gate) -> None:
    for number in range(5):
        for record in (plan(number), manifest(number), head(number)):
            gate.judge(signed(record))
    lasting = [signed(appointment(AUDITOR.public_key)), proof(OWNER, plan(2), plan(2, cursor=1))]
    for message in lasting:
        gate.judge(message)
    gate.judge(signed(plan(3)))
    expected = {signed(plan(4)), signed(manifest(4)), signed(head(4)), *lasting}
    assert set(gate.newest()) == expected
    other = Gate(RUN, OWNER.public_key)
    assert {other.judge(message).outcome for message in gate.newest()} == {Outcome.ACCEPTED}


def test_records_are_kept_by_hash_within_a_bound(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MAX_KEPT_BYTES", 3 * len(signed(head(1000))))
    for size in range(1000, 1010):
        gate.judge(signed(head(size)))
    assert [size for size in range(1000, 1010) if gate.kept(head(size).hash) is not None] == [1007, 1008, 1009]
    assert gate.kept(head(1009).hash) == signed(head(1009))


def test_what_was_judged_is_bounded_and_names_outlast_a_flood_of_garbage(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "MAX_NAMES", 8)
    gate.judge(signed(plan()))
    for number in range(100):
        gate.judge(number.to_bytes(4, "big"))
    assert outcomes(gate, signed(plan())) == ["duplicate"]


@given(st.binary(max_size=300))
def test_no_bytes_raise_or_are_accepted(data: bytes) -> None:
    assert Gate(RUN, OWNER.public_key).judge(data).outcome is Outcome.INVALID


@given(st.data())
def test_a_change_of_any_byte_of_a_signed_record_is_never_accepted(data: Any) -> None:
    message = bytearray(signed(plan()))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] ^= data.draw(st.integers(1, 255))
    assert Gate(RUN, OWNER.public_key).judge(bytes(message)).outcome is not Outcome.ACCEPTED


@given(
    st.lists(st.tuples(st.sampled_from(["plan", "manifest", "head"]), st.integers(0, 40), st.booleans()), max_size=60)
)
def test_in_whatever_order_they_come_at_most_one_record_of_a_name_is_accepted(
    steps: list[tuple[str, int, bool]],
) -> None:
    make: dict[str, Callable[[int, bool], Record]] = {
        "plan": lambda number, other: plan(number, cursor=int(other)),
        "manifest": lambda number, other: manifest(number, root=RUN if other else ZERO),
        "head": lambda number, other: head(number, RUN if other else ZERO),
    }
    gate, accepted, newest = Gate(RUN, OWNER.public_key), set(), -1
    for kind, number, other in steps:
        decision = gate.judge(signed(make[kind](number, other)))
        if decision.outcome is Outcome.ACCEPTED:
            assert (kind, number) not in accepted
            accepted.add((kind, number))
            if kind != "head":
                assert number >= newest - ROUNDS_BACK
                newest = max(newest, number)


def test_every_kind_is_either_announced_or_refused() -> None:
    announced = {one.kind for one in (*validation.OWNERS_KINDS, *validation.AUDITORS_KINDS)} | {"equivocation"}
    assert announced < set(KINDS)
    assert announced.isdisjoint({"commitment", "ready", "registration", "addresses", "transport-key", "part-record"})


# Neighbours


def test_a_neighbour_may_say_so_much_at_once_and_then_so_much_a_second() -> None:
    standings = Standings()
    allowed = sum(standings.heard("a", 0.0) for _ in range(1000))
    assert allowed == MESSAGES_AT_ONCE
    assert sum(standings.heard("b", 0.0) for _ in range(3)) == 3
    assert sum(standings.heard("a", 1.0) for _ in range(1000)) == MESSAGES_PER_S


def test_a_flood_ends_in_a_ban_which_ends_in_time() -> None:
    standings = Standings()
    while standings.heard("a", 0.0) or not standings.to_drop("a", 0.0):
        pass
    assert standings.is_banned("a", 1.0)
    assert not standings.is_banned("b", 1.0)
    assert not standings.is_banned("a", BANNED_S)


def test_a_few_invalid_messages_are_enough_and_duplicates_never_are() -> None:
    standings = Standings()
    for _ in range(10_000):
        standings.note("honest", Outcome.DUPLICATE, 0.0)
    assert standings.score("honest", 0.0) == 0.0
    sent = 0
    while not standings.to_drop("hostile", 0.0):
        standings.note("hostile", Outcome.INVALID, 0.0)
        sent += 1
    assert sent == -WORST_SCORE / validation.PENALTY[Outcome.INVALID]


def test_a_score_recovers_with_time_and_is_not_made_better_by_coming_again() -> None:
    standings = Standings()
    standings.note("a", Outcome.INVALID, 0.0)
    assert standings.score("a", 1.0) == -10.0 + validation.RECOVERY_PER_S
    assert standings.score("a", 1e6) == 0.0


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.floats(-10, 1000), st.sampled_from(list(Outcome))), max_size=50)
)
def test_scores_never_exceed_zero_and_clocks_that_go_back_gain_nothing(
    steps: list[tuple[str, float, Outcome]],
) -> None:
    standings = Standings()
    for peer, now_s, outcome in steps:
        before = standings.score(peer, now_s)
        standings.note(peer, outcome, now_s)
        assert standings.score(peer, now_s) <= before <= 0.0
        assert 0.0 <= standings.neighbours[peer].allowance <= MESSAGES_AT_ONCE


def test_what_is_kept_of_neighbours_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MAX_NEIGHBOURS", 5)
    standings = Standings()
    for number in range(100):
        standings.heard(str(number), 0.0)
        standings.punish(str(number), 1000.0, 0.0)
        assert standings.to_drop(str(number), 0.0)
        standings.heard(f"new {number}", 0.0)
    assert len(standings.neighbours) <= 5
    assert len(standings.banned_until_s) <= 5
