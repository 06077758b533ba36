"""The mean is one sequence of float32 roundings, and the norm bound one number for everybody."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from swarm_protocol import aggregate, sums
from swarm_protocol.aggregate import intake, weighted
from swarm_protocol.errors import InvalidDataError

Float32 = npt.NDArray[np.float32]
LARGEST = float(np.finfo(np.float32).max)

moderate = st.floats(-(2.0**100), 2.0**100, width=32)


def vector(*values: float) -> Float32:
    return np.array(values, np.float32)


@given(
    data=st.data(),
    weights=st.lists(st.integers(0, 1 << 24), min_size=1, max_size=6).filter(any),
    size=st.integers(0, 9),
)
def test_every_product_and_sum_is_rounded_on_its_own_in_slot_order(
    data: st.DataObject, weights: list[int], size: int
) -> None:
    rows = [data.draw(hnp.arrays(np.float32, size, elements=moderate)) for _ in weights]
    expected = []
    for column in range(size):
        acc = np.float32(0)
        for weight, row in zip(weights, rows, strict=True):
            acc = acc + np.float32(weight / sum(weights)) * row[column]
        expected.append(acc)
    result = aggregate.mean(list(zip(itertools.count(), weights, rows, strict=False)))
    assert result.tobytes() == np.array(expected, np.float32).tobytes()


def test_the_order_of_arrival_changes_no_bit() -> None:
    rng = np.random.default_rng(1)
    parts = [(slot, 100 + slot, rng.standard_normal(50).astype(np.float32)) for slot in range(4)]
    results = {aggregate.mean(order).tobytes() for order in itertools.permutations(parts)}
    assert len(results) == 1


def test_weights_weigh() -> None:
    assert aggregate.mean([(0, 3, vector(1, 1)), (5, 1, vector(5, -3))]).tolist() == [2.0, 0.0]


def test_one_slot_of_any_weight_is_its_own_mean() -> None:
    values = vector(0.1, -7.25, 1e-40)
    assert aggregate.mean([(3, 17, values)]).tobytes() == values.tobytes()


def test_a_slot_without_weight_changes_nothing() -> None:
    values = vector(0.1, -0.2)
    assert aggregate.mean([(0, 1, values), (1, 0, vector(9, 9))]).tobytes() == values.tobytes()


def test_parts_come_one_at_a_time_and_in_slot_order() -> None:
    mean = aggregate.start("mean", {7: 1, 2: 1}, 2)
    with pytest.raises(ValueError, match="not the next"):
        mean.add(7, vector(1, 2))
    mean.add(2, vector(1, 2))
    with pytest.raises(ValueError, match="slot 7 is missing"):
        mean.result()
    mean.add(7, vector(3, 4))
    with pytest.raises(ValueError, match="not the next"):
        mean.add(7, vector(3, 4))
    assert mean.result().tolist() == [2.0, 3.0]


@pytest.mark.parametrize("bad", [vector(1, math.nan), vector(math.inf, 1), vector(1), np.ones(2)])
def test_a_part_that_is_refused_leaves_no_trace(bad: Float32) -> None:
    mean = aggregate.start("mean", {0: 1}, 2)
    with pytest.raises(InvalidDataError):
        mean.add(0, bad)
    mean.add(0, vector(4, 5))
    assert mean.result().tolist() == [4.0, 5.0]


@pytest.mark.parametrize("weights", [{}, {0: 0, 1: 0}, {0: 2, 1: -1}])
def test_weights_that_make_no_mean_are_refused(weights: dict[int, int]) -> None:
    with pytest.raises(InvalidDataError, match="weights"):
        aggregate.start("mean", weights, 2)


def test_a_slot_counts_once() -> None:
    with pytest.raises(InvalidDataError, match="once"):
        aggregate.mean([(0, 1, vector(1)), (0, 1, vector(1))])
    with pytest.raises(InvalidDataError, match="once"):
        aggregate.mean([])


def test_a_mean_that_overflows_is_refused() -> None:
    # Ten shares of one tenth, each rounded up, add to a little more than one.
    with pytest.raises(InvalidDataError, match="not finite"):
        aggregate.mean([(slot, 1, vector(LARGEST)) for slot in range(10)])


def test_slabs_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    parts = [(slot, 1, rng.standard_normal(1000).astype(np.float32)) for slot in range(3)]
    whole = aggregate.mean(parts)
    total = aggregate.sum_of_squares(parts[0][2])
    monkeypatch.setattr(weighted, "_SLAB_ELEMENTS", 64)
    monkeypatch.setattr(intake, "_SLAB_ELEMENTS", 64)
    monkeypatch.setattr(sums, "_LEAVES_AT_ONCE", 1)
    assert aggregate.mean(parts).tobytes() == whole.tobytes()
    assert aggregate.sum_of_squares(parts[0][2]) == total


@given(
    values=hnp.arrays(
        np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_a_sum_of_squares_is_right(values: Float32) -> None:
    expected = math.fsum(float(x) * float(x) for x in values)
    assert aggregate.sum_of_squares(values) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 65_537, 200_000])
def test_every_element_is_in_the_sum_once(size: int) -> None:
    assert aggregate.sum_of_squares(np.full(size, 3, np.float32)) == 9.0 * size
    ones = np.ones(size, np.float32)
    assert aggregate.sum_of_squares(ones * 3, ones) == 4.0 * size


@pytest.mark.parametrize(
    ("values", "bound", "expected"),
    [
        (vector(3, 4), 5.0, True),
        (vector(3, 4), 4.999, False),
        (vector(), 1.0, True),
        (vector(math.nan), 1e12, False),
        (vector(math.inf), 1e12, False),
        (vector(LARGEST, LARGEST), 1e12, False),
        (vector(1e-45), 1e-300, False),
    ],
)
def test_a_bound_is_on_finite_values_and_their_norm(values: Float32, bound: float, expected: bool) -> None:
    assert aggregate.bounded(values, bound) is expected


def test_the_bits_are_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    base = np.arange(10_000, dtype=np.int64)
    rows = [((base * factor % 1009 - 504) * np.float32(2.0**-9)).astype(np.float32) for factor in (7, 31, 101)]
    mean = aggregate.mean([(slot, weight, rows[slot]) for slot, weight in enumerate((1000, 700, 1024))])
    third = aggregate.mean([(slot, 1, rows[slot]) for slot in range(3)])
    golden(
        "aggregate",
        {
            "weighted": mean[:8].astype("<f4").tobytes().hex(),
            "thirds": third[:8].astype("<f4").tobytes().hex(),
            "sum of squares": aggregate.sum_of_squares(mean / np.float32(3)).hex(),
            "squared distance": aggregate.sum_of_squares(mean, third).hex(),
        },
    )
