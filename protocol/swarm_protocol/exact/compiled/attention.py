"""Kernels of attention, forward and backward.

Index c counts the key-value heads of all sequences; rows of a head's queries are (group, position).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swarm_protocol.exact.compiled.rows import (
    MAGNITUDE,
    ONE,
    ROUND,
    ROUND_BITS,
    ZERO,
    Array,
    bits_of,
    clear,
    column_scales,
    copy,
    digits,
    exp,
    f32,
    finish_row,
    halves,
    i32,
    i64,
    kernel,
    power_of_two,
    power_of_two_at_least,
    raise_columns,
    row_digits,
    row_limbs,
)


@kernel
def rotated(source: Array, cos: Array, sin: Array, target: Array) -> None:
    half = cos.shape[0]
    for j in range(half):
        a, b = source[j], source[j + half]
        target[j] = f32(a * cos[j]) - f32(b * sin[j])
        target[j + half] = f32(b * cos[j]) + f32(a * sin[j])


@kernel
def heads(
    qkv: Array, cos: Array, sin: Array, q: Array, q_e: Array, k: Array, k_e: Array, v: Array, v_e: Array, status: Array
) -> None:
    heads, limbs, positions, size = k.shape
    group = q.shape[2] // positions
    kv_heads = qkv.shape[1] // size // (group + 2)
    row, scale, largest = np.empty(size, f32), np.empty(size, f32), np.empty(size, i32)
    for c in range(heads):
        sequence, head = c // kv_heads, c % kv_heads
        clear(largest)
        for s in range(positions):
            source = qkv[sequence * positions + s]
            for g in range(group):
                at = (head * group + g) * size
                rotated(source[at : at + size], cos[s], sin[s], row)
                q_e[c, g * positions + s] = row_limbs(row, q[c], g * positions + s, status)
            at = (kv_heads * group + head) * size
            rotated(source[at : at + size], cos[s], sin[s], row)
            k_e[c, s] = row_limbs(row, k[c], s, status)
            at = (kv_heads * (group + 1) + head) * size
            raise_columns(source[at : at + size], largest)
        column_scales(largest, 7 * limbs - 1, v_e[c], scale, status)
        at = (kv_heads * (group + 1) + head) * size
        for s in range(positions):
            digits(qkv[sequence * positions + s, at : at + size], scale, v[c], s)


@kernel
def softmax_limbs(s: Array, q_e: Array, k_e: Array, scale: Any, planes: Array, r: Array) -> None:
    limbs, rows, positions = planes.shape
    row = np.empty(positions, f32)
    bits = 7 * limbs - 1
    one, unit = power_of_two(i32(bits)), power_of_two(i32(-bits))
    for t in range(rows):
        visible = t % positions + 1
        seen = row[:visible]
        finish_row(s, t, q_e[t], k_e, seen, ZERO)
        for j in range(visible):
            seen[j] = seen[j] * scale
        m = seen[0]
        for j in range(visible):
            m = seen[j] if seen[j] > m else m
        total = i64(0)
        for j in range(visible):
            p = exp(seen[j] - m)
            seen[j] = p
            total += i64(i32(bits_of(f32(p * one) + ROUND) - ROUND_BITS))
        clear(row[visible:])
        row_digits(row, one, planes, t)
        # A score that overflowed must not pass for a weight: NaN is refused where it next becomes limbs.
        r[t] = ONE / f32(f32(total) * unit) if m < f32(np.inf) else f32(np.nan)


@kernel
def place_heads(s: Array, v_e: Array, r: Array, out: Array, column: int) -> None:
    """Finish a head's weighted values [G·S, H] and put them into the rows of its sequence, from `column` on."""
    positions, size, rows = out.shape[0], s.shape[2], s.shape[1]
    for t in range(rows):
        at = column + (t // positions) * size
        target = out[t % positions, at : at + size]
        finish_row(s, t, i32(0), v_e, target, ZERO)
        for j in range(size):
            target[j] = target[j] * r[t]


@kernel
def attended_limbs(
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
    buffer, folded, scale = np.empty(power_of_two_at_least(size), f32), np.empty(size, f32), np.empty(size, f32)
    largest = np.zeros(size, i32)
    for t in range(rows.shape[1]):
        at = column + (t // positions) * size
        y, dy = out[t % positions, at : at + size], d_out[t % positions, at : at + size]
        for j in range(size):
            buffer[j] = dy[j] * y[j]
            folded[j] = dy[j] * power_of_two(v_e[j])
            b = i32(bits_of(f32(dy[j] * r[t])) & MAGNITUDE)
            largest[j] = b if b > largest[j] else largest[j]
        clear(buffer[size:])
        correction[t] = halves(buffer)
        rows_e[t] = row_limbs(folded, rows, t, status)
    column_scales(largest, 7 * columns.shape[0] - 1, columns_e, scale, status)
    for t in range(rows.shape[1]):
        at = column + (t // positions) * size
        dy = d_out[t % positions, at : at + size]
        for j in range(size):
            folded[j] = dy[j] * r[t]
        digits(folded, scale, columns, t)


@kernel
def softmax_gradient_limbs(
    s: Array,
    s_e: Array,
    weights: Array,
    r: Array,
    correction: Array,
    scale: Any,
    q_e: Array,
    k_e: Array,
    rows: Array,
    rows_e: Array,
    columns: Array,
    columns_e: Array,
    status: Array,
) -> None:
    """From products for d_weights [G·S, S]: limbs of the scores' gradient by rows and by columns."""
    limbs, total_rows, positions = weights.shape
    unit = power_of_two(i32(1 - 7 * limbs))
    d_s = np.empty((total_rows, positions), f32)
    folded, column_scale, key = np.empty(positions, f32), np.empty(positions, f32), np.empty(positions, f32)
    largest, zeros = np.zeros(positions, i32), np.zeros(positions, i32)
    for j in range(positions):
        key[j] = power_of_two(k_e[j])
    for t in range(total_rows):
        visible = t % positions + 1
        row, query = d_s[t], power_of_two(q_e[t])
        seen = row[:visible]
        finish_row(s, t, s_e[t], zeros, seen, ZERO)
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
        clear(row[visible:])
        for j in range(positions):
            folded[j] = row[j] * key[j]
            b = i32(bits_of(f32(row[j] * query)) & MAGNITUDE)
            largest[j] = b if b > largest[j] else largest[j]
        rows_e[t] = row_limbs(folded, rows, t, status)
    column_scales(largest, 7 * limbs - 1, columns_e, column_scale, status)
    for t in range(total_rows):
        row, query = d_s[t], power_of_two(q_e[t])
        for j in range(positions):
            folded[j] = row[j] * query
        digits(folded, column_scale, columns, t)


@kernel
def place_gradients(d_q: Array, d_k: Array, d_v: Array, cos: Array, sin: Array, head: int, d_qkv: Array) -> None:
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
            rotated(d_q[g * positions + s], cos[s], back, d_qkv[s, at : at + size])
        at = (kv_heads * group + head) * size
        rotated(d_k[s], cos[s], back, d_qkv[s, at : at + size])
        at = (kv_heads * (group + 1) + head) * size
        copy(d_v[s], d_qkv[s, at : at + size])
