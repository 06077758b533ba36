"""The passes between products, compiled by numba: one trip over the rows each, vectorised by LLVM.

Same functions, same bits as `eager`, several times faster. Numba is compiled without fastmath, so no multiplication is
fused with an addition; a test reads the machine code for it. `numba` is an optional dependency: importing this module
without it raises ImportError.

Row sums are done in a scratch row that stays in the cache; integers stay 32 bits wide by explicit casts, because numba
widens them otherwise and halves the speed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from swarm_protocol.exact import rule
from swarm_protocol.exact.rule import StepScalars

_numba: Any = importlib.import_module("numba")
_extending: Any = importlib.import_module("numba.extending")
_ir: Any = importlib.import_module("llvmlite.ir")

Function = TypeVar("Function", bound=Callable[..., Any])
Array = Any
"""A contiguous numpy array; numba infers the rest."""


def kernel(function: Function) -> Function:
    """Compile on first use, keep the machine code beside the source, release the interpreter lock."""
    return cast(Function, _numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=False)(function))


@_extending.intrinsic  # type: ignore[untyped-decorator]
def _bits(_context: Any, _value: Any) -> Any:
    """The bits of a float32 as an int32."""
    types = _numba.types
    return types.int32(types.float32), lambda _c, builder, _s, args: builder.bitcast(args[0], _ir.IntType(32))


@_extending.intrinsic  # type: ignore[untyped-decorator]
def _float(_context: Any, _value: Any) -> Any:
    """The float32 of an int32's bits."""
    types = _numba.types
    return types.float32(types.int32), lambda _c, builder, _s, args: builder.bitcast(args[0], _ir.FloatType())


i32, f32, i64 = np.int32, np.float32, np.int64

_ZERO, _ONE, _HALF, _RADIX = f32(0.0), f32(1.0), f32(0.5), f32(128.0)
_ROUND, _ROUND_BITS = f32(12582912.0), i32(0x4B400000)  # adding 1.5 · 2^23 rounds to an integer, in the low bits
_MAGNITUDE, _MANTISSA, _BELOW_ONE = i32(0x7FFFFFFF), i32(0x7FFFFF), i32(0x3F000000)
_LOWEST = i32(rule.LOWEST_EXPONENT)
_LOG2_E, _LN2_HIGH, _LN2_LOW = f32(rule.LOG2_E), f32(rule.LN2_HIGH), f32(rule.LN2_LOW)
_EXP_LOWEST = f32(rule.EXP_LOWEST)
_E0, _E1, _E2, _E3, _E4, _E5 = (f32(c) for c in rule.EXP_POLYNOMIAL)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (f32(c) for c in rule.LOG_POLYNOMIAL)
_SQRT_HALF = f32(0.70710678)
_LEAF = rule.LEAF
_SCATTER_BITS = rule.SCATTER_BITS


# --- Scalars and rows


@kernel
def _power_of_two(e: Any) -> Any:
    e = e if e > i32(-126) else i32(-126)
    e = e if e < i32(127) else i32(127)
    return _float(i32(i32(e + i32(127)) << i32(23)))


@kernel
def _exponent(magnitude_bits: Any) -> Any:
    e = i32((magnitude_bits >> i32(23)) - i32(126))
    return e if e > _LOWEST else _LOWEST


@kernel
def _largest(x: Array) -> Any:
    """Bits of the largest magnitude of a row; those of an infinity or a NaN exceed every other's."""
    m = i32(0)
    for j in range(x.shape[0]):
        b = i32(_bits(x[j]) & _MAGNITUDE)
        m = b if b > m else m
    return m


@kernel
def _raise_columns(x: Array, columns: Array) -> None:
    for j in range(x.shape[0]):
        b = i32(_bits(x[j]) & _MAGNITUDE)
        columns[j] = b if b > columns[j] else columns[j]


@kernel
def _digits(x: Array, scale: Array, planes: Array, t: int) -> None:
    """Integers of x · scale, element by element, as balanced digits into row t of each plane."""
    if planes.shape[0] == 2:
        high, low = planes[0, t], planes[1, t]
        for j in range(x.shape[0]):
            q = i32(_bits(f32(x[j] * scale[j]) + _ROUND) - _ROUND_BITS)
            digit = i32(i32(i32(q + i32(64)) & i32(127)) - i32(64))
            low[j] = digit
            high[j] = i32(i32(q - digit) >> i32(7))
    else:
        high, middle, low = planes[0, t], planes[1, t], planes[2, t]
        for j in range(x.shape[0]):
            q = i32(_bits(f32(x[j] * scale[j]) + _ROUND) - _ROUND_BITS)
            digit = i32(i32(i32(q + i32(64)) & i32(127)) - i32(64))
            low[j] = digit
            q = i32(i32(q - digit) >> i32(7))
            digit = i32(i32(i32(q + i32(64)) & i32(127)) - i32(64))
            middle[j] = digit
            high[j] = i32(i32(q - digit) >> i32(7))


@kernel
def _row_digits(x: Array, scale: Any, planes: Array, t: int) -> None:
    """`_digits` with one scale for the row."""
    if planes.shape[0] == 2:
        high, low = planes[0, t], planes[1, t]
        for j in range(x.shape[0]):
            q = i32(_bits(f32(x[j] * scale) + _ROUND) - _ROUND_BITS)
            digit = i32(i32(i32(q + i32(64)) & i32(127)) - i32(64))
            low[j] = digit
            high[j] = i32(i32(q - digit) >> i32(7))
    else:
        high, middle, low = planes[0, t], planes[1, t], planes[2, t]
        for j in range(x.shape[0]):
            q = i32(_bits(f32(x[j] * scale) + _ROUND) - _ROUND_BITS)
            digit = i32(i32(i32(q + i32(64)) & i32(127)) - i32(64))
            low[j] = digit
            q = i32(i32(q - digit) >> i32(7))
            digit = i32(i32(i32(q + i32(64)) & i32(127)) - i32(64))
            middle[j] = digit
            high[j] = i32(i32(q - digit) >> i32(7))


@kernel
def _row_limbs(x: Array, planes: Array, t: int, status: Array) -> Any:
    """A row as limbs with its own scale, whose exponent is returned, and kept in `status` where it is the highest."""
    e = _exponent(_largest(x))
    status[0] = max(status[0], e)
    _row_digits(x, _power_of_two(i32(i32(7 * planes.shape[0] - 1) - e)), planes, t)
    return e


@kernel
def _column_scales(largest: Array, bits: int, e: Array, scale: Array, status: Array) -> None:
    """Exponents and scales of columns from the bits of their largest magnitudes."""
    for j in range(largest.shape[0]):
        e[j] = _exponent(largest[j])
        status[0] = max(status[0], e[j])
        scale[j] = _power_of_two(i32(i32(bits) - e[j]))


@kernel
def _halves(buffer: Array) -> Any:
    """The sum of a power of two of values, by halves; overwrites them."""
    n = buffer.shape[0]
    while n > 1:
        n //= 2
        for j in range(n):
            buffer[j] = buffer[j] + buffer[j + n]
    return buffer[0]


@kernel
def _power_of_two_at_least(n: int) -> int:
    size = 1
    while size < n:
        size *= 2
    return size


@kernel
def _exp(x: Any) -> Any:
    x = x if x > _EXP_LOWEST else _EXP_LOWEST
    n = f32(f32(x * _LOG2_E) + _ROUND)
    whole = i32(_bits(n) - _ROUND_BITS)
    n = n - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = ((((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _E5
    return ((p * (r * r) + r) + _ONE) * _float(i32(i32(whole + i32(127)) << i32(23)))


@kernel
def _log(x: Any) -> Any:
    bits = _bits(x)
    e = f32(i32(bits >> i32(23)) - i32(126))
    m = _float(i32(i32(bits & _MANTISSA) | _BELOW_ONE))
    if m < _SQRT_HALF:
        e = e - _ONE
        m = m + m
    m = m - _ONE
    square = m * m
    p = ((((((((_L0 * m + _L1) * m + _L2) * m + _L3) * m + _L4) * m + _L5) * m + _L6) * m + _L7) * m + _L8)
    y = (p * m) * square
    y = y + e * _LN2_LOW
    y = y - square * _HALF
    return (m + y) + e * _LN2_HIGH


@kernel
def _sigmoid(x: Any) -> Any:
    t = _exp(-abs(x))
    return (_ONE if x >= _ZERO else t) / (_ONE + t)


@kernel
def _finish_row(s: Array, t: int, ea: Any, eb: Array, out: Array, keep: Any) -> None:
    """out · keep + the value of one row of limb products; keep = 0 stores."""
    if s.shape[0] == 3:
        e = i32(ea - i32(19))
        a, b, c = s[0, t], s[1, t], s[2, t]
        for j in range(out.shape[0]):
            value = f32(f32(a[j]) * _RADIX + f32(i32(b[j] + c[j]))) * _power_of_two(i32(e + eb[j]))
            out[j] = value if keep == _ZERO else f32(out[j] * keep) + value
    else:
        e = i32(ea - i32(26))
        a, b, c = s[0, t], s[1, t], s[2, t]
        u, v, w = s[3, t], s[4, t], s[5, t]
        for j in range(out.shape[0]):
            value = f32(f32(a[j]) * _RADIX + f32(i32(b[j] + c[j])))
            value = f32(value * _RADIX + f32(i32(i32(u[j] + v[j]) + w[j]))) * _power_of_two(i32(e + eb[j]))
            out[j] = value if keep == _ZERO else f32(out[j] * keep) + value


# --- Limbs of rows and columns


@kernel
def _finish(s: Array, ea: Array, eb: Array, out: Array, keep: Any) -> None:
    for t in range(out.shape[0]):
        _finish_row(s, t, ea[t], eb, out[t], keep)


@kernel
def _limbs(x: Array, planes: Array, e: Array, status: Array) -> None:
    for t in range(x.shape[0]):
        e[t] = _row_limbs(x[t], planes, t, status)


@kernel
def _gradient_limbs(
    dy: Array,
    fold: Array,
    x_e: Array,
    grain: int,
    rows: Array,
    rows_e: Array,
    columns: Array,
    columns_e: Array,
    status: Array,
) -> None:
    tokens, width = dy.shape
    factor, buffer, scale = np.empty(width, f32), np.empty(width, f32), np.empty(width, f32)
    largest = np.empty(width, i32)
    for j in range(width):
        factor[j] = _power_of_two(fold[j])
    for g in range(columns_e.shape[0]):
        first, last = g * grain, min(tokens, (g + 1) * grain)
        largest[:] = i32(0)
        for t in range(first, last):
            row = dy[t]
            for j in range(width):
                buffer[j] = row[j] * factor[j]
            rows_e[t] = _row_limbs(buffer, rows, t, status)
            token = _power_of_two(x_e[t])
            for j in range(width):
                b = i32(_bits(f32(row[j] * token)) & _MAGNITUDE)
                largest[j] = b if b > largest[j] else largest[j]
        _column_scales(largest, 7 * columns.shape[0] - 1, columns_e[g], scale, status)
        for t in range(first, last):
            row, token = dy[t], _power_of_two(x_e[t])
            for j in range(width):
                buffer[j] = row[j] * token
            _digits(buffer, scale, columns, t)


# --- Normalisation, SwiGLU, loss, embedding


@kernel
def _norm_limbs(x: Array, gain: Array, eps: Any, planes: Array, e: Array, r: Array, status: Array) -> None:
    tokens, width = x.shape
    buffer, row = np.empty(_power_of_two_at_least(width), f32), np.empty(width, f32)
    share = _ONE / f32(width)
    for t in range(tokens):
        source = x[t]
        for j in range(width):
            buffer[j] = source[j] * source[j]
        buffer[width:] = _ZERO
        rms = _ONE / np.sqrt(f32(_halves(buffer) * share) + eps)
        r[t] = rms
        for j in range(width):
            row[j] = f32(source[j] * rms) * gain[j]
        e[t] = _row_limbs(row, planes, t, status)


@kernel
def _norm_gradient(
    dy: Array, x: Array, r: Array, gain: Array, grain: int, dx: Array, gain_gradient: Array, keep: bool
) -> None:
    tokens, width = x.shape
    buffer, dn, n = np.empty(_power_of_two_at_least(width), f32), np.empty(width, f32), np.empty(width, f32)
    pairs = np.empty((64, width), f32)
    share = _ONE / f32(width)
    for first in range(0, tokens, grain):
        count = min(tokens, first + grain) - first
        padded = _power_of_two_at_least(count)
        top = 0
        for index in range(padded):
            held = pairs[63]
            if index < count:
                t = first + index
                source, upstream, target, rms = x[t], dy[t], dx[t], r[t]
                for j in range(width):
                    n[j] = source[j] * rms
                    dn[j] = upstream[j] * gain[j]
                    buffer[j] = dn[j] * n[j]
                    held[j] = upstream[j] * n[j]
                buffer[width:] = _ZERO
                c = f32(_halves(buffer) * share)
                for j in range(width):
                    target[j] = target[j] + f32(f32(dn[j] - f32(n[j] * c)) * rms)
            else:
                held[:] = _ZERO
            # A binary counter: level k holds the sum of 2^k rows that waits for its neighbour.
            level, carry = 0, index
            while carry & 1:
                left = pairs[level]
                for j in range(width):
                    held[j] = left[j] + held[j]
                carry >>= 1
                level += 1
            pairs[level, :] = held
            top = level
        total = pairs[top]
        if keep or first > 0:
            for j in range(width):
                gain_gradient[j] = gain_gradient[j] + total[j]
        else:
            gain_gradient[:] = total


@kernel
def _swiglu_limbs(gate_up: Array, planes: Array, e: Array, status: Array) -> None:
    width = planes.shape[2]
    row = np.empty(width, f32)
    for t in range(gate_up.shape[0]):
        gate, up = gate_up[t, :width], gate_up[t, width:]
        for j in range(width):
            row[j] = f32(gate[j] * _sigmoid(gate[j])) * up[j]
        e[t] = _row_limbs(row, planes, t, status)


@kernel
def _swiglu_gradient(dy: Array, gate_up: Array) -> None:
    width = dy.shape[1]
    for t in range(dy.shape[0]):
        upstream, gate, up = dy[t], gate_up[t, :width], gate_up[t, width:]
        for j in range(width):
            g, u, d = gate[j], up[j], upstream[j]
            s = _sigmoid(g)
            gate[j] = f32(f32(d * u) * s) * f32(_ONE + f32(g * f32(_ONE - s)))
            up[j] = d * f32(g * s)


@kernel
def _cross_entropy(logits: Array, targets: Array, share: Any, losses: Array) -> None:
    tokens, width = logits.shape
    buffer, p = np.empty(_power_of_two_at_least(width), f32), np.empty(width, f32)
    for t in range(tokens):
        z, target = logits[t], targets[t]
        m = z[0]
        for j in range(width):
            m = z[j] if z[j] > m else m
        for j in range(width):
            p[j] = _exp(z[j] - m)
            buffer[j] = p[j]
        buffer[width:] = _ZERO
        total = _halves(buffer)
        losses[t] = _log(total) - f32(z[target] - m)
        r = _ONE / total
        for j in range(width):
            z[j] = f32(p[j] * r) * share
        z[target] = f32(f32(p[target] * r) - _ONE) * share


@kernel
def _embedding_gradient(dx: Array, rows: Array, sums: Array, e: Array, status: Array) -> None:
    """Integer sums of the rows of dx by `rows[t]`, and the exponent of each column."""
    width = dx.shape[1]
    largest, scale = np.zeros(width, i32), np.empty(width, f32)
    for t in range(dx.shape[0]):
        _raise_columns(dx[t], largest)
    _column_scales(largest, _SCATTER_BITS, e, scale, status)
    for t in range(dx.shape[0]):
        total, row = sums[rows[t]], dx[t]
        for j in range(width):
            total[j] = total[j] + i64(np.rint(f32(row[j] * scale[j])))


# --- Attention. Index c counts the key-value heads of all sequences; rows of a head's queries are (group, position).


@kernel
def _rotated(source: Array, cos: Array, sin: Array, target: Array) -> None:
    half = cos.shape[0]
    for j in range(half):
        a, b = source[j], source[j + half]
        target[j] = f32(a * cos[j]) - f32(b * sin[j])
        target[j + half] = f32(b * cos[j]) + f32(a * sin[j])


@kernel
def _heads(
    qkv: Array, cos: Array, sin: Array, q: Array, q_e: Array, k: Array, k_e: Array, v: Array, v_e: Array, status: Array
) -> None:
    limbs, heads, positions, size = k.shape
    group = q.shape[2] // positions
    kv_heads = qkv.shape[1] // size // (group + 2)
    row, scale, largest = np.empty(size, f32), np.empty(size, f32), np.empty(size, i32)
    for c in range(heads):
        sequence, head = c // kv_heads, c % kv_heads
        largest[:] = i32(0)
        for s in range(positions):
            source = qkv[sequence * positions + s]
            for g in range(group):
                at = (head * group + g) * size
                _rotated(source[at : at + size], cos[s], sin[s], row)
                q_e[c, g * positions + s] = _row_limbs(row, q[:, c], g * positions + s, status)
            at = (kv_heads * group + head) * size
            _rotated(source[at : at + size], cos[s], sin[s], row)
            k_e[c, s] = _row_limbs(row, k[:, c], s, status)
            at = (kv_heads * (group + 1) + head) * size
            _raise_columns(source[at : at + size], largest)
        _column_scales(largest, 7 * limbs - 1, v_e[c], scale, status)
        at = (kv_heads * (group + 1) + head) * size
        for s in range(positions):
            _digits(qkv[sequence * positions + s, at : at + size], scale, v[:, c], s)


@kernel
def _softmax_limbs(s: Array, q_e: Array, k_e: Array, scale: Any, planes: Array, r: Array) -> None:
    limbs, rows, positions = planes.shape
    row = np.empty(positions, f32)
    bits = 7 * limbs - 1
    one, unit = _power_of_two(i32(bits)), _power_of_two(i32(-bits))
    for t in range(rows):
        visible = t % positions + 1
        seen = row[:visible]
        _finish_row(s, t, q_e[t], k_e, seen, _ZERO)
        for j in range(visible):
            seen[j] = seen[j] * scale
        m = seen[0]
        for j in range(visible):
            m = seen[j] if seen[j] > m else m
        total = i64(0)
        for j in range(visible):
            p = _exp(seen[j] - m)
            seen[j] = p
            total += i64(i32(_bits(f32(p * one) + _ROUND) - _ROUND_BITS))
        row[visible:] = _ZERO
        _row_digits(row, one, planes, t)
        # A score that overflowed must not pass for a weight: NaN is refused where it next becomes limbs.
        r[t] = _ONE / f32(f32(total) * unit) if m < f32(np.inf) else f32(np.nan)


@kernel
def _place_heads(s: Array, v_e: Array, r: Array, out: Array, column: int) -> None:
    """Finish a head's weighted values [G·S, H] and put them into the rows of its sequence, from `column` on."""
    positions, size, rows = out.shape[0], s.shape[2], s.shape[1]
    for t in range(rows):
        at = column + (t // positions) * size
        target = out[t % positions, at : at + size]
        _finish_row(s, t, i32(0), v_e, target, _ZERO)
        for j in range(size):
            target[j] = target[j] * r[t]


@kernel
def _attended_limbs(
    out: Array,
    d_out: Array,
    column: int,
    v_e: Array,
    r: Array,
    rows: Array,
    rows_e: Array,
    columns: Array,
    columns_e: Array,
    correction: Array,
    status: Array,
) -> None:
    """Of one head's d_out: limbs by rows with v's scales folded in, by columns with r folded in; and rows of d_out · out."""
    positions, size = out.shape[0], rows.shape[2]
    buffer, folded, scale = np.empty(_power_of_two_at_least(size), f32), np.empty(size, f32), np.empty(size, f32)
    largest = np.zeros(size, i32)
    for t in range(rows.shape[1]):
        at = column + (t // positions) * size
        y, dy = out[t % positions, at : at + size], d_out[t % positions, at : at + size]
        for j in range(size):
            buffer[j] = dy[j] * y[j]
            folded[j] = dy[j] * _power_of_two(v_e[j])
            b = i32(_bits(f32(dy[j] * r[t])) & _MAGNITUDE)
            largest[j] = b if b > largest[j] else largest[j]
        buffer[size:] = _ZERO
        correction[t] = _halves(buffer)
        rows_e[t] = _row_limbs(folded, rows, t, status)
    _column_scales(largest, 7 * columns.shape[0] - 1, columns_e, scale, status)
    for t in range(rows.shape[1]):
        at = column + (t // positions) * size
        dy = d_out[t % positions, at : at + size]
        for j in range(size):
            folded[j] = dy[j] * r[t]
        _digits(folded, scale, columns, t)


@kernel
def _softmax_gradient_limbs(
    s: Array,
    s_e: Array,
    weights: Array,
    r: Array,
    correction: Array,
    scale: Any,
    q_e: Array,
    k_e: Array,
    d_s: Array,
    rows: Array,
    rows_e: Array,
    columns: Array,
    columns_e: Array,
    status: Array,
) -> None:
    """From products for d_weights [G·S, S]: limbs of the scores' gradient by rows and by columns. Overwrites d_s."""
    limbs, total_rows, positions = weights.shape
    unit = _power_of_two(i32(1 - 7 * limbs))
    folded, column_scale, key = np.empty(positions, f32), np.empty(positions, f32), np.empty(positions, f32)
    largest, zeros = np.zeros(positions, i32), np.zeros(positions, i32)
    for j in range(positions):
        key[j] = _power_of_two(k_e[j])
    for t in range(total_rows):
        visible = t % positions + 1
        row, query = d_s[t], _power_of_two(q_e[t])
        seen = row[:visible]
        _finish_row(s, t, s_e[t], zeros, seen, _ZERO)
        high, low, last = weights[0, t], weights[1, t], weights[limbs - 1, t]
        if limbs == 2:
            for j in range(visible):
                p = f32(i32(i32(i32(high[j]) << i32(7)) + i32(low[j])))
                seen[j] = f32(f32(f32(p * unit) * r[t]) * f32(seen[j] - correction[t])) * scale
        else:
            for j in range(visible):
                upper = i32(i32(i32(high[j]) << i32(7)) + i32(low[j]))
                p = f32(i32(i32(upper << i32(7)) + i32(last[j])))
                seen[j] = f32(f32(f32(p * unit) * r[t]) * f32(seen[j] - correction[t])) * scale
        row[visible:] = _ZERO
        for j in range(positions):
            folded[j] = row[j] * key[j]
            b = i32(_bits(f32(row[j] * query)) & _MAGNITUDE)
            largest[j] = b if b > largest[j] else largest[j]
        rows_e[t] = _row_limbs(folded, rows, t, status)
    _column_scales(largest, 7 * limbs - 1, columns_e, column_scale, status)
    for t in range(total_rows):
        row, query = d_s[t], _power_of_two(q_e[t])
        for j in range(positions):
            folded[j] = row[j] * query
        _digits(folded, column_scale, columns, t)


@kernel
def _place_gradients(d_q: Array, d_k: Array, d_v: Array, cos: Array, sin: Array, head: int, d_qkv: Array) -> None:
    """One head's gradients into the rows of its sequence, queries and keys rotated back."""
    positions, size = d_k.shape
    group = d_q.shape[0] // positions
    kv_heads = d_qkv.shape[1] // size // (group + 2)
    back = np.empty(size // 2, f32)
    for s in range(positions):
        for j in range(size // 2):
            back[j] = -sin[s, j]
        for g in range(group):
            at = (head * group + g) * size
            _rotated(d_q[g * positions + s], cos[s], back, d_qkv[s, at : at + size])
        at = (kv_heads * group + head) * size
        _rotated(d_k[s], cos[s], back, d_qkv[s, at : at + size])
        at = (kv_heads * (group + 1) + head) * size
        d_qkv[s, at : at + size] = d_v[s]


# --- Optimizers, over flat vectors


@kernel
def _leaf_squares(x: Array, leaves: Array) -> None:
    buffer = np.empty(_LEAF, f32)
    for leaf in range(leaves.shape[0]):
        part = x[leaf * _LEAF : min((leaf + 1) * _LEAF, x.shape[0])]
        for j in range(part.shape[0]):
            buffer[j] = part[j] * part[j]
        buffer[part.shape[0] :] = _ZERO
        leaves[leaf] = _halves(buffer)


@kernel
def _adamw(
    p: Array,
    g: Array,
    factor: Any,
    m: Array,
    v: Array,
    beta1: Any,
    rest1: Any,
    beta2: Any,
    rest2: Any,
    correction2: Any,
    eps: Any,
    lr: Any,
    decay: Any,
) -> None:
    for j in range(p.shape[0]):
        gradient = g[j] * factor
        first = f32(m[j] * beta1) + f32(gradient * rest1)
        second = f32(v[j] * beta2) + f32(f32(gradient * gradient) * rest2)
        m[j], v[j] = first, second
        update = f32(first / f32(np.sqrt(f32(second * correction2)) + eps)) * lr
        p[j] = f32(p[j] * decay) - update


@kernel
def _momentum(g: Array, factor: Any, momentum: Array, mu: Any, update: Array) -> None:
    for j in range(g.shape[0]):
        gradient = g[j] * factor
        held = f32(momentum[j] * mu) + gradient
        momentum[j] = held
        update[j] = gradient + f32(held * mu)


@kernel
def _polynomial_limbs(
    gram: Array, square: Array, b: Any, c: Any, fold: Array, planes: Array, e: Array, status: Array
) -> None:
    """Limbs by rows of (gram · b + square · c) with 2^fold folded into the columns."""
    width = gram.shape[1]
    row, factor = np.empty(width, f32), np.empty(width, f32)
    for j in range(width):
        factor[j] = _power_of_two(fold[j])
    for t in range(gram.shape[0]):
        first, second = gram[t], square[t]
        for j in range(width):
            row[j] = f32(f32(first[j] * b) + f32(second[j] * c)) * factor[j]
        e[t] = _row_limbs(row, planes, t, status)


@kernel
def _descend(p: Array, direction: Array, decay: Any, rate: Any) -> None:
    for j in range(p.shape[0]):
        p[j] = f32(p[j] * decay) - f32(direction[j] * rate)
