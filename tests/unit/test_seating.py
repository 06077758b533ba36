"""Who gets a slot: the queue of those on probation, and what the run owner's pause and stop do to the rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_coordinator import seating
from swarm_coordinator.db.machine_codec import decode_state, encode_state
from swarm_coordinator.round_events import Effect, Event, Finish, NodeReady, Pause, PublishPlan, Rooted, Stop, Tick
from swarm_coordinator.rounds import Phase, Policy, State, advance, ready_peers

POLICY = Policy(
    run=b"r" * 32,
    rounds=1000,
    parts=1,
    min_nodes=1,
    max_nodes=12,
    presence_ms=10**9,
    assemble_ms=1000,
    train_ms=1000,
    exchange_ms=1000,
    open_ms=1000,
    steps=10,
    fixed_steps=True,
    batch_sequences=4,
    tokens_per_step=64,
    weight_cap_tokens=640,
    weight_after=0,
    aggregator="mean",
    budget=0.25,
    turn=4,
)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


class Run:
    """A run in which everybody is always ready, and rounds go by without contributions."""

    def __init__(self, policy: Policy = POLICY) -> None:
        self.state = State(policy, bytes(32))
        self.now_ms = 0

    def give(self, *events: Event, after_ms: int = 0) -> list[Effect]:
        self.now_ms += after_ms
        found: list[Effect] = []
        for event in events:
            self.state, effects = advance(self.state, event, self.now_ms)
            found += effects
        assert decode_state(encode_state(self.state)) == self.state
        return found

    def ready(self, number: int, *, trusted: bool = False, speed: float = 1e9) -> NodeReady:
        return NodeReady(
            key(number), self.state.round, self.state.base, speed, True, 0, trusted=trusted, since=1000 - number
        )

    def roster(self, *events: NodeReady) -> PublishPlan:
        """The plan of a round for which these are ready; the round is over afterwards."""
        effects = self.give(Pause(True), *events, Pause(False))
        effects += self.give(Tick(), after_ms=POLICY.assemble_ms)
        (plan,) = [effect for effect in effects if isinstance(effect, PublishPlan)]
        self.finish_round()
        return plan

    def finish_round(self) -> list[Effect]:
        """Nobody commits to anything."""
        self.give(Tick(), after_ms=POLICY.train_ms)
        return self.give(Rooted(self.state.parts, key(self.state.round + 1)))


def seats(plan: PublishPlan) -> set[int]:
    return {int.from_bytes(seat.peer, "big") for seat in plan.roster}


def test_newcomers_get_as_many_slots_as_their_whole_audits_fit_the_budget() -> None:
    run = Run()
    trusted = range(1, 7)
    plan = run.roster(*(run.ready(n, trusted=True) for n in trusted), *(run.ready(n) for n in range(100, 110)))
    assert seats(plan) == {*trusted, 109, 108}  # 2 of 8 is a quarter; those that registered first


def test_with_the_whole_budget_nobody_queues() -> None:
    run = Run(replace(POLICY, budget=1.0, min_nodes=2))
    plan = run.roster(*(run.ready(n) for n in range(100, 108)), run.ready(1, trusted=True))
    assert len(plan.roster) == 9
    assert not run.state.served


def test_a_run_starts_where_everybody_is_new() -> None:
    run = Run(replace(POLICY, min_nodes=3))
    assert seats(run.roster(*(run.ready(n) for n in range(100, 110)))) == {109, 108, 107}


def test_a_queue_before_the_door_does_not_make_the_house_full() -> None:
    run = Run()
    run.give(*(run.ready(n) for n in range(100, 150)))
    run.give(run.ready(1, trusted=True))
    assert run.state.phase is Phase.ASSEMBLING


def test_where_all_slots_are_taken_by_trusted_nodes_one_is_left_to_the_queue() -> None:
    run = Run(replace(POLICY, max_nodes=3, budget=0.01))
    plan = run.roster(*(run.ready(n, trusted=True) for n in range(1, 9)), run.ready(100), run.ready(101))
    assert len(plan.roster) == 3
    assert seats(plan) & {100, 101} == {101}


def test_who_uses_its_turn_up_goes_behind_those_who_have_not() -> None:
    run = Run(replace(POLICY, budget=0.01))
    first = [seats(run.roster(run.ready(100), run.ready(101), run.ready(102))) for _ in range(3 * POLICY.turn)]
    assert first == [{n} for n in (102, 101, 100) for _ in range(POLICY.turn)]


budgets = st.sampled_from([0.01, 0.1, 0.25, 0.29, 0.3, 0.5, 0.75, 0.9, 0.99])
nodes = st.lists(st.tuples(st.booleans(), st.sampled_from([1e9, 300.0, 1.0])), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(budgets, nodes, st.integers(1, 12), st.integers(1, 3))
def test_the_budget_holds_and_the_queue_is_first_come_first_served(
    budget: float, those: list[tuple[bool, float]], max_nodes: int, min_nodes: int
) -> None:
    policy = replace(POLICY, budget=budget, max_nodes=max(max_nodes, min_nodes), min_nodes=min_nodes, fixed_steps=False)
    run = Run(policy)
    run.give(Pause(True), *(run.ready(n, trusted=trusted, speed=speed) for n, (trusted, speed) in enumerate(those)))
    ready = ready_peers(run.state, run.now_ms)
    chosen = seating.seated(run.state, ready)
    assert len({node.peer for node in chosen}) == len(chosen) <= policy.max_nodes
    assert len(chosen) >= min(policy.min_nodes, len(ready))
    new = [node for node in chosen if not node.offer or not node.offer.trusted]
    queue = seating.queue(run.state, ready)
    assert new == queue[: len(new)]
    assert len(new) >= min(1, len(queue))
    tokens = [seating.steps(policy, node.offer) * 64 for node in chosen if node.offer and node.offer.trusted]
    if len(new) > max(1, policy.min_nodes - len(tokens)):
        assert len(new) * policy.standard_tokens <= int(budget * (sum(tokens) + len(new) * policy.standard_tokens))
    assert seating.most(run.state) >= len(chosen)


@settings(max_examples=40, deadline=None)
@given(budgets, st.integers(0, 6), st.integers(1, 10))
def test_nobody_waits_for_ever_whatever_those_ahead_do(budget: float, trusted: int, newcomers: int) -> None:
    run = Run(replace(POLICY, budget=budget))
    seen: set[int] = set()
    for _ in range(POLICY.turn * newcomers):
        plan = run.roster(
            *(run.ready(n, trusted=True) for n in range(1, trusted + 1)),
            *(run.ready(n) for n in range(100, 100 + newcomers)),
        )
        seen |= seats(plan)
    assert seen >= set(range(100, 100 + newcomers))


def test_while_paused_no_round_begins_and_the_one_under_way_ends() -> None:
    run = Run()
    run.give(run.ready(1, trusted=True))
    run.give(Tick(), after_ms=1000)
    run.give(Pause(True))
    run.finish_round()
    assert (run.state.phase, run.state.round, run.state.paused) == (Phase.ASSEMBLING, 1, True)
    assert not run.give(run.ready(1, trusted=True), Tick(), after_ms=10**6)
    assert [type(effect) for effect in run.give(Pause(False))] == [PublishPlan]


@pytest.mark.parametrize("paused", [False, True])
def test_a_run_that_is_stopped_ends_after_the_round_under_way(paused: bool) -> None:
    run = Run()
    run.give(run.ready(1, trusted=True))
    run.give(Tick(), after_ms=1000)
    assert not run.give(Stop("stopped by the run owner"), Pause(paused), Stop("again"))
    assert run.finish_round()[-1] == Finish("stopped by the run owner")
    assert (run.state.phase, run.state.round) == (Phase.FINISHED, 1)
    assert not run.give(run.ready(1), Pause(True), Stop("again"), Tick(), after_ms=10**6)
    assert run.state.stopping == "stopped by the run owner"


def test_a_run_that_waits_for_nodes_stops_at_once() -> None:
    assert Run().give(Stop("enough")) == [Finish("enough")]
