"""Median and trimmed mean: every element's middle values, whatever the extremes are."""

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

from swarm_protocol import aggregate
from swarm_protocol.aggregate import columns
from swarm_protocol.errors import InvalidDataError

Float32 = npt.NDArray[np.float32]
COORDINATE_WISE: tuple[aggregate.Name, ...] = ("median", "trimmed_mean")

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
tables = st.tuples(st.integers(1, 12), st.integers(0, 9)).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=finite)
)


def of(name: aggregate.Name, rows: Float32, **options: float) -> Float32:
    under_way = aggregate.start(name, dict.fromkeys(range(len(rows)), 1), rows.shape[1], **options)
    for slot, row in enumerate(rows):
        under_way.add(slot, row)
    return under_way.result()


@given(rows=tables)
def test_a_median_is_the_middle_value_or_half_of_each_of_two(rows: Float32) -> None:
    ordered = np.sort(rows + np.float32(0), axis=0)
    half, middle = np.float32(0.5), len(rows) // 2
    expected = ordered[middle] if len(rows) % 2 else ordered[middle - 1] * half + ordered[middle] * half
    assert of("median", rows).tobytes() == expected.tobytes()


@given(rows=tables, fraction=st.floats(0.0, 0.49))
def test_a_trimmed_mean_adds_what_is_left_in_ascending_order(rows: Float32, fraction: float) -> None:
    trimmed = min(math.floor(fraction * len(rows)), (len(rows) - 1) // 2)
    kept = np.sort(rows + np.float32(0), axis=0)[trimmed : len(rows) - trimmed]
    expected = kept[0]
    with np.errstate(over="ignore"):
        for row in kept[1:]:
            expected = expected + row
    expected = expected / np.float32(len(kept))
    if np.isfinite(expected).all():
        assert of("trimmed_mean", rows, trim_fraction=fraction).tobytes() == expected.tobytes()
    else:
        with pytest.raises(InvalidDataError, match="not finite"):
            of("trimmed_mean", rows, trim_fraction=fraction)


@pytest.mark.parametrize("name", COORDINATE_WISE)
@given(rows=tables, data=st.data())
def test_who_holds_which_slot_changes_no_bit(name: aggregate.Name, rows: Float32, data: st.DataObject) -> None:
    rows = rows * np.float32(2.0**-8)  # so that no sum overflows
    shuffled = rows[data.draw(st.permutations(range(len(rows))))]
    assert of(name, shuffled).tobytes() == of(name, rows).tobytes()


@pytest.mark.parametrize("name", COORDINATE_WISE)
def test_three_of_sixteen_cannot_leave_the_range_of_the_others(name: aggregate.Name) -> None:
    rows = np.random.default_rng(1).standard_normal((16, 100)).astype(np.float32)
    low, high = rows[3:].min(axis=0), rows[3:].max(axis=0)
    for bad in (-3e38, 3e38):
        rows[:3] = bad
        found = of(name, rows)
        assert (low <= found).all()
        assert (found <= high).all()


def test_every_network_puts_its_places_in_order() -> None:
    rng = np.random.default_rng(2)
    for count in [*range(1, 20), 31, 32, 33, 100]:
        values = rng.integers(0, 50, (count, 40)).astype(np.float32)
        for places in (range(count), range((count - 1) // 2, count // 2 + 1), range(count // 5, count - count // 5)):
            rows = list(values.copy())
            for low, high, keep_low, keep_high in columns.network(count, places):
                smaller, larger = np.minimum(rows[low], rows[high]), np.maximum(rows[low], rows[high])
                rows[low] = smaller if keep_low else np.full(40, np.nan, np.float32)
                rows[high] = larger if keep_high else np.full(40, np.nan, np.float32)
            expected = np.sort(values, axis=0)
            assert all((rows[place] == expected[place]).all() for place in places)


def test_sixteen_values_take_a_network_of_63_comparisons() -> None:
    assert len(columns.network(16, range(16))) == 63


def test_zero_has_one_sign() -> None:
    for order in itertools.permutations([0.0, -0.0, -0.0]):
        rows = np.array(order, np.float32)[:, None]
        assert of("median", rows).tobytes() == bytes(4)
        assert of("trimmed_mean", rows).tobytes() == bytes(4)


def test_a_slot_without_weight_has_no_vote_and_others_have_one_each() -> None:
    under_way = aggregate.start("median", {0: 1, 1: 1000, 2: 0, 3: 5}, 1)
    for slot, value in enumerate([1.0, 2.0, 100.0, 3.0]):
        under_way.add(slot, np.array([value], np.float32))
    assert under_way.result().tolist() == [2.0]


@pytest.mark.parametrize("name", COORDINATE_WISE)
def test_parts_come_in_slot_order_and_bad_ones_are_refused(name: aggregate.Name) -> None:
    under_way = aggregate.start(name, {1: 1, 4: 1}, 2)
    with pytest.raises(ValueError, match="not the next"):
        under_way.add(4, np.zeros(2, np.float32))
    with pytest.raises(InvalidDataError, match="finite"):
        under_way.add(1, np.array([0, np.nan], np.float32))
    with pytest.raises(InvalidDataError, match="not 2 float32"):
        under_way.add(1, np.zeros(3, np.float32))
    under_way.add(1, np.ones(2, np.float32))
    with pytest.raises(ValueError, match="slot 4 is missing"):
        under_way.result()
    under_way.add(4, np.full(2, 3, np.float32))
    assert under_way.result().tolist() == [2.0, 2.0]
    with pytest.raises(InvalidDataError, match="weights"):
        aggregate.start(name, {0: 0}, 2)


@pytest.mark.parametrize("name", COORDINATE_WISE)
def test_slabs_change_no_bit_and_parts_are_not_written_to(
    name: aggregate.Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(3).standard_normal((7, 1000)).astype(np.float32)
    before = rows.copy()
    whole = of(name, rows)
    monkeypatch.setattr(columns, "_WORKING_SET_ELEMENTS", 1)
    assert of(name, rows).tobytes() == whole.tobytes()
    assert rows.tobytes() == before.tobytes()


def test_the_bits_of_middle_values_are_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    index = np.arange(1000, dtype=np.int64)
    factors = (7, 31, 101, 211, 307, 401, 503, 601)
    rows = np.array([(index * factor % 1009 - 504) / np.float32(3) for factor in factors]).astype(np.float32)
    for name in COORDINATE_WISE:
        golden("aggregate", {name: of(name, rows)[:8].astype("<f4").tobytes().hex()})
