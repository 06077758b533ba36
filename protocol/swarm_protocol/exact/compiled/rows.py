"""What the kernels share: scalars, and rows as limbs.

Row sums are done in a scratch row that stays in the cache; integers stay 32 bits wide by explicit casts, because numba
widens them otherwise and halves the speed.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from swarm_protocol.chunks import content_hash
from swarm_protocol.exact import rule

_numba: Any = importlib.import_module("numba")
_extending: Any = importlib.import_module("numba.extending")
_ir: Any = importlib.import_module("llvmlite.ir")

Function = TypeVar("Function", bound=Callable[..., Any])
Array = Any
"""A contiguous numpy array; numba infers the rest."""


def _cache_folder() -> str:
    """Where compiled code is kept: a folder of its own for these very sources, since numba sees no edits in called files."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(base) / "swarm-node" / f"numba-{_numba.__version__}-{content_hash(sources).hex()[:12]}")


if "NUMBA_CACHE_DIR" not in os.environ:
    _numba.config.CACHE_DIR = _cache_folder()


def kernel(function: Function) -> Function:
    """Compile on first use, keep the machine code, release the interpreter lock."""
    return cast(Function, _numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=False)(function))


@_extending.intrinsic  # type: ignore[untyped-decorator]
def bits_of(_context: Any, _value: Any) -> Any:
    """The bits of a float32 as an int32."""
    types = _numba.types
    return types.int32(types.float32), lambda _c, builder, _s, args: builder.bitcast(args[0], _ir.IntType(32))


@_extending.intrinsic  # type: ignore[untyped-decorator]
def from_bits(_context: Any, _value: Any) -> Any:
    """The float32 of an int32's bits."""
    types = _numba.types
    return types.float32(types.int32), lambda _c, builder, _s, args: builder.bitcast(args[0], _ir.FloatType())


i32, f32, i64 = np.int32, np.float32, np.int64

ZERO, ONE, HALF, RADIX = f32(0.0), f32(1.0), f32(0.5), f32(128.0)
ROUND, ROUND_BITS = f32(12582912.0), i32(0x4B400000)  # adding 1.5 · 2^23 rounds to an integer, in the low bits
MAGNITUDE, MANTISSA, BELOW_ONE = i32(0x7FFFFFFF), i32(0x7FFFFF), i32(0x3F000000)
LOWEST = i32(rule.LOWEST_EXPONENT)
LOG2_E, LN2_HIGH, LN2_LOW = f32(rule.LOG2_E), f32(rule.LN2_HIGH), f32(rule.LN2_LOW)
EXP_LOWEST = f32(rule.EXP_LOWEST)
E0, E1, E2, E3, E4, E5 = (f32(c) for c in rule.EXP_POLYNOMIAL)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (f32(c) for c in rule.LOG_POLYNOMIAL)
SQRT_HALF = f32(0.70710678)
LEAF = rule.LEAF
SCATTER_BITS = rule.SCATTER_BITS
ROWS = 32
"""Rows per task: a power of two, so that whole levels of a sum by pairs lie inside a task."""


@kernel
def tasks_of(rows: int) -> int:
    return (rows + ROWS - 1) // ROWS


@kernel
def rows_of(task: int, rows: int) -> Any:
    """The first row of a task, and the first that is not its any more."""
    return task * ROWS, min((task + 1) * ROWS, rows)


@kernel
def power_of_two(e: Any) -> Any:
    e = e if e > i32(-126) else i32(-126)
    e = e if e < i32(127) else i32(127)
    return from_bits(i32(i32(e + i32(127)) << i32(23)))


@kernel
def clear(x: Array) -> None:
    for j in range(x.shape[0]):
        x[j] = 0


@kernel
def copy(source: Array, target: Array) -> None:
    """A loop, because slice assignment takes numba seconds to compile."""
    for j in range(target.shape[0]):
        target[j] = source[j]


@kernel
def exponent(magnitude_bits: Any) -> Any:
    e = i32((magnitude_bits >> i32(23)) - i32(126))
    return e if e > LOWEST else LOWEST


@kernel
def magnitude_of(x: Array) -> Any:
    """Bits of the largest magnitude of a row; those of an infinity or a NaN exceed every other's."""
    m = i32(0)
    for j in range(x.shape[0]):
        b = i32(bits_of(x[j]) & MAGNITUDE)
        m = b if b > m else m
    return m


@kernel
def raise_columns(x: Array, columns: Array) -> None:
    for j in range(x.shape[0]):
        b = i32(bits_of(x[j]) & MAGNITUDE)
        columns[j] = b if b > columns[j] else columns[j]


@kernel
def digits(x: Array, scale: Array, planes: Array, t: int) -> None:
    """Integers of x · scale, element by element, as balanced digits into row t of each plane."""
    if planes.shape[0] == 2:
        high, low = planes[0, t], planes[1, t]
        for j in range(x.shape[0]):
            q = i32(bits_of(f32(x[j] * scale[j]) + ROUND) - ROUND_BITS)
            digit = i32(i32(i32(q + i32(64)) & i32(127)) - i32(64))
            low[j] = digit
            high[j] = i32(i32(q - digit) >> i32(7))
    else:
        high, middle, low = planes[0, t], planes[1, t], planes[2, t]
        for j in range(x.shape[0]):
            q = i32(bits_of(f32(x[j] * scale[j]) + ROUND) - ROUND_BITS)
            digit = i32(i32(i32(q + i32(64)) & i32(127)) - i32(64))
            low[j] = digit
            q = i32(i32(q - digit) >> i32(7))
            digit = i32(i32(i32(q + i32(64)) & i32(127)) - i32(64))
            middle[j] = digit
            high[j] = i32(i32(q - digit) >> i32(7))


@kernel
def row_digits(x: Array, scale: Any, planes: Array, t: int) -> None:
    """`digits` with one scale for the row."""
    if planes.shape[0] == 2:
        high, low = planes[0, t], planes[1, t]
        for j in range(x.shape[0]):
            q = i32(bits_of(f32(x[j] * scale) + ROUND) - ROUND_BITS)
            digit = i32(i32(i32(q + i32(64)) & i32(127)) - i32(64))
            low[j] = digit
            high[j] = i32(i32(q - digit) >> i32(7))
    else:
        high, middle, low = planes[0, t], planes[1, t], planes[2, t]
        for j in range(x.shape[0]):
            q = i32(bits_of(f32(x[j] * scale) + ROUND) - ROUND_BITS)
            digit = i32(i32(i32(q + i32(64)) & i32(127)) - i32(64))
            low[j] = digit
            q = i32(i32(q - digit) >> i32(7))
            digit = i32(i32(i32(q + i32(64)) & i32(127)) - i32(64))
            middle[j] = digit
            high[j] = i32(i32(q - digit) >> i32(7))


@kernel
def row_limbs(x: Array, planes: Array, t: int) -> Any:
    """A row as limbs with its own scale, whose exponent is returned."""
    e = exponent(magnitude_of(x))
    row_digits(x, power_of_two(i32(i32(7 * planes.shape[0] - 1) - e)), planes, t)
    return e


@kernel
def raise_status(e: Array, status: Array) -> None:
    """Keep the highest of the exponents in `status`. Not in a task: others would do the same at the same time."""
    highest = status[0]
    for j in range(e.shape[0]):
        highest = e[j] if e[j] > highest else highest
    status[0] = highest


@kernel
def column_scales(largest: Array, bits: int, e: Array, scale: Array) -> None:
    """Exponents and scales of columns from the bits of their largest magnitudes, in which each task has a row."""
    top = largest[0]
    for task in range(1, largest.shape[0]):
        row = largest[task]
        for j in range(top.shape[0]):
            top[j] = row[j] if row[j] > top[j] else top[j]
    for j in range(top.shape[0]):
        e[j] = exponent(top[j])
        scale[j] = power_of_two(i32(i32(bits) - e[j]))


@kernel
def powers_of_two(e: Array) -> Array:
    powers = np.empty(e.shape[0], f32)
    for j in range(e.shape[0]):
        powers[j] = power_of_two(e[j])
    return powers


@kernel
def halves(buffer: Array) -> Any:
    """The sum of a power of two of values, by halves; overwrites them."""
    n = buffer.shape[0]
    while n > 1:
        n //= 2
        for j in range(n):
            buffer[j] = buffer[j] + buffer[j + n]
    return buffer[0]


@kernel
def power_of_two_at_least(n: int) -> int:
    size = 1
    while size < n:
        size *= 2
    return size


@kernel
def exp(x: Any) -> Any:
    x = x if x > EXP_LOWEST else EXP_LOWEST
    n = f32(f32(x * LOG2_E) + ROUND)
    whole = i32(bits_of(n) - ROUND_BITS)
    n = n - ROUND
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    return ((p * (r * r) + r) + ONE) * from_bits(i32(i32(whole + i32(127)) << i32(23)))


@kernel
def log(x: Any) -> Any:
    bits = bits_of(x)
    e = f32(i32(bits >> i32(23)) - i32(126))
    m = from_bits(i32(i32(bits & MANTISSA) | BELOW_ONE))
    if m < SQRT_HALF:
        e = e - ONE
        m = m + m
    m = m - ONE
    square = m * m
    p = (((((((L0 * m + L1) * m + L2) * m + L3) * m + L4) * m + L5) * m + L6) * m + L7) * m + L8
    y = (p * m) * square
    y = y + e * LN2_LOW
    y = y - square * HALF
    return (m + y) + e * LN2_HIGH


@kernel
def sigmoid(x: Any) -> Any:
    t = exp(-abs(x))
    return (ONE if x >= ZERO else t) / (ONE + t)


@kernel
def finish_row(s: Array, t: int, ea: Any, eb: Array, out: Array, keep: Any) -> None:
    """out · keep + the value of one row of limb products; keep = 0 stores."""
    if s.shape[0] == 4:
        e = i32(ea - i32(26))
        a, b, c, d = s[0, t], s[1, t], s[2, t], s[3, t]
        for j in range(out.shape[0]):
            value = f32(f32(a[j]) * RADIX + f32(i32(b[j] + c[j])))
            value = f32(value * RADIX + f32(d[j])) * power_of_two(i32(e + eb[j]))
            out[j] = value if keep == ZERO else f32(out[j] * keep) + value
    else:
        e = i32(ea - i32(40))
        for j in range(out.shape[0]):
            value = f32(f32(s[0, t, j]) * RADIX + f32(i32(s[1, t, j] + s[2, t, j])))
            value = f32(value * RADIX + f32(i32(i32(s[3, t, j] + s[4, t, j]) + s[5, t, j])))
            value = f32(value * RADIX + f32(i32(s[6, t, j] + s[7, t, j])))
            value = f32(value * RADIX + f32(s[8, t, j])) * power_of_two(i32(e + eb[j]))
            out[j] = value if keep == ZERO else f32(out[j] * keep) + value
