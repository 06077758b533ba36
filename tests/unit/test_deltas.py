"""Who lags ends at the exact root, by whichever way is fewer bytes, and by another one where that is closed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol import deltas, parts
from swarm_protocol.catching_up import CatchUp
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import content_hash
from swarm_protocol.deltas import Link
from swarm_protocol.errors import HashMismatchError, InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.identity import Identity

MakeChain = Callable[..., Any]


def rooted(number: int) -> bytes:
    return number.to_bytes(32, "little")


links = st.tuples(st.booleans(), st.integers(0, 2000))


@given(st.lists(links, min_size=1, max_size=12), st.integers(0, 12), st.integers(0, 100), st.integers(1, 1000))
def test_the_first_way_is_the_cheapest(raw: list[tuple[bool, int]], held: int, each: int, size: int) -> None:
    chain = [Link(n, rooted(n), size, whole, delta if n else None) for n, (whole, delta) in enumerate(raw)]
    have = {held: rooted(held)}
    costs = {
        link.round: (0 if link.round == held else size) + sum((one.delta_bytes or 0) + each for one in chain[n + 1 :])
        for n, link in enumerate(chain)
        if link.whole or link.round == held
    }
    found = deltas.ways(chain, have, each)
    assert {way.start.round: way.size_bytes for way in found} == costs
    assert [way.size_bytes for way in found] == sorted(costs.values())
    # Looking no further back loses nothing.
    for start in range(len(chain)):
        if deltas.far_enough(chain[start:], have, each):
            near = deltas.ways(chain[start:], have, each)
            assert [way.size_bytes for way in near][:1] == sorted(costs.values())[:1]


def test_a_checkpoint_that_is_no_part_of_the_chain_is_of_no_use() -> None:
    chain = [Link(n, rooted(n), 100, n == 0, 1 if n else None) for n in range(4)]
    (way,) = deltas.ways(chain, {3: b"x" * 32}, 0)
    assert (way.start.round, way.held, way.deltas, way.size_bytes) == (0, False, 3, 103)


def sealed(make_chain: MakeChain, rounds: int, codec: str = "int8", **settings: int) -> Any:
    chain = make_chain(codec, **settings)
    for number in range(rounds):
        chain.seal(missing={number % 4})
    chain.keep(rounds)
    return chain


def reach(
    chain: Any, number: int, held: Checkpoint | None, plane: Any = None, **options: Any
) -> tuple[Checkpoint, CatchUp]:
    catching_up = CatchUp(chain, plane, **options)
    wanted = chain.checkpoints[number]
    return asyncio.run(catching_up.checkpoint(number, wanted.root, held)), catching_up


def equal(found: Checkpoint, wanted: Checkpoint) -> bool:
    pairs = zip(found.buffers, wanted.buffers, strict=True)
    return found.round == wanted.round and all(one.tobytes() == other.tobytes() for one, other in pairs)


@pytest.mark.parametrize("codec", ["none", "int8", "int4"])
def test_the_averages_of_the_missed_rounds_end_at_the_exact_root(make_chain: MakeChain, codec: str) -> None:
    chain = sealed(make_chain, 3, codec)
    chain.whole.clear()
    for number in range(4):
        found, catching_up = reach(chain, 3, chain.checkpoints[number])
        assert equal(found, chain.checkpoints[3])
        taken = [result for one in range(number, 3) for result in chain.results(one)]
        assert set(chain.asked) == set(taken)
        assert catching_up.received_bytes == sum(len(chain.blobs[one]) for one in taken)
        chain.asked.clear()


def test_many_missed_rounds_cost_more_than_the_whole_checkpoint(make_chain: MakeChain) -> None:
    chain = sealed(make_chain, 40, "none")
    found, catching_up = reach(chain, 40, chain.checkpoints[0])
    assert equal(found, chain.checkpoints[40])
    assert set(chain.asked) == set(chain.checkpoints[40].manifest.hashes)
    assert "whole" in catching_up.how


def test_an_old_checkpoint_is_made_from_the_nearest_one_that_is_kept(make_chain: MakeChain) -> None:
    chain = sealed(make_chain, 6)
    chain.keep(3)
    found, catching_up = reach(chain, 5, None)
    assert equal(found, chain.checkpoints[5])
    assert catching_up.how.startswith("by checkpoint 3 whole and 2 deltas")


def test_a_lost_average_means_another_way(make_chain: MakeChain) -> None:
    chain = sealed(make_chain, 3)
    del chain.blobs[chain.results(1)[0]]
    assert equal(reach(chain, 3, chain.checkpoints[1])[0], chain.checkpoints[3])
    chain.whole = {chain.checkpoints[0].root}
    with pytest.raises(RefusedError):
        reach(chain, 3, chain.checkpoints[1])


def test_a_checkpoint_that_goes_while_it_is_fetched_means_deltas(make_chain: MakeChain) -> None:
    chain = sealed(make_chain, 3, "none")
    for digest in chain.checkpoints[3].manifest.hashes:
        del chain.blobs[digest]
    found, catching_up = reach(chain, 3, None)
    assert equal(found, chain.checkpoints[3])
    assert catching_up.how.startswith("by checkpoint 0 whole and 3 deltas")


def test_a_checkpoint_that_has_diverged_is_not_built_upon(make_chain: MakeChain) -> None:
    chain = sealed(make_chain, 3)
    other = Checkpoint(2, np.zeros_like(chain.checkpoints[2].parameters), chain.checkpoints[2].momentum)
    found, catching_up = reach(chain, 3, other)
    assert equal(found, chain.checkpoints[3])
    assert "whole" in catching_up.how


def test_what_is_broken_off_goes_on_where_it_was(make_chain: MakeChain) -> None:
    chain = sealed(make_chain, 4)
    chain.whole.clear()
    catching_up, wanted = CatchUp(chain), chain.checkpoints[4]
    chain.away_after = len(chain.results(0)) + len(chain.results(1))
    with pytest.raises(UnreachableError):
        asyncio.run(catching_up.checkpoint(4, wanted.root, chain.checkpoints[0]))
    chain.away_after = None
    assert equal(asyncio.run(catching_up.checkpoint(4, wanted.root, chain.checkpoints[0])), wanted)
    assert not any(count > 1 for count in map(chain.asked.count, chain.asked))


def test_a_list_of_another_chain_is_refused(make_chain: MakeChain) -> None:
    chain = sealed(make_chain, 3)
    with pytest.raises(HashMismatchError, match="another checkpoint 3"):
        asyncio.run(CatchUp(chain).checkpoint(3, b"x" * 32, None))
    page = [Link.parse(chain._entry(number)) for number in (3, 1, 0)]

    async def with_a_gap(before: int, limit: int) -> list[Link]:
        return [link for link in page if link.round < before][:limit]

    with pytest.raises(InvalidDataError, match="gap"):
        asyncio.run(CatchUp(chain, chain=with_a_gap).checkpoint(3, chain.checkpoints[3].root, None))
    with pytest.raises(InvalidDataError):
        Link.parse({"round": -1, "root": "00" * 32, "size_bytes": 1, "whole": True, "delta_bytes": None})


def test_averages_that_do_not_lead_to_the_signed_root_are_refused(make_chain: MakeChain) -> None:
    chain = sealed(make_chain, 2)
    zero = np.zeros(chain.spec.num_trainable, np.float32)
    with pytest.raises(HashMismatchError, match="do not lead"):
        deltas.applied(chain.spec, chain.checkpoints[1], chain.rounds[1][1].manifest, zero)
    with pytest.raises(HashMismatchError, match="another checkpoint"):
        deltas.applied(chain.spec, chain.checkpoints[0], chain.rounds[1][1].manifest, zero)


def test_an_average_that_is_not_sound_counts_as_missing(make_chain: MakeChain) -> None:
    spec = make_chain().spec
    vector = np.ones(spec.num_trainable, np.float32)
    deltas.decode(spec, 1, b"\xff" * parts.encoded_part_bytes(spec, 1), vector)
    where = parts.slices(spec)[1]
    assert not vector[where].any()
    assert vector[: where.start].all()


class Plane:
    """Peers that answer with what `answers` has for them, by key, in turn; who has nothing there is away."""

    def __init__(self, answers: dict[bytes, Any]) -> None:
        self.identity = Identity.from_seed(bytes(32))
        self.answers = answers
        self.called: list[bytes] = []

    async def call(self, peer: bytes, header: dict[str, Any], **bounds: Any) -> tuple[dict[str, Any], bytes]:
        self.called.append(peer)
        if peer not in self.answers:
            raise UnreachableError("away")
        return {}, self.answers[peer](header["hash"])


def test_peers_are_asked_before_the_coordinator_and_not_believed(make_chain: MakeChain) -> None:
    chain = sealed(make_chain, 2)
    chain.whole.clear()
    reducer, other = (seat.peer for seat in chain.rounds[0][0].roster)

    for answers, asked in (
        ({reducer: chain.blobs.get}, 0),
        ({other: chain.blobs.get}, 0),
        ({reducer: lambda digest: b"lies", other: chain.blobs.get}, 0),
        ({reducer: lambda digest: b"lies"}, 4),
        ({}, 4),
    ):
        chain.asked.clear()
        plane = Plane(answers)
        found, _ = reach(chain, 2, chain.checkpoints[0], plane)
        assert equal(found, chain.checkpoints[2])
        assert len(chain.asked) == asked
        away = {reducer, other} - set(answers)
        assert all(plane.called.count(peer) <= len(chain.results(0)) for peer in away)


def test_what_is_here_already_is_not_asked_for(make_chain: MakeChain) -> None:
    chain = sealed(make_chain, 2)
    chain.whole.clear()
    found, _ = reach(chain, 2, chain.checkpoints[0], find=chain.blobs.get)
    assert equal(found, chain.checkpoints[2])
    assert not chain.asked


def test_peers_are_not_asked_for_what_they_do_not_keep_any_more(make_chain: MakeChain) -> None:
    chain = sealed(make_chain, 5, keep_rounds=2)
    chain.whole.clear()
    plane = Plane({seat.peer: chain.blobs.get for seat in chain.rounds[0][0].roster})
    reach(chain, 5, chain.checkpoints[0], plane)
    old = set(itertools.chain(*(chain.results(number) for number in range(3))))
    assert set(chain.asked) == old
    assert len(plane.called) == len(chain.results(3)) + len(chain.results(4))
    assert content_hash(chain.blobs[chain.asked[0]]) == chain.asked[0]
