"""A sketch is an exact, keyed, linear map of a part; distances between sketches are those between parts, nearly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from swarm_protocol import chunks, merkle, sketch
from swarm_protocol.errors import InvalidDataError

Float32 = npt.NDArray[np.float32]
CLOSING = hashlib.sha256(b"a commitment set").digest()
LARGEST = float(np.finfo(np.float32).max)

parts = hnp.arrays(np.float32, st.integers(0, 3000), elements=st.floats(-1e6, 1e6, width=32), fill=st.just(0.5))


def of(values: Float32, part: int = 0, closing: bytes = CLOSING) -> Float32:
    return sketch.of(sketch.projection(closing, part, values.size), values)


def reference(where: sketch.Projection, values: Float32) -> Float32:
    """The definition, element by element, in Python's integers."""
    peak = max((abs(float(value)) for value in values), default=0.0)
    exponent = int(np.frexp(peak)[1])
    buckets = [0] * sketch.BUCKETS
    for index, value in enumerate(values):
        sign = -1 if where.signs[index // 8] >> index % 8 & 1 else 1
        bucket = (index % sketch.BUCKETS + where.shifts[index // sketch.BUCKETS]) % sketch.BUCKETS
        buckets[bucket] += sign * round(float(value) * 2.0 ** (30 - exponent))  # Python rounds half to even, too
    return np.array([float(total) * 2.0 ** (exponent - 30) for total in buckets]).astype(np.float32)


@given(values=parts)
def test_a_sketch_is_its_definition(values: Float32) -> None:
    where = sketch.projection(CLOSING, 3, values.size)
    assert sketch.of(where, values).tobytes() == reference(where, values).tobytes()


@given(values=parts)
def test_a_sketch_scales_exactly_by_powers_of_two_and_signs(values: Float32) -> None:
    found = of(values)
    assert (of(values * np.float32(2.0**-20)) == found * np.float32(2.0**-20)).all()
    assert (of(-values) == -found).all()


def test_a_sketch_is_linear() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 50_000)).astype(np.float32)
    np.testing.assert_allclose(of(a + b), of(a) + of(b), atol=1e-4)


@pytest.mark.parametrize("spread", ["even", "one value", "one block", "heavy tail"])
def test_distances_are_right_within_five_standard_deviations(spread: str) -> None:
    rng = np.random.default_rng(2)
    difference = np.zeros(100_000, np.float32)
    match spread:
        case "even":
            difference[:] = rng.standard_normal(100_000)
        case "one value":
            difference[77] = 3
        case "one block":
            difference[4096:5120] = 1
        case _:
            difference[:] = rng.standard_cauchy(100_000)
    base = rng.standard_normal(100_000).astype(np.float32)
    found = sketch.squared_distances({0: [of(base)], 1: [of(base + difference)]})
    apart = (base + difference).astype(np.float64) - base
    assert found[0, 1] == pytest.approx(float(apart @ apart), rel=5 * 0.0442)


def test_the_mean_error_over_keys_vanishes() -> None:
    values = np.random.default_rng(3).standard_normal(5000).astype(np.float32)
    truth = float(values.astype(np.float64) @ values)
    ratios = [
        float(np.sum(of(values, closing=hashlib.sha256(bytes([key])).digest()).astype(np.float64) ** 2)) / truth
        for key in range(100)
    ]
    assert np.mean(ratios) == pytest.approx(1, abs=3 * 0.0442 / 10)
    assert np.std(ratios) < 0.06


def test_key_and_part_change_a_sketch() -> None:
    values = np.ones(2000, np.float32)
    other = hashlib.sha256(b"another").digest()
    assert len({of(values).tobytes(), of(values, part=1).tobytes(), of(values, closing=other).tobytes()}) == 3


def test_no_two_values_of_a_block_share_a_bucket() -> None:
    values = np.arange(1, 1025, dtype=np.float32)
    assert np.sort(np.abs(of(values))).tolist() == values.tolist()


@pytest.mark.parametrize("size", [0, 1, 1023, 1025, 32768, 32769, 70_001])
def test_every_value_is_in_the_sketch_once(size: int) -> None:
    where = sketch.projection(CLOSING, 0, size)
    signs = 1 - 2 * np.unpackbits(where.signs, bitorder="little")[:size].astype(np.float32)
    assert float(sketch.of(where, signs).sum()) == size


def test_extremes_stay_finite() -> None:
    for value in (LARGEST, -LARGEST, 1e-45, 0.0, -0.0):
        found = of(np.full(5000, value, np.float32))
        assert np.isfinite(found).all()
        assert not np.signbit(found[found == 0]).any()
    where = sketch.projection(CLOSING, 0, 1024 * 8)
    signs = 1 - 2 * np.unpackbits(where.signs, bitorder="little").astype(np.float32)
    assert (sketch.of(where, signs * np.float32(LARGEST)) == LARGEST).all()
    assert (np.abs(of(np.full(1024, 1e-45, np.float32))) == np.float32(1e-45)).all()


@pytest.mark.parametrize("bad", [np.array([1, np.nan], np.float32), np.array([np.inf, 1], np.float32), np.ones(2),
                                 np.ones(3, np.float32)])  # fmt: skip
def test_what_is_no_part_has_no_sketch(bad: Float32) -> None:
    with pytest.raises(InvalidDataError):
        sketch.of(sketch.projection(CLOSING, 0, 2), bad)


def test_only_the_sketch_of_the_part_matches() -> None:
    values = np.random.default_rng(4).standard_normal(5000).astype(np.float32)
    where = sketch.projection(CLOSING, 0, 5000)
    claimed = sketch.encode(sketch.of(where, values))
    assert len(claimed) == sketch.SIZE_BYTES == 4096
    assert sketch.matches(where, values, claimed)
    values[1234] = np.nextafter(values[1234], np.float32(9))
    values[17] += np.float32(1e-6)
    assert not sketch.matches(where, values, claimed)
    assert not sketch.matches(sketch.projection(CLOSING, 1, 5000), values, claimed)


def test_an_encoding_is_decoded_again_or_refused() -> None:
    found = of(np.arange(3000, dtype=np.float32))
    assert sketch.decode(sketch.encode(found)).tobytes() == found.tobytes()
    for bad in (b"", sketch.encode(found)[:-1], sketch.encode(found) + b"\0", b"\xff" * 4096):
        with pytest.raises(InvalidDataError, match="a sketch"):
            sketch.decode(bad)


@given(data=st.one_of(st.binary(max_size=64), st.binary(min_size=4096, max_size=4096)))
def test_whatever_arrives_is_a_sketch_or_is_refused(data: bytes) -> None:
    try:
        found = sketch.decode(data)
    except InvalidDataError:
        return
    assert np.isfinite(found).all()
    assert sketch.encode(found) == data


def test_a_sender_signs_the_merkle_root_of_its_sketches() -> None:
    encoded = [sketch.encode(of(np.full(10, part, np.float32), part)) for part in range(5)]
    hashes = [chunks.content_hash(data) for data in encoded]
    assert sketch.root(encoded) == merkle.root(hashes)
    assert merkle.root_from_proof(hashes[3], 3, 5, merkle.proof(hashes, 3)) == sketch.root(encoded)


def test_distances_of_parts_add_up_to_those_of_contributions() -> None:
    rng = np.random.default_rng(5)
    rows = {slot: [of(rng.standard_normal(3000).astype(np.float32), part) for part in range(4)] for slot in (9, 2, 5)}
    found = sketch.squared_distances(rows)
    assert found.shape == (3, 3)
    assert (found == found.T).all()
    assert (np.diag(found) == 0).all()
    for i, first in enumerate((2, 5, 9)):
        for j, second in enumerate((2, 5, 9)):
            expected = sum(
                float(np.sum((a.astype(float) - b) ** 2)) for a, b in zip(rows[first], rows[second], strict=True)
            )
            assert found[i, j] == pytest.approx(expected, rel=1e-12)
    assert sketch.squared_distances({}).shape == (0, 0)


def test_sketches_that_do_not_fit_together_are_refused() -> None:
    one = of(np.ones(10, np.float32))
    with pytest.raises(InvalidDataError, match="each part"):
        sketch.squared_distances({0: [one], 1: [one, one]})
    with pytest.raises(InvalidDataError, match="float32"):
        sketch.squared_distances({0: [one], 1: [one[:-1]]})


def test_keys_and_sizes_out_of_range_are_refused() -> None:
    for closing, numel in ((CLOSING[:-1], 1), (CLOSING, -1), (CLOSING, (1 << 31) + 1)):
        with pytest.raises(ValueError, match="a sketch has"):
            sketch.projection(closing, 0, numel)


def test_the_bits_are_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    index = np.arange(5000, dtype=np.int64)
    values = ((index * 7919 % 2003 - 1001) * np.float32(2.0**-9)).astype(np.float32)
    where = sketch.projection(bytes(range(32)), 6, values.size)
    found = sketch.of(where, values)
    third = sketch.of(where, values / np.float32(3))
    golden(
        "sketch",
        {
            "signs, first 16 bytes": where.signs[:16].tobytes().hex(),
            "shifts": list(where.shifts),
            "buckets": found[:8].astype("<f4").tobytes().hex(),
            "hash": chunks.content_hash(sketch.encode(third)).hex(),
            "squared distance": float(sketch.squared_distances({0: [found], 1: [third]})[0, 1]).hex(),
        },
    )
