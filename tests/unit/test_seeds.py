"""Random choices are functions of public numbers, the same everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol import seeds

Golden = Callable[[str, dict[str, object]], None]


def _hex(words: np.ndarray) -> list[str]:
    return [f"{int(word):016x}" for word in words]


def test_numpys_philox_is_the_one_the_protocol_means() -> None:
    generator = np.random.Philox(key=np.array([7, 1], dtype=np.uint64), counter=np.array([0, 0, 3, 5], dtype=np.uint64))
    assert _hex(generator.random_raw(2)) == ["c2ed23f19dc0bed6", "2fc091e212a57641"]


def test_streams_and_permutations_are_pinned(golden: Golden) -> None:
    golden(
        "seeds",
        {
            "key(7, 'data')": _hex(np.array(seeds.key(7, "data"), dtype=np.uint64)),
            "raw(7, 'data', 1, 2, 3, 5)": _hex(seeds.raw(7, "data", 1, 2, 3, 5)),
            "raw(2^63-1, 'weights', 0, 2^32, 2^64-1, 3)": _hex(
                seeds.raw((1 << 63) - 1, "weights", 0, 1 << 32, (1 << 64) - 1, 3)
            ),
            "uniform_f32 of raw(7, 'weights', 0, 0, 0, 4), bytes": seeds.uniform_f32(
                seeds.raw(7, "weights", 0, 0, 0, 4)
            )
            .astype("<f4")
            .tobytes()
            .hex(),
            "Permutation(2, 7, 'order')": seeds.Permutation(2, 7, "order")(np.arange(2)).tolist(),
            "Permutation(13, 7, 'order', 1, 2, 3)": seeds.Permutation(13, 7, "order", 1, 2, 3)(np.arange(13)).tolist(),
            "Permutation(1000003, 7, 'order') at 0..7": seeds.Permutation(1000003, 7, "order")(np.arange(8)).tolist(),
            "Permutation(2^62, 7, 'order') at 0..3": seeds.Permutation(1 << 62, 7, "order")(np.arange(4)).tolist(),
        },
    )


def test_every_coordinate_of_a_draw_changes_it() -> None:
    draws = [
        seeds.raw(*where, 4).tobytes()
        for where in [(1, "a", 0, 0, 0), (2, "a", 0, 0, 0), (1, "b", 0, 0, 0), (1, "a", 1, 0, 0), (1, "a", 0, 1, 0),
                      (1, "a", 0, 0, 1)]
    ]  # fmt: skip
    assert len(set(draws)) == len(draws)


def test_a_longer_draw_starts_with_the_shorter_one() -> None:
    assert np.array_equal(seeds.raw(1, "a", 2, 3, 4, 100)[:7], seeds.raw(1, "a", 2, 3, 4, 7))


@pytest.mark.parametrize("numbers", [(-1, 0, 0, 0), (1 << 64, 0, 0, 0), (0, -1, 0, 0), (0, 0, 1 << 64, 0)])
def test_a_number_beyond_64_bits_is_refused(numbers: tuple[int, int, int, int]) -> None:
    run_seed, *rest = numbers
    with pytest.raises(ValueError, match="64 bits"):
        seeds.raw(run_seed, "a", *rest, 1)


def test_uniforms_are_exact_multiples_of_two_to_the_minus_24() -> None:
    words = np.concatenate([np.array([0, (1 << 64) - 1, 1 << 63], dtype=np.uint64), seeds.raw(1, "a", 0, 0, 0, 1000)])
    uniforms = seeds.uniform_f32(words)
    assert uniforms.dtype == np.float32
    assert uniforms[:3].tolist() == [-0.5, 0.5 - 2.0**-24, 0.0]
    expected = [(int(word) >> 40) * 2.0**-24 - 0.5 for word in words]
    assert uniforms.astype(np.float64).tolist() == expected
    assert abs(float(uniforms.mean())) < 0.05


@given(n=st.integers(1, 3000), run_seed=st.integers(0, (1 << 63) - 1), epoch=st.integers(0, 1 << 40))
def test_a_permutation_hits_every_element_once_and_its_inverse_undoes_it(n: int, run_seed: int, epoch: int) -> None:
    permutation = seeds.Permutation(n, run_seed, "order", epoch)
    image = permutation(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))
    assert np.array_equal(permutation.inverse(image), np.arange(n))


@given(n=st.integers(1, 1 << 62), data=st.data())
def test_a_permutation_of_any_size_stays_inside_and_is_undone(n: int, data: st.DataObject) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=np.int64)
    permutation = seeds.Permutation(n, 3, "order")
    image = permutation(indices)
    assert image.dtype == np.int64
    assert np.all((image >= 0) & (image < n))
    assert np.array_equal(permutation.inverse(image), indices)


def test_an_index_goes_to_the_same_place_alone_and_among_many() -> None:
    permutation = seeds.Permutation(100_003, 5, "order")
    image = permutation(np.arange(100_003))
    assert int(permutation(np.array(77_777))) == image[77_777]
    assert permutation(np.arange(12).reshape(3, 4)).shape == (3, 4)
    assert permutation(np.array([], dtype=np.int64)).size == 0


@pytest.mark.parametrize("n", [3, 4, 5])
def test_small_permutations_take_every_order_about_equally_often_per_element(n: int) -> None:
    counts = np.zeros((n, n))
    for epoch in range(1500):
        counts[np.arange(n), seeds.Permutation(n, 11, "order", epoch)(np.arange(n))] += 1
    assert np.all(np.abs(counts - 1500 / n) < 120)


def test_neighbours_do_not_stay_neighbours() -> None:
    image = seeds.Permutation(1 << 16, 1, "order")(np.arange(1 << 16))
    assert abs(float(np.corrcoef(image[:-1], image[1:])[0, 1])) < 0.02
    assert abs(float(np.corrcoef(np.arange(1 << 16), image)[0, 1])) < 0.02
    other = seeds.Permutation(1 << 16, 2, "order")(np.arange(1 << 16))
    assert int(np.sum(image == other)) < 12


@pytest.mark.parametrize("n", [0, -1, (1 << 62) + 1])
def test_a_size_out_of_range_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="elements"):
        seeds.Permutation(n, 1, "order")


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    permutation = seeds.Permutation(10, 1, "order")
    with pytest.raises(ValueError, match="outside"):
        permutation(np.array([index]))
    with pytest.raises(ValueError, match="outside"):
        permutation.inverse(np.array([index]))


def test_a_permutation_is_quick_enough_to_recompute_any_epoch() -> None:
    permutation = seeds.Permutation(1_000_000, 1, "order")
    indices = np.arange(1_000_000)
    started = time.process_time()
    permutation(indices)
    assert time.process_time() - started < 1.0
