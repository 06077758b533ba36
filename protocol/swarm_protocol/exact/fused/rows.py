"""What the kernels share: how they are launched, scalars, tiles of rows, and sums in the order of the rule.

Float sums are written out as trees of sums of two; a longer reduction of floats would have Triton's own order. Maxima and
sums of integers may be `tl.reduce` or atomic. Rounding to whole numbers is an addition, so that no conversion's rounding
mode matters.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from swarm_protocol.exact import rule

_MOST_ROWS = 64


def kernel(function: Callable[..., Any]) -> Any:
    """Compiled on its first launch, and kept by Triton on the disk; interpreted if TRITON_INTERPRET is set on import."""
    return triton.jit(function)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """Run a kernel on the device of its first argument. Nothing is fused: neither LLVM nor ptxas may contract.

    Raises:
        RuntimeError: the kernel cannot be compiled or loaded here, or this Triton has other options.
    """
    try:
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)
    except (TritonError, KeyError, OSError, ImportError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"the kernel {kernel.__name__} does not run here: {error}") from error


def tiles(rows: int, width: int, elements: int, widest: int) -> tuple[int, int]:
    """Rows and columns of a program's tile of such a matrix: powers of two, at most `widest` columns and so many elements."""
    columns = min(rule.power_of_two_at_least(width), widest, elements)
    return min(elements // columns, _MOST_ROWS, rule.power_of_two_at_least(rows)), columns


def whole_rows(rows: int, width: int, elements: int) -> tuple[int, int]:
    """The same with whole rows, even if one is more than so many elements."""
    columns = rule.power_of_two_at_least(width)
    return tiles(rows, width, max(elements, columns), columns)


def warps_for(elements: int) -> int:
    """Of 32 threads, for a tile of so many elements: 32 of them for each thread, and 4 warps at least."""
    return min(16, max(4, elements // 1024))


def programs(size: int, tile: int) -> int:
    return -(-size // tile)


# --- On the device

ROUND, ROUND_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)  # adding 1.5 · 2^23 rounds, in the low bits
MAGNITUDE, MANTISSA, BELOW_ONE = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7FFFFF), tl.constexpr(0x3F000000)
NEGATIVE_ZERO = tl.constexpr(-(1 << 31))  # bits: Triton's constants lose the sign of a zero
LOWEST = tl.constexpr(rule.LOWEST_EXPONENT)
LOG2_E = tl.constexpr(rule.f32(rule.LOG2_E))
LN2_HIGH, LN2_LOW = tl.constexpr(rule.f32(rule.LN2_HIGH)), tl.constexpr(rule.f32(rule.LN2_LOW))
EXP_LOWEST = tl.constexpr(rule.f32(rule.EXP_LOWEST))
E0, E1, E2, E3, E4, E5 = (tl.constexpr(rule.f32(c)) for c in rule.EXP_POLYNOMIAL)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (tl.constexpr(rule.f32(c)) for c in rule.LOG_POLYNOMIAL)
SQRT_HALF = tl.constexpr(rule.f32(0.70710678))
LEVELS = tl.constexpr(20)
"""More than any sum has."""


@kernel
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@kernel
def from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@kernel
def power_of_two(e):
    return from_bits((tl.minimum(tl.maximum(e, -126), 127) + 127) << 23)


@kernel
def magnitude(x):
    """Bits that are in the order of the absolute values; those of infinities and NaNs are above all others."""
    return bits_of(x) & MAGNITUDE


@kernel
def exponent(largest):
    """Of a row or column, from the bits of its largest magnitude."""
    return tl.maximum((largest >> 23) - 126, LOWEST)


@kernel
def whole(x):
    """x rounded half to even, as int32; |x| is at most 2^21."""
    return bits_of(x + ROUND) - ROUND_BITS


@kernel
def largest_of(x, AXIS: tl.constexpr):
    """Of int32."""
    return tl.reduce(x, AXIS, tl.standard._elementwise_max)


@kernel
def total_of(x, AXIS: tl.constexpr):
    """Of int64."""
    return tl.reduce(x, AXIS, tl.standard._sum_combine)


@kernel
def raise_status(status, e):
    """To the highest exponent of a vector; those of rows that do not exist must be the lowest."""
    tl.atomic_max(status, largest_of(e, 0), sem="relaxed")


@kernel
def store_digits(planes, plane, at, mask, q, LIMBS: tl.constexpr):
    """Integers as balanced digits at `at` of each plane; planes are `plane` elements apart."""
    plane = tl.cast(plane, tl.int64)
    for k in tl.static_range(LIMBS - 1):
        low = ((q + 64) & 127) - 64
        tl.store(planes + (LIMBS - 1 - k) * plane + at, low.to(tl.int8), mask)
        q = (q - low) >> 7
    tl.store(planes + at, q.to(tl.int8), mask)


@kernel
def load_digits(planes, plane, at, mask, LIMBS: tl.constexpr):
    """The integers of which `store_digits` made digits."""
    plane = tl.cast(plane, tl.int64)
    q = tl.load(planes + at, mask, 0).to(tl.int32)
    for k in tl.static_range(LIMBS - 1):
        q = (q << 7) + tl.load(planes + (k + 1) * plane + at, mask, 0).to(tl.int32)
    return q


@kernel
def product_value(s, plane, at, mask, e, LIMBS: tl.constexpr):
    """What integers of limb products at `at` stand for; e is the sum of their exponents."""
    plane = tl.cast(plane, tl.int64)
    value = tl.load(s + at, mask, 0).to(tl.float32)
    for weight in tl.static_range(1, 2 * LIMBS - 1):
        value = value * 128.0 + _sum_of_weight(s, plane, at, mask, weight, LIMBS).to(tl.float32)
    return value * power_of_two(e - 2 * (7 * LIMBS - 1))


@kernel
def _sum_of_weight(s, plane, at, mask, WEIGHT: tl.constexpr, LIMBS: tl.constexpr):
    """The int32 sum of the products of one weight, which lie one after the other."""
    if LIMBS == 2:
        if WEIGHT == 1:
            total = tl.load(s + plane + at, mask, 0) + tl.load(s + 2 * plane + at, mask, 0)
        else:
            total = tl.load(s + 3 * plane + at, mask, 0)
    else:
        if WEIGHT == 1:
            total = tl.load(s + plane + at, mask, 0) + tl.load(s + 2 * plane + at, mask, 0)
        elif WEIGHT == 2:
            total = tl.load(s + 3 * plane + at, mask, 0) + tl.load(s + 4 * plane + at, mask, 0)
            total = total + tl.load(s + 5 * plane + at, mask, 0)
        elif WEIGHT == 3:
            total = tl.load(s + 6 * plane + at, mask, 0) + tl.load(s + 7 * plane + at, mask, 0)
        else:
            total = tl.load(s + 8 * plane + at, mask, 0)
    return total


@kernel
def sum_of_two(x, AXIS: tl.constexpr):
    """Over an axis of length 2: one addition, so that there is no order."""
    tl.static_assert(x.shape[AXIS] == 2)
    return tl.reduce(x, AXIS, tl.standard._sum_combine)


@kernel
def halves(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Of x [ROWS, WIDTH]: sums over the last axis, x[i] + x[i + WIDTH / 2] until one is left."""
    for level in tl.static_range(LEVELS):
        if (WIDTH >> level) > 1:
            x = sum_of_two(tl.reshape(x, (ROWS, 2, WIDTH >> (level + 1))), 1)
    return tl.reshape(x, (ROWS,))


@kernel
def halves_of_columns(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Of x [ROWS, WIDTH]: sums over the first axis, x[i] + x[i + ROWS / 2] until one is left."""
    for level in tl.static_range(LEVELS):
        if (ROWS >> level) > 1:
            x = sum_of_two(tl.reshape(x, (2, ROWS >> (level + 1), WIDTH)), 0)
    return tl.reshape(x, (WIDTH,))


@kernel
def pairs_of_columns(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Of x [ROWS, WIDTH]: sums over the first axis, x[2i] + x[2i + 1] until one is left."""
    for level in tl.static_range(LEVELS):
        if (ROWS >> level) > 1:
            x = sum_of_two(tl.reshape(x, (ROWS >> (level + 1), 2, WIDTH)), 1)
    return tl.reshape(x, (WIDTH,))


@kernel
def exp(x):
    x = tl.where(x < EXP_LOWEST, EXP_LOWEST, x)
    shifted = x * LOG2_E + ROUND
    n = shifted - ROUND
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    return ((p * (r * r) + r) + 1.0) * power_of_two(bits_of(shifted) - ROUND_BITS)


@kernel
def log(x):
    bits = bits_of(x)
    e = ((bits >> 23) - 126).to(tl.float32)
    m = from_bits((bits & MANTISSA) | BELOW_ONE)
    small = m < SQRT_HALF
    e = tl.where(small, e - 1.0, e)
    m = tl.where(small, m + m, m) - 1.0
    square = m * m
    p = (((((((L0 * m + L1) * m + L2) * m + L3) * m + L4) * m + L5) * m + L6) * m + L7) * m + L8
    y = (p * m) * square
    y = y + e * LN2_LOW
    y = y - square * 0.5
    return (m + y) + e * LN2_HIGH


@kernel
def reciprocal(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@kernel
def sigmoid(x):
    t = exp(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0.0, 1.0, t), 1.0 + t)
