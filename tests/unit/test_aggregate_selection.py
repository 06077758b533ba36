"""From sketches to the slots that an aggregate is made of: the same for everybody, and not for the liars to decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol import aggregate, sketch
from swarm_protocol.aggregate import selection
from swarm_protocol.errors import InvalidDataError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
BY_DISTANCE: tuple[aggregate.Name, ...] = ("multi_krum", "geometric_median", "centered_clip")
HONEST, LIARS, DIMENSIONS = 13, 3, 1024

LIES: dict[str, Callable[[Float64], Float64]] = {
    "flipped": lambda mean: -10 * mean,
    "inner product": lambda mean: -0.5 * mean,
    "zero": lambda mean: 0 * mean,
    "huge": lambda mean: np.full_like(mean, 1e37),
}


def points(lie: Callable[[Float64], Float64] | None = None) -> Float64:
    """16 contributions around a mean of norm 32 with spread 16; slots 13 to 15 lie."""
    rng = np.random.default_rng(5)
    found = 1 + 0.5 * rng.standard_normal((HONEST + LIARS, DIMENSIONS))
    if lie is not None:
        found[HONEST:] = lie(found[:HONEST].mean(axis=0))
    return found


def sketches(rows: Float64) -> dict[int, list[Float32]]:
    """A sketch of one block of 1024 values is those values themselves, turned and with other signs."""
    where = sketch.projection(bytes(32), 0, DIMENSIONS)
    return {slot: [sketch.of(where, row.astype(np.float32))] for slot, row in enumerate(rows)}


def weighted(rows: Float64, chosen: dict[int, int]) -> Float64:
    total = sum(chosen.values())
    return np.sum([rows[slot] * (weight / total) for slot, weight in chosen.items()], axis=0)


def equal_weights(count: int) -> dict[int, int]:
    return dict.fromkeys(range(count), 1000)


@pytest.mark.parametrize("lie", LIES)
def test_multi_krum_leaves_the_liars_out_and_keeps_the_weights_of_the_others(lie: str) -> None:
    weights = {slot: 100 + slot for slot in range(16)}
    found = aggregate.select("multi_krum", weights, sketches(points(LIES[lie])))
    assert found == {slot: 100 + slot for slot in range(HONEST)}


@pytest.mark.parametrize("name", ["geometric_median", "centered_clip"])
@pytest.mark.parametrize("lie", LIES)
def test_the_iterated_aggregates_stay_with_the_honest(name: aggregate.Name, lie: str) -> None:
    rows = points(LIES[lie])
    centre = rows[:HONEST].mean(axis=0)
    found = weighted(rows, aggregate.select(name, equal_weights(16), sketches(rows)))
    assert np.linalg.norm(found - centre) < 0.5 * np.linalg.norm(centre)


@given(
    st.integers(3, 40).flatmap(
        lambda count: st.tuples(st.just(count), st.lists(st.integers(1, 1 << 24), min_size=count, max_size=count))
    )
)
def test_krum_follows_its_definition(case: tuple[int, list[int]]) -> None:
    count, weights = case
    distances = _distances(np.random.default_rng(count).standard_normal((count, 3)))
    found = selection.multi_krum(np.array(weights, np.int64), distances)
    liars = max(0, (count - 3) // 4)
    scores = []
    for slot in range(count):
        score = 0.0
        for distance in sorted(np.delete(distances[slot], slot))[: count - liars - 2]:
            score += distance
        scores.append((score, slot))
    kept = {slot for _, slot in sorted(scores)[: count - liars]} if liars else set(range(count))
    assert found.tolist() == [weight if slot in kept else 0 for slot, weight in enumerate(weights)]


def test_of_equal_scores_the_lower_slots_are_kept() -> None:
    found = selection.multi_krum(np.ones(8, np.int64), np.zeros((8, 8)))
    assert found.tolist() == [1] * 7 + [0]


@pytest.mark.parametrize(("slots", "liars"), [(1, 0), (3, 0), (6, 0), (7, 1), (10, 1), (11, 2), (15, 3), (16, 3)])
def test_krum_is_made_for_less_than_a_quarter_of_liars(slots: int, liars: int) -> None:
    assert selection.krum_tolerates(slots) == liars
    assert aggregate.needs_sketches("multi_krum", slots) is (liars > 0)


def test_the_geometric_median_is_where_the_sum_of_distances_is_least() -> None:
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((9, 4)) * 3
    weights = rng.integers(1, 5, 9).astype(np.int64)
    found = selection.geometric_median(weights, _distances(rows))
    at = found @ rows / found.sum()

    def cost(point: Float64) -> float:
        return float(weights @ np.linalg.norm(rows - point, axis=1))

    assert all(cost(at) <= cost(at + step) for step in rng.standard_normal((200, 4)) * 1e-3)


def test_centered_clip_is_at_its_fixed_point() -> None:
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((9, 4)) * 3
    weights = np.ones(9, np.int64)
    distances = _distances(rows)
    typical = np.sort(np.sqrt(distances), axis=1)[:, 4].min()
    at = (found := selection.centered_clip(weights, distances, 0.7)) @ rows / found.sum()
    away = rows - at
    clipped = away * np.minimum(1, 0.7 * typical / np.linalg.norm(away, axis=1))[:, None]
    assert np.linalg.norm(clipped.mean(axis=0)) < 1e-6


def test_a_wide_clip_is_the_mean() -> None:
    rows = points()
    found = aggregate.select("centered_clip", equal_weights(16), sketches(rows), clip_radius=100.0)
    np.testing.assert_allclose(weighted(rows, found), rows.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_equal_contributions_are_all_alike(name: aggregate.Name) -> None:
    found = aggregate.select(name, equal_weights(6), sketches(np.ones((6, DIMENSIONS))))
    assert set(found) == set(range(6))
    assert len(set(found.values())) == 1


@pytest.mark.parametrize("name", BY_DISTANCE)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_slots_have_an_aggregate_too(name: aggregate.Name, count: int) -> None:
    assert aggregate.select(name, equal_weights(count), sketches(points()[:count]))


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_a_slot_without_weight_or_without_a_sketch_has_no_say(name: aggregate.Name) -> None:
    rows = points(LIES["zero"])
    shown = sketches(rows)
    weights = equal_weights(16) | {15: 0}
    del shown[14]
    found = aggregate.select(name, weights, shown)
    assert not {14, 15} & set(found)
    without = aggregate.select(
        name, {slot: weights[slot] for slot in range(14)}, {slot: shown[slot] for slot in range(14)}
    )
    assert found == without


@pytest.mark.parametrize("name", ["mean", "trimmed_mean", "median"])
def test_without_distances_every_slot_with_weight_is_selected(name: aggregate.Name) -> None:
    assert not aggregate.needs_sketches(name)
    assert aggregate.select(name, {3: 7, 1: 0, 2: 5}, {}) == {2: 5, 3: 7}


def test_among_few_multi_krum_is_the_mean_and_needs_no_sketches() -> None:
    assert aggregate.select("multi_krum", equal_weights(6), {}) == equal_weights(6)
    assert aggregate.needs_sketches("multi_krum")


@pytest.mark.parametrize("name", get_args(aggregate.Name))
def test_nobody_to_select_is_an_error(name: aggregate.Name) -> None:
    for weights in ({}, {0: 0}):
        with pytest.raises(InvalidDataError, match="no slot"):
            aggregate.select(name, weights, {})


def test_forgotten_sketches_are_an_error_not_a_mean() -> None:
    for name in BY_DISTANCE:
        with pytest.raises(InvalidDataError, match="no slot"):
            aggregate.select(name, equal_weights(16), {})


@pytest.mark.parametrize("name", get_args(aggregate.Name))
def test_what_is_selected_can_be_aggregated(name: aggregate.Name) -> None:
    rows = points().astype(np.float32)
    chosen = aggregate.select(name, equal_weights(16), sketches(points()))
    under_way = aggregate.start(name, chosen, DIMENSIONS)
    for slot in chosen:
        under_way.add(slot, rows[slot])
    np.testing.assert_allclose(under_way.result(), rows.mean(axis=0), atol=0.4)


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_scale_changes_no_weight(name: aggregate.Name) -> None:
    rows = points(LIES["flipped"])
    found = aggregate.select(name, equal_weights(16), sketches(rows))
    assert aggregate.select(name, equal_weights(16), sketches(rows * 2.0**-60)) == found
    assert aggregate.select(name, equal_weights(16), sketches(rows * 2.0**60)) == found


def _distances(rows: Float64) -> Float64:
    difference = rows[:, None] - rows[None]
    return np.asarray((difference * difference).sum(axis=2))


def test_the_selections_are_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    index = np.arange(DIMENSIONS, dtype=np.int64)
    rows = np.array([(index * factor % 997 - 498) * 2.0**-8 for factor in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)])
    rows += (index % 13 - 5) * 0.25
    rows[[2, 6]] *= -4
    weights = {slot: 1000 + 17 * slot for slot in range(len(rows))}
    for name in BY_DISTANCE:
        chosen = aggregate.select(name, weights, sketches(rows))
        golden("aggregate", {f"{name} selects": " ".join(f"{slot}:{weight}" for slot, weight in chosen.items())})
