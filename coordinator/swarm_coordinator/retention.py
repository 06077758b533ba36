"""What the object store has to keep, and what may go. Pure, no I/O.

Checkpoints are kept whole every `snapshot_every` rounds, for as long as audits of their round may be open, and the newest;
every other one is made from the kept one before it and the averages of the rounds between, which are kept for ever. A
checkpoint that could not be made again is kept, whatever else is said. So whatever could be made before can be made after.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass

from swarm_protocol.chunks import StateManifest
from swarm_protocol.spec import RoundsSpec


@dataclass(frozen=True)
class Sealed:
    """A sealed round: the root of the checkpoint after it, and the hashes of the averages that lead there."""

    root: bytes
    averages: frozenset[bytes]


@dataclass(frozen=True)
class Live:
    """What a run's records say of its objects.

    `first` is the root of checkpoint 0; `audited` are rounds with open audits. `states` (by root) and `blobs` (by hash) are
    needed whatever the rounds say: the trunk, the dataset, archived evidence, the averages of rounds under way.
    """

    first: bytes
    rounds: Sequence[Sealed]
    audited: frozenset[int] = frozenset()
    states: frozenset[bytes] = frozenset()
    blobs: frozenset[bytes] = frozenset()

    @property
    def roots(self) -> list[bytes]:
        """Of the chain of checkpoints, by the round that starts from them."""
        return [self.first, *(one.root for one in self.rounds)]


@dataclass(frozen=True)
class Garbage:
    """What may go: checkpoints by their root, first of all; `chunks` of these, and `others`, that nothing accounts for."""

    states: frozenset[bytes]
    chunks: frozenset[bytes]
    others: frozenset[bytes]


def wanted(rounds: RoundsSpec, newest: int, audited: Collection[int]) -> set[int]:
    """The checkpoints to keep whole, by the round that starts from them.

    Snapshots, those of the last `keep_rounds` rounds, those that open audits replay from, and the newest.
    """
    snapshots = range(0, newest + 1, rounds.snapshot_every)
    recent = range(max(0, newest - rounds.keep_rounds), newest + 1)
    return {*snapshots, *recent, *(number for number in audited if number <= newest)}


def kept(rounds: RoundsSpec, live: Live, states: Mapping[bytes, StateManifest], blobs: Set[bytes]) -> set[bytes]:
    """The roots of the checkpoints that have to stay, of those in `states`."""
    roots, keep = live.roots, set(live.states)
    needed = wanted(rounds, len(live.rounds), live.audited)
    intact = {root for root, manifest in states.items() if all(digest in blobs for digest in manifest.hashes)}
    made = False
    for number, root in enumerate(roots):
        made = made and live.rounds[number - 1].averages <= blobs
        if number in needed or root in live.states or (root in intact and not made):
            keep.add(root)
            made = made or root in intact
    return keep & set(states)


def garbage(rounds: RoundsSpec, live: Live, states: Mapping[bytes, StateManifest], blobs: Set[bytes]) -> Garbage:
    """What may go of what is there.

    Args:
        states: the checkpoints in the store, by their root, with their chunks.
        blobs: the hashes of all blobs in the store.
    """
    keep = kept(rounds, live, states, blobs)
    needed = set(live.blobs).union(*(one.averages for one in live.rounds))
    needed.update(digest for root in keep for digest in states[root].hashes)
    go = frozenset(root for root in states if root not in keep)
    loose = frozenset(digest for digest in blobs if digest not in needed)
    chunks = frozenset(digest for root in go for digest in states[root].hashes) & loose
    return Garbage(go, chunks, loose - chunks)
