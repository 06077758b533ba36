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
