"""A run's rounds as a pure state machine: `advance(state, event, now_ms) -> (state, effects)`.

No I/O, no clock, no database. The shell turns accepted records into events and effects into signed records. What holds
whatever the order of events, and however often one comes: a round ends if time passes and the checkpoint worker answers;
each effect comes once per round and in order; a slot counts once; who vanishes is waited for until the phase's end at most.

    assembling -> training -> exchanging -> sealing -> opening -> assembling of the next round ... -> finished

Most events cost O(log n) in a round of n slots: maps are persistent (hash array mapped tries), and counts say whether looking
at everybody may be worth it. Who has silently gone is noticed by the next `Tick`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from immutables import Map

from swarm_coordinator import seating
from swarm_coordinator.round_events import (
    ALL_DONE,
    Committed,
    Effect,
    Event,
    Finish,
    NodeGone,
    NodeReady,
    Opened,
    PartHeld,
    PartPublished,
    Pause,
    PublishCommitmentSet,
    PublishManifest,
    PublishPlan,
    RequestRoot,
    Resumed,
    RevealBeacon,
    Rooted,
    Seen,
    Sketched,
    Stop,
)
from swarm_protocol import aggregate, sketching
from swarm_protocol.records import Seat
from swarm_protocol.spec import RunSpec


class Phase(StrEnum):
    ASSEMBLING = "assembling"
    TRAINING = "training"
    EXCHANGING = "exchanging"
    SEALING = "sealing"
    OPENING = "opening"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Policy:
    """What the machine needs of a RunSpec. After `turn` slots somebody still on probation goes behind others in the queue."""

    run: bytes
    rounds: int
    parts: int
    min_nodes: int
    max_nodes: int
    presence_ms: int
    assemble_ms: int
    train_ms: int
    exchange_ms: int
    open_ms: int
    steps: int
    fixed_steps: bool
    batch_sequences: int
    tokens_per_step: int
    weight_cap_tokens: int
    weight_after: int
    aggregator: aggregate.Name
    budget: float = 1.0
    turn: int = 20

    @classmethod
    def of(cls, spec: RunSpec, parts: int) -> Policy:
        rounds, training = spec.rounds, spec.training
        return cls(
            run=spec.run_id,
            rounds=rounds.count,
            parts=parts,
            min_nodes=rounds.min_nodes,
            max_nodes=rounds.max_nodes,
            presence_ms=_milliseconds(rounds.presence_s),
            assemble_ms=_milliseconds(rounds.assemble_s),
            train_ms=_milliseconds(rounds.train_s),
            exchange_ms=_milliseconds(rounds.exchange_s),
            open_ms=_milliseconds(rounds.open_s),
            steps=training.steps,
            fixed_steps=training.fixed_steps,
            batch_sequences=training.batch_sequences,
            tokens_per_step=spec.tokens_per_step,
            weight_cap_tokens=spec.exchange.weight_cap_tokens,
            weight_after=spec.exchange.weight_after,
            aggregator=spec.exchange.aggregator,
            budget=spec.audit.budget,
            turn=max(1, 2 * spec.audit.probation),
        )

    @property
    def standard_tokens(self) -> int:
        """Tokens of a contribution of full size."""
        return self.steps * self.tokens_per_step


@dataclass(frozen=True, slots=True)
class Offer:
    """A node would take a slot in round `round`, which starts from `base`."""

    round: int
    base: bytes
    tokens_per_s: float
    can_reduce: bool
    accepted: int
    upload_bytes_per_s: int = 0
    trusted: bool = False
    since: int = 0


@dataclass(frozen=True, slots=True)
class Node:
    """A node that was heard of lately."""

    peer: bytes
    seen_ms: int
    offer: Offer | None


@dataclass(frozen=True, slots=True)
class Average:
    """A part record that a reducer published, and whether the checkpoint worker holds its bytes."""

    record_hash: bytes
    part: int
    reducer: bytes
    slots: tuple[int, ...]
    held: bool


@dataclass(frozen=True, slots=True)
class State:
    """Where a run is. `phase_ends_ms` is None where only an event ends the phase.

    `nodes` are those heard of lately, by their keys; `ended` those whose standing ended; `previous` the roster of the round
    before. `commitments` and `openings` are by slot. `served` says how often somebody on probation had a slot, where they
    queue; `stopping` why no round follows this one. What is derived from the others, and kept since it is asked often:
    `slots` (of the roster, by key), `offered` (how many nodes offered to take a slot in this round), `newcomers` (how many of
    them are on probation), `awaited` (how many
    nodes of the round before have not), `gone` (slots of the roster whose standing ended since).
    """

    policy: Policy
    base: bytes
    round: int = 0
    phase: Phase = Phase.ASSEMBLING
    phase_ends_ms: int | None = None
    cursor: int = 0
    nodes: Map[bytes, Node] = Map()  # noqa: RUF009  # immutable
    ended: frozenset[bytes] = frozenset()
    previous: frozenset[bytes] = frozenset()
    roster: tuple[Seat, ...] = ()
    commitments: Map[int, bytes] = Map()  # noqa: RUF009
    sketch_set: bytes | None = None
    selected: tuple[int, ...] = ()
    averages: tuple[Average, ...] = ()
    parts: tuple[bytes | None, ...] = ()
    root: bytes | None = None
    openings: Map[int, bytes] = Map()  # noqa: RUF009
    needs_sketches: bool = False
    paused: bool = False
    stopping: str | None = None
    served: Map[bytes, int] = Map()  # noqa: RUF009
    slots: Mapping[bytes, int] = field(default_factory=dict, repr=False)
    offered: int = 0
    newcomers: int = 0
    awaited: int = 0
    gone: int = 0

    @property
    def committed(self) -> tuple[int, ...]:
        return tuple(sorted(self.commitments))

    @property
    def averaged(self) -> tuple[int, ...]:
        """The slots that an average may be made of, as far as is known."""
        return self.selected if self.needs_sketches else self.committed

    def slot_of(self, peer: bytes) -> int | None:
        return self.slots.get(peer)

    def takes(self, offer: Offer | None) -> bool:
        """Whether this is an offer for a slot in this round."""
        return offer is not None and offer.round == self.round and offer.base == self.base

    def takes_untrusted(self, offer: Offer | None) -> bool:
        """Whether this is one by somebody on probation."""
        return offer is not None and self.takes(offer) and not offer.trusted


def advance(state: State, event: Event, now_ms: int) -> tuple[State, tuple[Effect, ...]]:
    """Take note of an event at a time, then leave every phase that is over. The same object comes back if nothing changed."""
    state = _noted(state, event, now_ms)
    effects: list[Effect] = []
    thorough = not isinstance(event, NodeReady | Seen)
    while (step := _step(state, now_ms, thorough=thorough)) is not None:
        state, effect = step
        if effect is not None:
            effects.append(effect)
    return state, tuple(effects)


def ready_peers(state: State, now_ms: int) -> tuple[Node, ...]:
    """Nodes present that offered to take a slot in this round, from the right checkpoint."""
    return tuple(node for node in state.nodes.values() if state.takes(node.offer) and is_present(state, node, now_ms))


def _noted(state: State, event: Event, now_ms: int) -> State:
    match event:
        case NodeReady():
            return _note_ready(state, event, now_ms)
        case Seen(peers=peers):
            for peer in peers:
                state = _heard(state, peer, now_ms) if peer in state.nodes else state
            return state
        case NodeGone(peer=peer) if peer not in state.ended:
            gone = state.gone + (peer in state.slots)
            return replace(_without(state, peer), ended=state.ended | {peer}, gone=gone)
        case Committed(slot=slot) if state.phase is Phase.TRAINING and _open_slot(state, slot, state.commitments):
            state = _heard(state, state.roster[slot].peer, now_ms)
            return replace(state, commitments=state.commitments.set(slot, event.hash))
        case Sketched(selected=selected) if state.phase is Phase.EXCHANGING and state.needs_sketches:
            if state.sketch_set is not None or not set(selected) <= set(state.committed):
                return state
            return replace(state, sketch_set=event.sketch_set, selected=selected)
        case PartPublished() if state.phase is Phase.EXCHANGING and _acceptable(state, event):
            state = _heard(state, event.reducer, now_ms)
            average = Average(event.record_hash, event.part, event.reducer, event.slots, held=False)
            return replace(state, averages=(*state.averages, average))
        case PartHeld(record_hash=record_hash) if state.phase is Phase.EXCHANGING:
            if not any(average.record_hash == record_hash and not average.held for average in state.averages):
                return state
            averages = (replace(a, held=a.held or a.record_hash == record_hash) for a in state.averages)
            return replace(state, averages=tuple(averages))
        case Rooted(parts=parts, root=root) if state.phase is Phase.SEALING and parts == state.parts:
            return replace(state, root=root)
        case Opened(slot=slot) if state.phase is Phase.OPENING and slot in state.commitments:
            if not _open_slot(state, slot, state.openings):
                return state
            state = _heard(state, state.roster[slot].peer, now_ms)
            return replace(state, openings=state.openings.set(slot, event.nonce))
        case Pause(paused=paused) if state.phase is not Phase.FINISHED and paused != state.paused:
            return replace(state, paused=paused)
        case Stop(reason=reason) if state.phase is not Phase.FINISHED and state.stopping is None:
            return replace(state, stopping=reason)
        case Resumed(away_ms=away_ms) if away_ms:
            ends = None if state.phase_ends_ms is None else state.phase_ends_ms + away_ms
            nodes = {peer: replace(node, seen_ms=node.seen_ms + away_ms) for peer, node in state.nodes.items()}
            return replace(state, phase_ends_ms=ends, nodes=Map(nodes))
        case _:
            return state


def offered(state: State, event: NodeReady) -> Offer | None:
    """The offer that a node makes for this round, or for the next one once its checkpoint is there; else None."""
    this_round = event.round == state.round and event.base == state.base
    next_round = event.round == state.round + 1 and state.phase is Phase.OPENING and event.base == state.root
    if not this_round and not next_round:
        return None
    return Offer(
        event.round,
        event.base,
        event.tokens_per_s,
        event.can_reduce,
        event.accepted,
        event.upload_bytes_per_s,
        event.trusted,
        event.since,
    )


def repeats(state: State, event: NodeReady) -> bool:
    """Whether a node says nothing new, but that it is here."""
    node = state.nodes.get(event.peer)
    return node is not None and offered(state, event) in (node.offer, None)


def _note_ready(state: State, event: NodeReady, now_ms: int) -> State:
    if event.peer in state.ended or state.phase is Phase.FINISHED:
        return state
    return _heard(state, event.peer, now_ms, offered(state, event))


def _heard(state: State, peer: bytes, now_ms: int, offer: Offer | None = None) -> State:
    if peer in state.ended:
        return state
    known = state.nodes.get(peer)
    before = None if known is None else known.offer
    offer = before if offer is None else offer
    state = _without(state, peer)
    takes = state.takes(offer)
    return replace(
        state,
        nodes=state.nodes.set(peer, Node(peer, now_ms, offer)),
        offered=state.offered + takes,
        newcomers=state.newcomers + state.takes_untrusted(offer),
        awaited=state.awaited + (not takes and peer in state.previous),
    )


def _without(state: State, peer: bytes) -> State:
    known = state.nodes.get(peer)
    if known is None:
        return state
    takes = state.takes(known.offer)
    return replace(
        state,
        nodes=state.nodes.delete(peer),
        offered=state.offered - takes,
        newcomers=state.newcomers - state.takes_untrusted(known.offer),
        awaited=state.awaited - (not takes and peer in state.previous),
    )


def _open_slot(state: State, slot: int, taken: Map[int, bytes]) -> bool:
    """Whether something may still be noted for a slot: it exists, its holder stands, and nothing was noted yet."""
    return 0 <= slot < len(state.roster) and state.roster[slot].peer not in state.ended and slot not in taken


def _acceptable(state: State, event: PartPublished) -> bool:
    slot = state.slot_of(event.reducer)
    ascending = all(first < second for first, second in zip(event.slots, event.slots[1:], strict=False))
    return (
        slot is not None
        and state.roster[slot].reducer
        and event.reducer not in state.ended
        and 0 <= event.part < state.policy.parts
        and bool(event.slots)
        and ascending
        and set(event.slots) <= set(state.averaged)
        and not any(
            average.record_hash == event.record_hash or (average.reducer, average.part) == (event.reducer, event.part)
            for average in state.averages
        )
    )


def _step(state: State, now_ms: int, *, thorough: bool) -> tuple[State, Effect | None] | None:
    """The one next transition that is due, or None if the phase lasts."""
    due = state.phase_ends_ms is not None and now_ms >= state.phase_ends_ms
    match state.phase:
        case Phase.ASSEMBLING:
            return _assemble(state, now_ms, due, thorough=thorough)
        case Phase.TRAINING if due or _all_done(state, range(len(state.roster)), state.commitments):
            return _close_contributions(state, now_ms)
        case Phase.EXCHANGING if due or _all_held(state):
            parts = tuple(_best(state, part) for part in range(state.policy.parts))
            state = replace(state, phase=Phase.SEALING, phase_ends_ms=None, parts=parts)
            return state, RequestRoot(state.round, parts)
        case Phase.SEALING if state.root is not None:
            manifest = PublishManifest(state.round, state.parts, state.base, state.root, state.sketch_set)
            return replace(state, phase=Phase.OPENING, phase_ends_ms=now_ms + state.policy.open_ms), manifest
        case Phase.OPENING if due or _all_done(state, state.commitments, state.openings):
            return _next_round(state, now_ms), RevealBeacon(state.round, tuple(sorted(state.openings.items())))
        case _:
            return None


def _assemble(state: State, now_ms: int, due: bool, *, thorough: bool) -> tuple[State, Effect | None] | None:
    policy = state.policy
    if state.round >= policy.rounds or state.stopping is not None:
        reason = ALL_DONE if state.round >= policy.rounds or state.stopping is None else state.stopping
        return replace(state, phase=Phase.FINISHED, phase_ends_ms=None, stopping=reason, paused=False), Finish(reason)
    if state.paused:
        return None if state.phase_ends_ms is None else (replace(state, phase_ends_ms=None), None)
    if not (due or thorough or _worth_looking(state)):
        return None
    ready = ready_peers(state, now_ms)
    if len(ready) < policy.min_nodes:
        return None if state.phase_ends_ms is None else (replace(state, phase_ends_ms=None), None)
    if state.phase_ends_ms is None:
        return replace(state, phase_ends_ms=now_ms + policy.assemble_ms), None
    if not due and not _complete(state, ready, now_ms):
        return None
    seated = seating.seated(state, ready)
    able = seating.reducers(policy, seated)
    by_key = sorted(seated, key=lambda node: node.peer)
    roster = tuple(seating.seat(policy, node, reducer=node.peer in able) for node in by_key)
    commit_by_ms = now_ms + policy.train_ms
    slots = {seat.peer: slot for slot, seat in enumerate(roster)}
    served = seating.served(state, seated)
    state = replace(state, phase=Phase.TRAINING, phase_ends_ms=commit_by_ms, roster=roster, slots=slots, served=served)
    plan = PublishPlan(state.round, state.base, roster, state.cursor, commit_by_ms, commit_by_ms + policy.exchange_ms)
    return state, plan


def _worth_looking(state: State) -> bool:
    """Whether the counts allow that enough are ready, or that waiting longer for more is pointless; O(1)."""
    if state.phase_ends_ms is None:
        return state.offered >= state.policy.min_nodes
    return seating.most(state) >= state.policy.max_nodes or (bool(state.previous) and not state.awaited)


def _complete(state: State, ready: tuple[Node, ...], now_ms: int) -> bool:
    """Whether waiting longer for more nodes is pointless."""
    if len(ready) >= state.policy.max_nodes and len(seating.seated(state, ready)) >= state.policy.max_nodes:
        return True
    if not state.previous:
        return False
    here = (state.nodes.get(peer) for peer in state.previous)
    return all(state.takes(node.offer) for node in here if node is not None and is_present(state, node, now_ms))


def _close_contributions(state: State, now_ms: int) -> tuple[State, Effect]:
    stands = (slot for slot in sorted(state.commitments) if state.roster[slot].peer not in state.ended)
    counted = {slot: state.commitments[slot] for slot in stands}
    state = replace(
        state,
        phase=Phase.EXCHANGING,
        phase_ends_ms=now_ms + state.policy.exchange_ms,
        commitments=Map(counted),
        needs_sketches=sketching.needed(state.policy.aggregator, state.roster, counted),
    )
    return state, PublishCommitmentSet(state.round, tuple(counted.items()))


def _next_round(state: State, now_ms: int) -> State:
    assert state.root is not None
    windows = sum(seat.steps for seat in state.roster) * state.policy.batch_sequences
    following = State(
        policy=state.policy,
        base=state.root,
        round=state.round + 1,
        cursor=state.cursor + windows,
        nodes=Map({peer: node for peer, node in state.nodes.items() if is_present(state, node, now_ms)}),
        ended=state.ended,
        previous=frozenset(state.slots),
        paused=state.paused,
        stopping=state.stopping,
        served=state.served,
    )
    return with_counts(following)


def with_counts(state: State) -> State:
    """The state with what is derived from the rest of it computed anew."""
    offering = [peer for peer, node in state.nodes.items() if state.takes(node.offer)]
    return replace(
        state,
        slots={seat.peer: slot for slot, seat in enumerate(state.roster)},
        offered=len(offering),
        newcomers=sum(state.takes_untrusted(node.offer) for node in state.nodes.values()),
        awaited=len(state.previous.intersection(state.nodes)) - len(state.previous.intersection(offering)),
        gone=sum(seat.peer in state.ended for seat in state.roster),
    )


def _all_done(state: State, slots: Mapping[int, bytes] | range, done: Mapping[int, bytes]) -> bool:
    if len(done) + state.gone < len(slots):
        return False
    return all(slot in done or state.roster[slot].peer in state.ended for slot in slots)


def _all_held(state: State) -> bool:
    whole = len(state.selected) if state.needs_sketches else len(state.commitments)
    if not whole:
        return not state.commitments or state.sketch_set is not None
    covered = {average.part for average in state.averages if average.held and len(average.slots) == whole}
    return len(covered) == state.policy.parts


def _best(state: State, part: int) -> bytes | None:
    """Among the averages of a part that are held, the one over the most slots; of equals, the lowest hash."""
    held = [average for average in state.averages if average.part == part and average.held]
    if not held:
        return None
    return min(held, key=lambda average: (-len(average.slots), average.record_hash)).record_hash


def is_present(state: State, node: Node, now_ms: int) -> bool:
    """Whether a node was heard of lately."""
    return now_ms - node.seen_ms <= state.policy.presence_ms


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
