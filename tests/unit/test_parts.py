"""Everybody cuts the parameter vector alike, and agrees on who reduces what."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol import codec, merkle, parts
from swarm_protocol.chunks import content_hash
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.records import RoundPlan, Seat
from swarm_protocol.spec import (
    AuditSpec,
    DataSpec,
    ExchangeSpec,
    ModelSpec,
    OuterSpec,
    RoundsSpec,
    RunSpec,
    TrainingSpec,
)

ZERO = "0" * 64


def run_spec(**exchange: Any) -> RunSpec:
    return RunSpec(
        name="test",
        seed=1,
        numerics="native",
        coordinator=ZERO,
        checkpoint=ZERO,
        beacon=ZERO,
        model=ModelSpec(vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1),
        data=DataSpec(root=ZERO, tokenizer="bytes", train_tokens=1, held_out_windows=1),
        training=TrainingSpec(),
        exchange=ExchangeSpec(**exchange),
        outer=OuterSpec(),
        rounds=RoundsSpec(),
        audit=AuditSpec(),
    )


@given(size=st.integers(1, 1 << 31), count=st.integers(1, 300))
def test_parts_cover_the_vector_in_order_and_none_is_empty(size: int, count: int) -> None:
    cut = parts.partition(size, count)
    assert cut[0].start == 0
    assert cut[-1].stop == size
    assert all(a.stop == b.start for a, b in pairwise(cut))
    assert all(part.start < part.stop and part.start % 256 == 0 for part in cut)
    assert len(cut) == min(count, -(-size // 256))


@given(blocks=st.integers(1, 10_000), count=st.integers(1, 64))
def test_parts_differ_by_at_most_one_block(blocks: int, count: int) -> None:
    sizes = [part.stop - part.start for part in parts.partition(blocks * 256, count)]
    assert max(sizes) - min(sizes) <= 256


def test_a_small_model_has_fewer_parts() -> None:
    spec = run_spec(parts=1000)
    assert parts.part_count(spec) == -(-spec.model.num_parameters // 256) < 1000
    assert parts.part_count(run_spec(parts=3)) == 3


@pytest.mark.parametrize("name", ["none", "int8", "int4"])
def test_encoded_parts_assemble_to_the_pseudo_gradient(name: codec.Name) -> None:
    spec = run_spec(codec=name, parts=3)
    start, final = np.random.default_rng(1).standard_normal((2, spec.model.num_parameters)).astype(np.float32)
    encoded = parts.encode_parts(spec, start, final)
    assert [len(part) for part in encoded] == [parts.encoded_part_bytes(spec, part) for part in range(3)]
    whole = parts.assemble(spec, [parts.decode_part(spec, part, data) for part, data in enumerate(encoded)])
    # Parts begin where blocks do, so cutting first or encoding first is the same.
    everything = codec.get(name).decode(codec.get(name).encode(start - final), start.size)
    assert whole.tobytes() == everything.tobytes()


def test_a_missing_part_is_positive_zero() -> None:
    spec = run_spec(parts=2)
    first, second = parts.slices(spec)
    whole = parts.assemble(spec, [None, np.ones(second.stop - second.start, np.float32)])
    assert not any(whole[first].tobytes())
    assert whole[second].all()


def test_parts_of_a_wrong_number_or_size_are_refused() -> None:
    spec = run_spec(parts=2)
    for wrong in ([None], [None, np.ones(1, np.float32)]):
        with pytest.raises(InvalidDataError, match="part"):
            parts.assemble(spec, wrong)


def test_parameters_that_are_not_finite_or_not_this_models_are_refused() -> None:
    spec = run_spec()
    good = np.zeros(spec.model.num_parameters, np.float32)
    bad = good.copy()
    bad[3] = np.nan
    wide: Any = good.astype(np.float64)
    for start, final in ((good, bad), (good, good[:-1]), (wide, good)):
        with pytest.raises(InvalidDataError):
            parts.encode_parts(spec, start, final)


def test_the_parts_root_is_over_content_hashes() -> None:
    encoded = [b"one", b"two", b"three"]
    hashes = [content_hash(data) for data in encoded]
    assert parts.part_hashes(encoded) == hashes
    assert parts.parts_root(hashes) == merkle.root(hashes)


PEERS = [bytes([i]) * 32 for i in range(20)]


def test_every_peer_has_its_place_and_the_order_depends_on_key_and_part() -> None:
    order = parts.rendezvous(bytes(32), 0, PEERS)
    assert sorted(order) == list(range(20))
    assert parts.rendezvous(bytes(32), 1, PEERS) != order
    assert parts.rendezvous(b"\1" * 32, 0, PEERS) != order


def test_a_peer_that_leaves_moves_nobody_else() -> None:
    order = [PEERS[i] for i in parts.rendezvous(bytes(32), 5, PEERS)]
    fewer = [peer for peer in PEERS if peer != order[0]]
    assert [fewer[i] for i in parts.rendezvous(bytes(32), 5, fewer)] == order[1:]


def test_parts_spread_over_the_peers() -> None:
    first = [parts.rendezvous(bytes(32), part, PEERS)[0] for part in range(1000)]
    counts = np.bincount(first, minlength=20)
    assert counts.min() > 20
    assert counts.max() < 90


def test_keys_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        parts.rendezvous(b"short", 0, PEERS)
    with pytest.raises(ValueError, match="32 bytes"):
        parts.rendezvous(bytes(32), 0, [b"short"])


keys = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=12, unique=True)


@given(key=st.binary(min_size=32, max_size=32), count=st.integers(1, 40), peers=keys)
def test_everybody_is_in_every_order_and_first_in_no_more_than_a_fair_share(
    key: bytes, count: int, peers: list[bytes]
) -> None:
    orders = parts.reducer_orders(key, count, peers)
    assert len(orders) == count
    assert all(sorted(order) == list(range(len(peers))) for order in orders)
    first = [order[0] for order in orders]
    assert max(first.count(position) for position in first) <= -(-count // len(peers))


@given(key=st.binary(min_size=32, max_size=32), count=st.integers(1, 40), peers=keys, data=st.data())
def test_an_order_is_by_key_whatever_the_order_of_the_peers(
    key: bytes, count: int, peers: list[bytes], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(peers))
    named = [[peers[position] for position in order] for order in parts.reducer_orders(key, count, peers)]
    again = [[shuffled[position] for position in order] for order in parts.reducer_orders(key, count, shuffled)]
    assert named == again


@given(key=st.binary(min_size=32, max_size=32), count=st.integers(1, 40), peers=keys)
def test_an_order_differs_from_rendezvous_order_in_who_comes_first_only(
    key: bytes, count: int, peers: list[bytes]
) -> None:
    for part, order in enumerate(parts.reducer_orders(key, count, peers)):
        rendezvous = parts.rendezvous(key, part, peers)
        assert order[1:] == [position for position in rendezvous if position != order[0]]


uploads = st.lists(st.integers(0, 10**12), min_size=12, max_size=12)


@given(
    key=st.binary(min_size=32, max_size=32),
    count=st.integers(1, 40),
    peers=keys,
    uploads=uploads,
    percent=st.integers(1, 100),
)
def test_nobody_is_first_of_more_than_the_specs_share_of_parts_where_there_are_enough_reducers(
    key: bytes, count: int, peers: list[bytes], uploads: list[int], percent: int
) -> None:
    orders = parts.reducer_orders(key, count, peers, uploads[: len(peers)], percent)
    assert len(orders) == count
    assert all(sorted(order) == list(range(len(peers))) for order in orders)
    first = [order[0] for order in orders]
    most = max(first.count(position) for position in first)
    assert most <= max(1, count * percent // 100, -(-count // len(peers)))


@given(
    key=st.binary(min_size=32, max_size=32),
    count=st.integers(1, 40),
    peers=keys,
    uploads=uploads,
    percent=st.integers(1, 100),
    data=st.data(),
)
def test_weighted_orders_are_the_same_whatever_the_order_of_the_peers_and_the_unit_of_speed(
    key: bytes, count: int, peers: list[bytes], uploads: list[int], percent: int, data: st.DataObject
) -> None:
    speed = dict(zip(peers, uploads, strict=False))
    shuffled = data.draw(st.permutations(peers))

    def named(among: list[bytes], factor: int) -> list[list[bytes]]:
        orders = parts.reducer_orders(key, count, among, [factor * speed[peer] for peer in among], percent)
        return [[among[position] for position in order] for order in orders]

    assert named(peers, 1) == named(list(shuffled), 1) == named(peers, 8)


@given(
    count=st.integers(1, 200),
    tickets=st.lists(st.integers(1, 16), min_size=1, max_size=12),
    percent=st.integers(1, 100),
)
def test_quotas_leave_room_for_all_parts_and_give_the_faster_no_less(
    count: int, tickets: list[int], percent: int
) -> None:
    quotas = parts.reduction_quotas(count, PEERS[: len(tickets)], tickets, percent)
    assert sum(quotas) >= count
    pairs = [(a, b) for a in range(len(tickets)) for b in range(len(tickets)) if tickets[a] > tickets[b]]
    assert all(quotas[a] >= quotas[b] for a, b in pairs)


def test_faster_reducers_come_first_in_proportion() -> None:
    speeds = [8_000_000, 4_000_000, 1_000_000, 1_000_000]
    first = [order[0] for order in parts.reducer_orders(bytes(32), 1400, PEERS[:4], speeds, 60)]
    assert [first.count(position) for position in range(4)] == pytest.approx([800, 400, 100, 100], abs=60)


def test_tickets_are_sixteenths_of_the_fastest_and_one_for_whoever_measured_nothing() -> None:
    assert parts.reduction_tickets([0, 0, 0]) == [1, 1, 1]
    assert parts.reduction_tickets([1600, 800, 199, 1, 0]) == [16, 8, 1, 1, 1]
    assert parts.reduction_tickets([]) == []


def test_who_reduces_is_in_the_plan(golden: Any) -> None:
    spec = run_spec(parts=8)
    roster = tuple(
        Seat(peer=bytes([slot]) * 32, steps=1, weight=1, reducer=slot != 2, upload_bytes_per_s=1000 * slot)
        for slot in range(5)
    )
    plan = RoundPlan(
        run=spec.run_id, round=0, base=bytes(32), roster=roster, cursor=0, commit_by_ms=0, exchange_by_ms=0,
        previous_beacon=bytes([7]) * 32, log_size=0, log_root=bytes(32),
    )  # fmt: skip
    orders = parts.planned_reducers(spec, plan, {0, 1, 2, 4})
    assert {key for order in orders for key in order} == {roster[slot].peer for slot in (0, 1, 4)}
    golden("parts", {"weighted_orders": [[key[0] for key in order] for order in orders]})


def test_without_reducers_no_part_has_any() -> None:
    assert parts.reducer_orders(bytes(32), 3, []) == [[], [], []]


def test_reducer_orders_are_pinned(golden: Any) -> None:
    peers = [bytes([number]) * 32 for number in range(5)]
    golden("parts", {"reducer_orders": parts.reducer_orders(bytes([7]) * 32, 8, peers)})


@given(
    seed=st.integers(0, 1000),
    part=st.integers(0, 2),
    exponent=st.integers(-6, 6),
    name=st.sampled_from(["none", "int8", "int4"]),
)
def test_a_part_is_sound_exactly_if_its_norm_is_within_the_bound(
    seed: int, part: int, exponent: int, name: codec.Name
) -> None:
    spec = run_spec(codec=name, parts=3, max_norm=10.0)
    where = parts.slices(spec)[part]
    values = np.random.default_rng(seed).standard_normal(where.stop - where.start, dtype=np.float32)
    values *= np.float32(2.0**exponent)
    encoded = codec.get(name).encode(values)
    norm = float(np.linalg.norm(parts.decode_part(spec, part, encoded).astype(np.float64)))
    if norm <= 10.0:
        parts.require_sound(spec, part, encoded)
    else:
        with pytest.raises(InvalidDataError, match="norm bound"):
            parts.require_sound(spec, part, encoded)


@pytest.mark.parametrize(
    ("numel", "name", "count"),
    [(1000, "none", 8), (25_000_000, "none", 24), (25_000_000, "int8", 8), (10**9, "int4", 135)],
)
def test_a_run_has_parts_of_up_to_4_mib_unless_its_owner_says_otherwise(
    numel: int, name: codec.Name, count: int
) -> None:
    assert parts.suggested_parts(numel, name) == count
    largest = max(where.stop - where.start for where in parts.partition(numel, count))
    assert codec.get(name).encoded_bytes(largest) <= parts.SUGGESTED_PART_BYTES + 4096
