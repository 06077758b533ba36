"""Who gets a slot in a round, and with how many steps and what weight. Pure functions of the round state machine's state.

Where the spec's audit budget is below 1, identities on probation queue, so that new ones cannot flood the auditors: a round
gives slots to so many of them that whole audits of all their contributions fit into the budget, and to one at least. First
come, first served, by the place of their first registration in the log; but who has been seated `turn` times, twice what
probation takes, and is still on it, goes behind those who have not. So nobody waits for ever, whatever those ahead do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from blake3 import blake3
from immutables import Map

from swarm_protocol.records import Seat

if TYPE_CHECKING:
    from swarm_coordinator.rounds import Node, Offer, Policy, State


def room(policy: Policy, trusted: int, tokens: int) -> int:
    """How many on probation may train beside so many trusted nodes, which train on `tokens` tokens together.

    Their whole audits are at most the budget's share of all tokens, if each trains on a contribution of full size. But one
    may always, and as many as it takes to begin a round.
    """
    if policy.budget >= 1.0:
        return policy.max_nodes
    standard = policy.standard_tokens
    count = min(policy.max_nodes, int(policy.budget * tokens / ((1.0 - policy.budget) * standard)) + 1)
    # The same product, rounded in the same way, as in the draw.
    while count and count * standard > int(policy.budget * (tokens + count * standard)):
        count -= 1
    return max(1, policy.min_nodes - trusted, count)


def queue(state: State, nodes: Iterable[Node]) -> list[Node]:
    """Those of the nodes that are on probation, in the order in which they get slots."""
    new = [(_offer(node), node) for node in nodes if not _offer(node).trusted]
    turn = state.policy.turn
    new.sort(key=lambda one: (state.served.get(one[1].peer, 0) // turn, one[0].since, one[1].peer))
    return [node for _, node in new]


def seated(state: State, ready: Sequence[Node]) -> Sequence[Node]:
    """Who gets a slot of those that are ready. Where more are trusted than there are slots, by lot."""
    policy = state.policy
    if policy.budget >= 1.0:
        return ready if len(ready) <= policy.max_nodes else _by_lot(state, ready)[: policy.max_nodes]
    trusted = _by_lot(state, [node for node in ready if _offer(node).trusted])
    new = queue(state, ready)
    tokens = [0, *accumulate(steps(policy, _offer(node)) * policy.tokens_per_step for node in trusted)]
    count = 0
    while count < min(len(new), policy.max_nodes):
        beside = min(len(trusted), policy.max_nodes - count - 1)
        if count + 1 > room(policy, beside, tokens[beside]):
            break
        count += 1
    return [*trusted[: policy.max_nodes - count], *new[:count]]


@dataclass(frozen=True)
class Line:
    """Who can expect what of the next round: `next_up` a slot, those in `queued` a turn later, by their place from 1.

    `room` is how many on probation may train at once, None where they do not queue.
    """

    next_up: frozenset[bytes]
    queued: Mapping[bytes, int]
    room: int | None


def line(state: State, present: Callable[[Node], bool]) -> Line:
    """The next round's slots as far as can be said: by those who are here, and those who train right now."""
    here = [
        node for node in state.nodes.values() if node.offer is not None and (present(node) or node.peer in state.slots)
    ]
    chosen = seated(state, here)
    waiting = queue(state, here) if state.policy.budget < 1.0 else []
    room = sum(not _offer(node).trusted for node in chosen) if waiting else None
    behind = waiting[room:] if room is not None else []
    return Line(
        frozenset(node.peer for node in chosen), {node.peer: place for place, node in enumerate(behind, 1)}, room
    )


def most(state: State) -> int:
    """A bound on how many would be seated, from the state's counts alone."""
    trusted = state.offered - state.newcomers
    policy = state.policy
    return trusted + min(state.newcomers, room(policy, trusted, trusted * policy.standard_tokens))


def served(state: State, nodes: Iterable[Node]) -> Map[bytes, int]:
    """How often those on probation have had a slot, these ones counted; kept only where they queue."""
    counts = state.served
    if state.policy.budget >= 1.0:
        return counts
    for node in nodes:
        if not _offer(node).trusted:
            counts = counts.set(node.peer, counts.get(node.peer, 0) + 1)
        elif node.peer in counts:
            counts = counts.delete(node.peer)
    return counts


def reducers(policy: Policy, nodes: Iterable[Node]) -> set[bytes]:
    """Who may reduce of those that get a slot: who can be reached and has standing, which weight stands for.

    While nobody has, as in the first rounds of a run, all who can be reached.
    """
    able = [node for node in nodes if _offer(node).can_reduce]
    standing = {node.peer for node in able if _offer(node).accepted >= policy.weight_after}
    return standing or {node.peer for node in able}


def steps(policy: Policy, offer: Offer) -> int:
    """The inner steps that a node is given."""
    if policy.fixed_steps:
        return policy.steps
    # Four fifths of what the declared speed allows: the last fifth is for hashing and hiccups.
    possible = int(0.8 * offer.tokens_per_s * policy.train_ms / 1000 / policy.tokens_per_step)
    return max(1, min(possible, policy.steps))


def seat(policy: Policy, node: Node, *, reducer: bool) -> Seat:
    """A node's place in the plan."""
    offer = _offer(node)
    given = steps(policy, offer)
    weight = 0
    if offer.accepted >= policy.weight_after:
        weight = min(given * policy.tokens_per_step, policy.weight_cap_tokens)
    return Seat(
        peer=node.peer, steps=given, weight=weight, reducer=reducer, upload_bytes_per_s=offer.upload_bytes_per_s
    )


def _by_lot(state: State, nodes: Iterable[Node]) -> list[Node]:
    """The lowest hash first."""
    prefix = state.policy.run + state.round.to_bytes(8, "little")

    def lot(node: Node) -> bytes:
        return blake3(prefix + node.peer, derive_key_context="swarm-node 2026 roster").digest()

    return sorted(nodes, key=lot)


def _offer(node: Node) -> Offer:
    assert node.offer is not None
    return node.offer
