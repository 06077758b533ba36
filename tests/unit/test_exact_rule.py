"""The arithmetic that exact training is made of, in its numpy reference."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from swarm_protocol.exact import reference, rule
from swarm_protocol.exact.rule import StepScalars
from swarm_protocol.spec import OptimizerSpec
from swarm_protocol.training import NonFiniteError

Float32 = npt.NDArray[np.float32]

numbers = st.floats(-(2.0**99), 2.0**99, width=32)
"""Zeros, subnormals, tiny and huge values alike."""
limb_counts = st.sampled_from([2, 3])


def matrices(rows: int, columns: int) -> st.SearchStrategy[Float32]:
    return hnp.arrays(np.float32, (rows, columns), elements=numbers)


def value(a: reference.Operand, limbs: int) -> list[list[Fraction]]:
    """What an operand's integers stand for, exactly."""
    unit = [Fraction(2) ** int(e - rule.fraction_bits(limbs)) for e in a.e]
    return [[int(q) * u for q in row] for row, u in zip(a.q, unit, strict=True)]


@given(x=matrices(3, 5))
def test_an_exponent_is_the_smallest_power_of_two_above_its_row(x: Float32) -> None:
    for row, e in zip(x, reference.exponents(x, axis=1)[:, 0], strict=True):
        largest = max(abs(Fraction(float(v))) for v in row)
        assert e >= rule.LOWEST_EXPONENT
        assert largest < Fraction(2) ** int(e)
        assert e == rule.LOWEST_EXPONENT or largest >= Fraction(2) ** int(e - 1)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 2.0**100, -(2.0**127)])
def test_infinities_nans_and_values_beyond_the_range_are_refused(bad: float) -> None:
    x = np.ones((2, 3), np.float32)
    x[1, 1] = bad
    with pytest.raises(NonFiniteError, match="learning rate"):
        reference.operand(x, 2)


@given(x=matrices(2, 4), limbs=limb_counts)
def test_an_operand_is_off_by_at_most_half_a_unit_of_its_scale(x: Float32, limbs: int) -> None:
    a = reference.operand(x, limbs)
    for row, values, e in zip(x, value(a, limbs), a.e, strict=True):
        half = Fraction(2) ** int(e - rule.fraction_bits(limbs) - 1)
        # Scaling a subnormal down is the one multiplication that may round, far below half a unit.
        assert all(abs(Fraction(float(x)) - v) <= half for x, v in zip(row, values, strict=True))


@given(x=matrices(2, 4), limbs=limb_counts)
def test_limbs_are_balanced_digits_that_no_int8_kernel_saturates_on(x: Float32, limbs: int) -> None:
    a = reference.operand(x, limbs)
    digits = a.limbs(limbs)
    assert len(digits) == limbs
    assert all(np.abs(digit).max() <= 64 for digit in digits)
    assert np.array_equal(sum(digit << 7 * power for power, digit in enumerate(reversed(digits))), a.q)


@given(x=matrices(2, 6), y=matrices(3, 6), limbs=limb_counts)
def test_a_product_is_that_of_its_integers_up_to_the_rounding_of_a_few_sums(x: Float32, y: Float32, limbs: int) -> None:
    a, b = reference.operand(x, limbs), reference.operand(y, limbs)
    with np.errstate(over="ignore"):
        found = reference.product(a.limbs(limbs), a.e, [limb.T for limb in b.limbs(limbs)], b.e)
    for m, row in enumerate(value(a, limbs)):
        for n, column in enumerate(value(b, limbs)):
            exact = sum((p * q for p, q in zip(row, column, strict=True)), Fraction(0))
            size = Fraction(2) ** int(a.e[m] + b.e[n])
            if abs(exact) < 2**127 and np.isfinite(found[m, n]) and a.e[m] + b.e[n] > -90:
                assert abs(Fraction(float(found[m, n])) - exact) <= 6 * 4 * limbs * size / 2**24


def test_a_product_longer_than_the_cut_is_the_sum_of_its_runs() -> None:
    length = rule.K_CUT + 3
    a = np.full((1, length), 64, np.int64)
    zero = np.zeros(1, np.int64)
    found = reference.product([a, a], zero, [a.T, a.T], zero)
    radix = np.float32(128)
    runs = [
        (np.float32(4096 * n) * radix + np.float32(2 * 4096 * n)) * radix + np.float32(4096 * n)
        for n in (rule.K_CUT, 3)
    ]
    assert found[0, 0] == np.float32(runs[0] + runs[1]) * np.float32(2.0**-26)


@given(x=hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32)))
def test_sums_pair_up_what_their_tree_says(x: Float32) -> None:
    def halves(values: list[np.float32]) -> np.float32:
        if len(values) == 1:
            return values[0]
        half = len(values) // 2
        return halves([np.float32(a + b) for a, b in zip(values[:half], values[half:], strict=True)])

    def pairs(values: list[np.float32]) -> np.float32:
        if len(values) == 1:
            return values[0]
        return pairs([np.float32(a + b) for a, b in zip(values[0::2], values[1::2], strict=True)])

    padded = [*x, *[np.float32(0)] * (rule.power_of_two_at_least(len(x)) - len(x))]
    assert reference.sum_by_halves(x) == halves(padded)
    assert reference.sum_by_pairs(x[:, None])[0] == pairs(padded)


def test_a_sum_of_squares_is_that_of_its_leaves() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2000)).astype(np.float32)
    flat = np.zeros(2 * rule.LEAF, np.float32)
    flat[:6000] = x.reshape(-1)
    leaves = [reference.sum_by_halves(leaf * leaf) for leaf in flat.reshape(2, -1)]
    assert reference.sum_of_squares(x) == np.float32(leaves[0] + leaves[1])
    assert reference.sum_of_squares(x) == pytest.approx((x.astype(np.float64) ** 2).sum(), rel=1e-6)


def test_exp_is_within_two_units_in_the_last_place() -> None:
    x = -np.geomspace(1e-30, 44, 20_000).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    assert np.abs(reference.exp(x) / expected - 1).max() < 2 * 2.0**-23
    assert reference.exp(np.zeros(1, np.float32))[0] == 1.0


def test_exp_never_leaves_a_subnormal_behind() -> None:
    lowest = reference.exp(np.array([-44, -100, -np.inf, -3e38], np.float32))
    assert (lowest == lowest[0]).all()
    assert lowest[0] > 2.0**-65


def test_log_is_within_two_units_in_the_last_place() -> None:
    x = np.geomspace(2.0**-126, 1e38, 20_000).astype(np.float32)
    expected = np.log(x.astype(np.float64))
    assert np.abs(reference.log(x) - expected).max() < 1e-5
    near = np.linspace(0.5, 2.0, 9_999).astype(np.float32)
    exact = np.log(near.astype(np.float64))
    assert (np.abs(reference.log(near) - exact) <= 2 * 2.0**-23 * np.abs(exact) + 1e-30).all()


def test_sigmoid_keeps_its_symmetry_and_its_limits() -> None:
    x = np.linspace(-60, 60, 10_001).astype(np.float32)
    s = reference.sigmoid(x)
    np.testing.assert_allclose(s, 1 / (1 + np.exp(-np.maximum(x, -44).astype(np.float64))), rtol=4e-7)
    np.testing.assert_allclose(s + s[::-1], 1.0, rtol=2e-7)


@given(theta=st.floats(1.0, 1e9), head_dim=st.sampled_from([2, 8, 64]), positions=st.integers(1, 3))
def test_rotary_tables_are_rounded_from_angles_in_float32(theta: float, head_dim: int, positions: int) -> None:
    cos, sin = rule.rotary_tables(theta, head_dim, positions)
    frequencies = np.array([theta ** -(2 * i / head_dim) for i in range(head_dim // 2)]).astype(np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    np.testing.assert_allclose(cos, np.cos(angles.astype(np.float64)), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles.astype(np.float64)), atol=1e-6)


def test_rotary_tables_are_right_far_out() -> None:
    cos, sin = rule.rotary_tables(10_000.0, 4, 1 << 17)
    angles = np.arange(1 << 17, dtype=np.float64)
    assert np.abs(cos[:, 0] - np.cos(angles)).max() < 2.0**-24
    assert np.abs(sin[:, 0] - np.sin(angles)).max() < 2.0**-24


def test_bias_corrections_are_products_and_rates_warm_up() -> None:
    spec = OptimizerSpec(name="adamw", lr=0.01, beta1=0.9, beta2=0.95, warmup_steps=4)
    first, later = StepScalars.of(spec, 0), StepScalars.of(spec, 9)
    assert first.correction2 == np.float32(1 / (1 - 0.95))
    assert first.adamw_lr == np.float32(0.0025 / (1 - 0.9))
    assert later.adamw_lr == pytest.approx(0.01 / (1 - 0.9**10), rel=1e-6)
    assert later.muon_rate(4, 1) == np.float32(0.01 * 2)
