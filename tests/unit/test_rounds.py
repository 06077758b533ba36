"""The round state machine: single transitions as examples, and what holds for any order of events."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_coordinator.db.machine_codec import decode_event, decode_state, encode_event, encode_state
from swarm_coordinator.round_events import (
    Committed,
    Effect,
    Event,
    Finish,
    NodeGone,
    NodeReady,
    Opened,
    PartHeld,
    PartPublished,
    PublishCommitmentSet,
    PublishManifest,
    PublishPlan,
    RequestRoot,
    Resumed,
    RevealBeacon,
    Rooted,
    Sketched,
    Tick,
)
from swarm_coordinator.rounds import Phase, Policy, State, advance, with_counts

BASE = bytes(32)
PEERS = [bytes([number]) * 32 for number in range(1, 6)]
POLICY = Policy(
    run=b"r" * 32,
    rounds=2,
    parts=2,
    min_nodes=2,
    max_nodes=3,
    presence_ms=10_000,
    assemble_ms=5_000,
    train_ms=20_000,
    exchange_ms=8_000,
    open_ms=2_000,
    steps=10,
    fixed_steps=True,
    batch_sequences=4,
    tokens_per_step=64,
    weight_cap_tokens=512,
    weight_after=0,
    aggregator="mean",
)


BY_DISTANCE = replace(POLICY, aggregator="geometric_median")
"""A policy under which every round needs sketches."""


def name(*numbers: int) -> bytes:
    return bytes(numbers).ljust(32, b"\0")


class Machine:
    """A state, its clock, and every effect so far."""

    def __init__(self, policy: Policy = POLICY) -> None:
        self.state = State(policy, BASE)
        self.now_ms = 1_000_000
        self.effects: list[Effect] = []

    def give(self, *events: Event, after_ms: int = 0) -> list[Effect]:
        self.now_ms += after_ms
        new: list[Effect] = []
        for event in events:
            self.state, effects = advance(self.state, event, self.now_ms)
            assert self.state == with_counts(self.state)
            new += effects
        self.effects += new
        return new

    def ready(self, peer: bytes, **changes: object) -> NodeReady:
        event = NodeReady(peer, self.state.round, self.state.base, 1000.0, can_reduce=True, accepted=0)
        return replace(event, **changes)  # type: ignore[arg-type]

    def to_training(self, peers: int = 2) -> PublishPlan:
        self.give(*(self.ready(peer) for peer in PEERS[:peers]))
        plan = self.effects[-1] if self.state.phase is Phase.TRAINING else self.give(Tick(), after_ms=5_000)[-1]
        assert isinstance(plan, PublishPlan)
        return plan

    def to_exchanging(self, peers: int = 2) -> None:
        self.to_training(peers)
        self.give(*(Committed(slot, name(1, slot)) for slot in range(peers)))
        assert self.state.phase is Phase.EXCHANGING

    def to_sealing(self) -> RequestRoot:
        self.to_exchanging()
        for part in range(2):
            self.give(PartPublished(name(2, part), part, PEERS[0], (0, 1)), PartHeld(name(2, part)))
        request = self.effects[-1]
        assert isinstance(request, RequestRoot)
        return request

    def to_opening(self, root: bytes = name(3)) -> None:
        self.give(Rooted(self.to_sealing().parts, root))
        assert self.state.phase is Phase.OPENING


def test_a_round_is_planned_once_enough_nodes_waited_for_more() -> None:
    machine = Machine()
    assert not machine.give(machine.ready(PEERS[1]), machine.ready(PEERS[0]))
    assert not machine.give(Tick(), after_ms=4_999)
    (plan,) = machine.give(Tick(), after_ms=1)
    assert isinstance(plan, PublishPlan)
    assert [seat.peer for seat in plan.roster] == PEERS[:2]
    assert plan.commit_by_ms == machine.now_ms + 20_000
    assert plan.exchange_by_ms == machine.now_ms + 28_000


def test_a_full_house_is_not_waited_with() -> None:
    machine = Machine()
    effects = machine.give(*(machine.ready(peer) for peer in PEERS[:3]))
    assert [type(effect) for effect in effects] == [PublishPlan]


def test_a_node_not_heard_of_lately_gets_no_slot() -> None:
    machine = Machine(replace(POLICY, assemble_ms=30_000))
    machine.give(machine.ready(PEERS[0]), machine.ready(PEERS[1]))
    machine.give(Tick(), after_ms=10_001)
    assert machine.state.phase_ends_ms is None
    for _ in range(4):
        machine.give(machine.ready(PEERS[2]), machine.ready(PEERS[3]), after_ms=9_000)
    (plan,) = machine.give(Tick(), after_ms=3_000)
    assert isinstance(plan, PublishPlan)
    assert [seat.peer for seat in plan.roster] == PEERS[2:4]


def test_a_node_with_another_checkpoint_gets_no_slot() -> None:
    machine = Machine()
    machine.give(machine.ready(PEERS[0]), machine.ready(PEERS[1], base=name(9)), machine.ready(PEERS[2], round=1))
    assert machine.state.phase_ends_ms is None


def test_where_too_many_are_ready_the_lowest_lots_get_the_slots() -> None:
    rosters = set()
    for run in (b"r" * 32, b"s" * 32):
        machine = Machine(replace(POLICY, run=run, max_nodes=2))
        machine.to_opening()
        machine.give(*(machine.ready(peer, round=1, base=name(3)) for peer in PEERS))
        plan = machine.give(Tick(), after_ms=2_000)[-1]
        assert isinstance(plan, PublishPlan)
        assert len(plan.roster) == 2
        rosters.add(tuple(seat.peer for seat in plan.roster))
    assert len(rosters) == 2


@pytest.mark.parametrize(("speed", "steps"), [(1e9, 10), (24.0, 6), (0.001, 1)])
def test_steps_follow_the_declared_speed_within_the_spec(speed: float, steps: int) -> None:
    machine = Machine(replace(POLICY, fixed_steps=False, max_nodes=2))
    (plan,) = machine.give(machine.ready(PEERS[0], tokens_per_s=speed), machine.ready(PEERS[1]))
    assert isinstance(plan, PublishPlan)
    assert plan.roster[0].steps == steps
    assert plan.roster[0].weight == min(steps * 64, 512)


def test_an_identity_weighs_nothing_before_its_first_contributions_were_accepted() -> None:
    machine = Machine(replace(POLICY, weight_after=3, max_nodes=2))
    (plan,) = machine.give(machine.ready(PEERS[0], accepted=2), machine.ready(PEERS[1], accepted=3, can_reduce=False))
    assert isinstance(plan, PublishPlan)
    assert [(seat.weight, seat.reducer) for seat in plan.roster] == [(0, True), (512, False)]


def test_contributions_close_when_all_have_committed() -> None:
    machine = Machine()
    machine.to_training()
    assert not machine.give(Committed(1, name(1, 1)))
    assert machine.give(Committed(0, name(1, 0))) == [PublishCommitmentSet(0, ((0, name(1, 0)), (1, name(1, 1))))]


def test_contributions_close_at_the_deadline_without_those_who_are_late() -> None:
    machine = Machine()
    machine.to_training()
    machine.give(Committed(1, name(1, 1)))
    assert machine.give(Tick(), after_ms=20_000) == [PublishCommitmentSet(0, ((1, name(1, 1)),))]
    assert not machine.give(Committed(0, name(1, 0)))


def test_a_second_commitment_for_a_slot_changes_nothing() -> None:
    machine = Machine()
    machine.to_training()
    machine.give(Committed(1, name(1, 1)), Committed(1, name(7)), Committed(0, name(1, 0)))
    assert dict(machine.state.commitments) == {0: name(1, 0), 1: name(1, 1)}


def test_who_lost_its_standing_is_not_waited_for_and_does_not_count() -> None:
    machine = Machine()
    machine.to_training(3)
    machine.give(Committed(0, name(1, 0)), Committed(1, name(1, 1)), NodeGone(PEERS[1]))
    assert machine.give(NodeGone(PEERS[2])) == [PublishCommitmentSet(0, ((0, name(1, 0)),))]


def test_a_round_without_contributions_goes_through_with_all_parts_missing() -> None:
    machine = Machine()
    machine.to_training()
    assert machine.give(Tick(), after_ms=20_000) == [PublishCommitmentSet(0, ()), RequestRoot(0, (None, None))]
    assert machine.give(Rooted((None, None), name(3))) == [
        PublishManifest(0, (None, None), BASE, name(3)),
        RevealBeacon(0, ()),
    ]
    assert (machine.state.round, machine.state.base, machine.state.cursor) == (1, name(3), 80)


def test_the_exchange_closes_once_every_part_is_held_over_all_contributions() -> None:
    machine = Machine()
    machine.to_exchanging()
    machine.give(PartPublished(name(2, 0), 0, PEERS[0], (0, 1)), PartPublished(name(2, 1), 1, PEERS[1], (0, 1)))
    assert not machine.give(PartHeld(name(2, 0)))
    assert machine.give(PartHeld(name(2, 1))) == [RequestRoot(0, (name(2, 0), name(2, 1)))]


def test_of_several_averages_of_a_part_the_held_one_over_the_most_contributions_counts() -> None:
    machine = Machine()
    machine.to_exchanging(3)
    for number, (reducer, slots) in enumerate([(0, (0,)), (1, (0, 2)), (2, (0, 1, 2))]):
        machine.give(PartPublished(name(2, number), 0, PEERS[reducer], slots))
    machine.give(PartHeld(name(2, 0)), PartHeld(name(2, 1)))
    assert machine.give(Tick(), after_ms=8_000) == [RequestRoot(0, (name(2, 1), None))]


def test_reducers_can_be_reached_and_have_standing_as_soon_as_anybody_has() -> None:
    machine = Machine(replace(POLICY, weight_after=2, max_nodes=4, min_nodes=4))
    offers = [{"can_reduce": False, "accepted": 5}, {"accepted": 1}, {"accepted": 0}, {}]
    machine.give(*(machine.ready(peer, **offer) for peer, offer in zip(PEERS, offers, strict=False)))
    (plan,) = [effect for effect in machine.effects if isinstance(effect, PublishPlan)]
    assert {seat.peer for seat in plan.roster if seat.reducer} == set(PEERS[1:4])

    machine = Machine(replace(POLICY, weight_after=2, max_nodes=4, min_nodes=4))
    offers[2] = {"accepted": 2, "upload_bytes_per_s": 7}
    machine.give(*(machine.ready(peer, **offer) for peer, offer in zip(PEERS, offers, strict=False)))
    (plan,) = [effect for effect in machine.effects if isinstance(effect, PublishPlan)]
    assert [(seat.peer, seat.upload_bytes_per_s) for seat in plan.roster if seat.reducer] == [(PEERS[2], 7)]


@pytest.mark.parametrize(
    "event",
    [
        PartPublished(name(8), 2, PEERS[0], (0, 1)),
        PartPublished(name(8), 0, PEERS[3], (0, 1)),
        PartPublished(name(8), 0, PEERS[0], (1, 0)),
        PartPublished(name(8), 0, PEERS[0], (0, 0)),
        PartPublished(name(8), 0, PEERS[0], (0, 2)),
        PartPublished(name(8), 0, PEERS[0], ()),
        PartHeld(name(8)),
        Committed(0, name(8)),
        Opened(0, name(8)),
        Rooted((None, None), name(8)),
        NodeReady(PEERS[0], 1, BASE, 1.0, True, 0),
    ],
)
def test_what_does_not_fit_the_exchange_leaves_it_as_it_was(event: Event) -> None:
    machine = Machine()
    machine.to_exchanging()
    before = machine.state
    machine.give(event)
    assert (machine.state.averages, machine.state.commitments, machine.state.phase) == (
        before.averages,
        before.commitments,
        before.phase,
    )


def test_the_exchange_closes_once_every_part_is_held_over_all_that_were_selected() -> None:
    machine = Machine(BY_DISTANCE)
    machine.to_exchanging(3)
    early = PartPublished(name(8), 0, PEERS[0], (0, 2))
    assert not machine.give(early, Sketched(name(6), (0, 2)))
    assert (machine.state.sketch_set, machine.state.averages) == (name(6), ())
    machine.give(PartPublished(name(7), 0, PEERS[0], (0, 1)))
    assert not machine.state.averages
    machine.give(PartPublished(name(2, 0), 0, PEERS[0], (0, 2)), PartPublished(name(2, 1), 1, PEERS[1], (0, 2)))
    (request,) = machine.give(PartHeld(name(2, 0)), PartHeld(name(2, 1)))
    assert request == RequestRoot(0, (name(2, 0), name(2, 1)))
    (manifest,) = machine.give(Rooted(request.parts, name(3)))
    assert manifest == PublishManifest(0, request.parts, BASE, name(3), name(6))
    machine.give(Tick(), after_ms=2_000)
    assert (machine.state.sketch_set, machine.state.selected) == (None, ())


def test_a_sketch_set_counts_once_and_only_where_it_is_needed() -> None:
    machine = Machine(BY_DISTANCE)
    machine.to_exchanging(3)
    machine.give(Sketched(name(5), (0, 3)), Sketched(name(6), (0, 1)), Sketched(name(7), (2,)))
    assert (machine.state.sketch_set, machine.state.selected) == (name(6), (0, 1))
    plain = Machine()
    plain.to_exchanging()
    plain.give(Sketched(name(6), (0,)))
    assert plain.state.sketch_set is None


def test_multi_krum_needs_sketches_from_seven_slots_with_weight_on() -> None:
    peers = [bytes([number]) * 32 for number in range(1, 9)]
    for strangers in (1, 2):  # who is new has no weight yet
        machine = Machine(replace(POLICY, aggregator="multi_krum", max_nodes=8, weight_after=1))
        machine.give(*(machine.ready(peer, accepted=int(index >= strangers)) for index, peer in enumerate(peers)))
        machine.give(*(Committed(slot, name(1, slot)) for slot in range(8)))
        assert machine.state.needs_sketches is (strangers == 1)


def test_a_root_for_other_parts_seals_nothing() -> None:
    machine = Machine()
    request = machine.to_sealing()
    assert not machine.give(Rooted((None, None), name(3)), Tick(), after_ms=10**6)
    assert machine.give(Rooted(request.parts, name(3))) == [PublishManifest(0, request.parts, BASE, name(3))]


def test_the_beacon_is_revealed_once_all_have_opened_and_the_next_round_begins() -> None:
    machine = Machine()
    machine.to_opening()
    assert not machine.give(Opened(1, name(5, 1)), Opened(1, name(6)))
    assert machine.give(Opened(0, name(5, 0))) == [RevealBeacon(0, ((0, name(5, 0)), (1, name(5, 1))))]
    assert (machine.state.round, machine.state.phase) == (1, Phase.ASSEMBLING)


def test_the_beacon_is_revealed_at_the_deadline_without_those_who_are_late() -> None:
    machine = Machine()
    machine.to_opening()
    machine.give(Opened(1, name(5, 1)))
    assert machine.give(Tick(), after_ms=2_000) == [RevealBeacon(0, ((1, name(5, 1)),))]


def test_the_next_round_starts_as_soon_as_all_of_the_last_one_are_back() -> None:
    machine = Machine()
    machine.to_opening()
    machine.give(machine.ready(PEERS[0], round=1, base=name(3)))
    machine.give(Opened(0, name(5)), Opened(1, name(5)))
    (plan,) = machine.give(machine.ready(PEERS[1]))
    assert isinstance(plan, PublishPlan)
    assert (plan.round, plan.base, plan.cursor, len(plan.roster)) == (1, name(3), 80, 2)


def test_the_next_round_starts_without_one_that_stays_away() -> None:
    machine = Machine(replace(POLICY, min_nodes=1))
    machine.to_opening()
    machine.give(Opened(0, name(5)), Opened(1, name(5)))
    assert not machine.give(machine.ready(PEERS[0]))
    assert [type(effect) for effect in machine.give(Tick(), after_ms=5_000)] == [PublishPlan]


def test_the_run_finishes_after_its_last_round() -> None:
    machine = Machine(replace(POLICY, rounds=1))
    machine.to_opening()
    assert machine.give(Tick(), after_ms=2_000) == [RevealBeacon(0, ()), Finish()]
    before = machine.state
    assert not machine.give(machine.ready(PEERS[0]), Tick(), after_ms=10**6)
    assert machine.state is before


def test_time_that_the_coordinator_was_away_for_is_given_back() -> None:
    machine = Machine()
    machine.to_training()
    assert not machine.give(Resumed(60_000), Tick(), after_ms=60_000)
    assert machine.give(Tick(), after_ms=20_000)[0] == PublishCommitmentSet(0, ())


def test_time_that_changes_nothing_gives_back_the_same_state() -> None:
    machine = Machine()
    machine.to_training()
    assert advance(machine.state, Tick(), machine.now_ms + 1)[0] is machine.state


ORDER = [PublishPlan, PublishCommitmentSet, RequestRoot, PublishManifest, RevealBeacon]
Moves = list[tuple[str, int, int, int]]
moves = st.lists(
    st.tuples(
        st.sampled_from(
            ["ready", "gone", "commit", "select", "publish", "hold", "root", "open", "tick", "resume", "replay"]
        ),
        st.integers(-1, 5),
        st.integers(-1, 3),
        st.integers(0, 12_000),
    ),
    max_size=120,
)


def event_of(state: State, kind: str, a: int, b: int, given_so_far: list[Event]) -> Event:
    """Something that may or may not fit the state."""
    peer = PEERS[a % len(PEERS)]
    match kind:
        case "ready":
            base = BASE if b == 3 else (state.root or state.base) if b == 2 else state.base
            return NodeReady(peer, state.round + (b == 2), base, 10.0 * (a + 2), b != 1, 0)
        case "gone" if b == 3:
            return NodeGone(peer)
        case "commit":
            return Committed(a, name(1, a + 1, b + 1))
        case "select":
            return Sketched(name(6, a + 1), state.committed if b else state.committed[1:])
        case "publish":
            return PartPublished(name(2, a + 1, b + 1), b, peer, state.committed if a % 2 else state.committed[:1])
        case "hold":
            return PartHeld(name(2, a + 1, b + 1))
        case "root":
            return Rooted(state.parts if b else (None,), name(3, state.round + 1))
        case "open":
            return Opened(a, name(5, b + 1))
        case "resume":
            return Resumed(b * 100)
        case "replay" if given_so_far:
            return given_so_far[(a * 7 + b) % len(given_so_far)]
        case _:
            return Tick()


def play(script: Moves, policy: Policy = POLICY) -> tuple[Machine, list[tuple[Event, int]]]:
    machine = Machine(policy)
    given: list[tuple[Event, int]] = []
    for kind, a, b, passed_ms in script:
        event = event_of(machine.state, kind, a, b, [event for event, _ in given])
        machine.give(event, after_ms=passed_ms)
        given.append((event, machine.now_ms))
    return machine, given


def finish(machine: Machine) -> None:
    """What nobody can prevent: time passes, two fresh nodes come, and the checkpoint worker answers."""
    fresh = [bytes([number]) * 32 for number in (200, 201)]
    for _ in range(8 * POLICY.rounds):
        if machine.state.phase is Phase.ASSEMBLING:
            machine.give(*(machine.ready(peer) for peer in fresh))
            machine.give(Tick(), after_ms=POLICY.assemble_ms)
        elif machine.state.phase is Phase.SEALING:
            machine.give(Rooted(machine.state.parts, name(4, machine.state.round)))
        else:
            machine.give(Tick(), after_ms=POLICY.train_ms)


@settings(max_examples=150, deadline=None)
@given(moves, st.sampled_from([POLICY, BY_DISTANCE]))
def test_a_run_ends_whatever_happened_before(script: Moves, policy: Policy) -> None:
    machine, _ = play(script, policy)
    finish(machine)
    assert machine.state.phase is Phase.FINISHED
    assert machine.state.round == POLICY.rounds


@settings(max_examples=150, deadline=None)
@given(moves, st.sampled_from([POLICY, BY_DISTANCE]))
def test_effects_come_once_per_round_and_in_order(script: Moves, policy: Policy) -> None:
    machine, _ = play(script, policy)
    finish(machine)
    *steps, last = machine.effects
    assert last == Finish()
    expected = [(number, kind) for number in range(POLICY.rounds) for kind in ORDER]
    assert [(effect.round, type(effect)) for effect in steps if not isinstance(effect, Finish)] == expected


@settings(max_examples=150, deadline=None)
@given(moves)
def test_no_contribution_counts_twice(script: Moves) -> None:
    machine, _ = play(script)
    finish(machine)
    plans = [effect for effect in machine.effects if isinstance(effect, PublishPlan)]
    sets = [effect for effect in machine.effects if isinstance(effect, PublishCommitmentSet)]
    cursor = 0
    for plan, closing in zip(plans, sets, strict=True):
        slots = [slot for slot, _ in closing.commitments]
        peers = [seat.peer for seat in plan.roster]
        assert slots == sorted(set(slots))
        assert all(0 <= slot < len(plan.roster) for slot in slots)
        assert peers == sorted(set(peers))
        assert plan.cursor == cursor
        cursor += 4 * sum(seat.steps for seat in plan.roster)


@settings(max_examples=60, deadline=None)
@given(moves, st.sampled_from([POLICY, BY_DISTANCE]))
def test_the_same_events_at_the_same_times_give_the_same_run_also_from_a_stored_state(
    script: Moves, policy: Policy
) -> None:
    machine, given = play(script, policy)
    state = State(policy, BASE)
    for event, at_ms in given:
        state, _ = advance(decode_state(encode_state(state)), decode_event(encode_event(event)), at_ms)
    assert state == machine.state
