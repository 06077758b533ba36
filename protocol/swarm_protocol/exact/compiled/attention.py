"""Kernels of attention, forward and backward.

Index c counts the key-value heads of all sequences; rows of a head's queries are (group, position). The name of a kernel
with a leading underscore is one task of it: some rows of a head, or a head.
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
    powers_of_two,
    raise_columns,
    raise_status,
    row_digits,
    row_limbs,
    rows_of,
    tasks_of,
)
from swarm_protocol.exact.compiled.team import Team, share


@kernel
def rotated(source: Array, cos: Array, sin: Array, target: Array) -> None:
    half = cos.shape[0]
    for j in range(half):
        a, b = source[j], source[j + half]
        target[j] = f32(a * cos[j]) - f32(b * sin[j])
        target[j + half] = f32(b * cos[j]) + f32(a * sin[j])


@kernel
def _heads(
    c: int, qkv: Array, cos: Array, sin: Array, q: Array, q_e: Array, k: Array, k_e: Array, v: Array, v_e: Array
) -> None:
    _, limbs, positions, size = k.shape
    group = q.shape[2] // positions
    kv_heads = qkv.shape[1] // size // (group + 2)
    row, scale, largest = np.empty(size, f32), np.empty(size, f32), np.zeros((1, size), i32)
    sequence, head = c // kv_heads, c % kv_heads
    for s in range(positions):
        source = qkv[sequence * positions + s]
        for g in range(group):
            at = (head * group + g) * size
            rotated(source[at : at + size], cos[s], sin[s], row)
            q_e[c, g * positions + s] = row_limbs(row, q[c], g * positions + s)
        at = (kv_heads * group + head) * size
        rotated(source[at : at + size], cos[s], sin[s], row)
        k_e[c, s] = row_limbs(row, k[c], s)
        at = (kv_heads * (group + 1) + head) * size
        raise_columns(source[at : at + size], largest[0])
    column_scales(largest, 7 * limbs - 1, v_e[c], scale)
    at = (kv_heads * (group + 1) + head) * size
    for s in range(positions):
        digits(qkv[sequence * positions + s, at : at + size], scale, v[c], s)


@kernel
def heads(
    team: Team,
    qkv: Array,
    cos: Array,
    sin: Array,
    q: Array,
    q_e: Array,
    k: Array,
    k_e: Array,
    v: Array,
    v_e: Array,
    status: Array,
) -> None:
    share(_heads, team, k.shape[0], (qkv, cos, sin, q, q_e, k, k_e, v, v_e))
    for c in range(k.shape[0]):
        raise_status(q_e[c], status)
        raise_status(k_e[c], status)
        raise_status(v_e[c], status)


@kernel
def _softmax_limbs(task: int, s: Array, q_e: Array, k_e: Array, scale: Any, planes: Array, r: Array) -> None:
    limbs, rows, positions = planes.shape
    row = np.empty(positions, f32)
    bits = 7 * limbs - 1
    one, unit = power_of_two(i32(bits)), power_of_two(i32(-bits))
    first, last = rows_of(task, rows)
    for t in range(first, last):
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
def softmax_limbs(team: Team, s: Array, q_e: Array, k_e: Array, scale: Any, planes: Array, r: Array) -> None:
    share(_softmax_limbs, team, tasks_of(planes.shape[1]), (s, q_e, k_e, scale, planes, r))


@kernel
def _place_heads(task: int, s: Array, v_e: Array, r: Array, out: Array, column: int) -> None:
    positions, size = out.shape[0], s.shape[2]
    first, last = rows_of(task, s.shape[1])
    for t in range(first, last):
        at = column + (t // positions) * size
        target = out[t % positions, at : at + size]
        finish_row(s, t, i32(0), v_e, target, ZERO)
        for j in range(size):
            target[j] = target[j] * r[t]


@kernel
def place_heads(team: Team, s: Array, v_e: Array, r: Array, out: Array, column: int) -> None:
    """Finish a head's weighted values [G·S, H] and put them into the rows of its sequence, from `column` on."""
    share(_place_heads, team, tasks_of(s.shape[1]), (s, v_e, r, out, column))


@kernel
def _attended_rows(
    task: int,
    out: Array,
    d_out: Array,
    column: int,
    factor: Array,
    r: Array,
    rows: Array,
    rows_e: Array,
    correction: Array,
    largest: Array,
) -> None:
    positions, size = out.shape[0], rows.shape[2]
    buffer, folded = np.empty(power_of_two_at_least(size), f32), np.empty(size, f32)
    top = largest[task]
    clear(top)
    first, last = rows_of(task, rows.shape[1])
    for t in range(first, last):
        at = column + (t // positions) * size
        y, dy = out[t % positions, at : at + size], d_out[t % positions, at : at + size]
        for j in range(size):
            buffer[j] = dy[j] * y[j]
            folded[j] = dy[j] * factor[j]
            b = i32(bits_of(f32(dy[j] * r[t])) & MAGNITUDE)
            top[j] = b if b > top[j] else top[j]
        clear(buffer[size:])
        correction[t] = halves(buffer)
        rows_e[t] = row_limbs(folded, rows, t)


@kernel
def _attended_columns(task: int, d_out: Array, column: int, r: Array, scale: Array, columns: Array) -> None:
    positions, size = d_out.shape[0], columns.shape[2]
    folded = np.empty(size, f32)
    first, last = rows_of(task, columns.shape[1])
    for t in range(first, last):
        at = column + (t // positions) * size
        dy = d_out[t % positions, at : at + size]
        for j in range(size):
            folded[j] = dy[j] * r[t]
        digits(folded, scale, columns, t)


@kernel
def attended_limbs(
    team: Team,
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
    tasks, size = tasks_of(rows.shape[1]), rows.shape[2]
    factor, scale, largest = powers_of_two(v_e), np.empty(size, f32), np.empty((tasks, size), i32)
    share(_attended_rows, team, tasks, (out, d_out, column, factor, r, rows, rows_e, correction, largest))
    column_scales(largest, 7 * columns.shape[0] - 1, columns_e, scale)
    share(_attended_columns, team, tasks, (d_out, column, r, scale, columns))
    raise_status(rows_e, status)
    raise_status(columns_e, status)


@kernel
def _scores_rows(
    task: int,
    s: Array,
    s_e: Array,
    weights: Array,
    r: Array,
    correction: Array,
    scale: Any,
    query: Array,
    key: Array,
    rows: Array,
    rows_e: Array,
    d_s: Array,
    largest: Array,
) -> None:
    limbs, total_rows, positions = weights.shape
    unit = power_of_two(i32(1 - 7 * limbs))
    folded, zeros, top = np.empty(positions, f32), np.zeros(positions, i32), largest[task]
    clear(top)
    first, last = rows_of(task, total_rows)
    for t in range(first, last):
        visible = t % positions + 1
        row = d_s[t]
        seen = row[:visible]
        finish_row(s, t, s_e[t], zeros, seen, ZERO)
        high, low, lowest = weights[0, t], weights[1, t], weights[limbs - 1, t]
        if limbs == 2:
            for j in range(visible):
                p = f32(i32(i32(i32(high[j]) << i32(7)) + i32(low[j])))
                seen[j] = f32(f32(f32(p * unit) * r[t]) * f32(seen[j] - correction[t])) * scale
        else:
            for j in range(visible):
                upper = i32(i32(i32(high[j]) << i32(7)) + i32(low[j]))
                p = f32(i32(i32(upper << i32(7)) + i32(lowest[j])))
                seen[j] = f32(f32(f32(p * unit) * r[t]) * f32(seen[j] - correction[t])) * scale
        clear(row[visible:])
        for j in range(positions):
            folded[j] = row[j] * key[j]
            b = i32(bits_of(f32(row[j] * query[t])) & MAGNITUDE)
            top[j] = b if b > top[j] else top[j]
        rows_e[t] = row_limbs(folded, rows, t)


@kernel
def _scores_columns(task: int, d_s: Array, query: Array, scale: Array, columns: Array) -> None:
    folded = np.empty(d_s.shape[1], f32)
    first, last = rows_of(task, d_s.shape[0])
    for t in range(first, last):
        row, power = d_s[t], query[t]
        for j in range(row.shape[0]):
            folded[j] = row[j] * power
        digits(folded, scale, columns, t)


@kernel
def softmax_gradient_limbs(
    team: Team,
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
    tasks = tasks_of(total_rows)
    d_s, largest = np.empty((total_rows, positions), f32), np.empty((tasks, positions), i32)
    query, key, column_scale = powers_of_two(q_e), powers_of_two(k_e), np.empty(positions, f32)
    given = (s, s_e, weights, r, correction, scale, query, key, rows, rows_e, d_s, largest)
    share(_scores_rows, team, tasks, given)
    column_scales(largest, 7 * limbs - 1, columns_e, column_scale)
    share(_scores_columns, team, tasks, (d_s, query, column_scale, columns))
    raise_status(rows_e, status)
    raise_status(columns_e, status)


@kernel
def _place_gradients(
    task: int, d_q: Array, d_k: Array, d_v: Array, cos: Array, sin: Array, head: int, d_qkv: Array
) -> None:
    positions, size = d_k.shape
    group = d_q.shape[0] // positions
    kv_heads = d_qkv.shape[1] // size // (group + 2)
    back = np.empty(size // 2, f32)
    first, last = rows_of(task, positions)
    for s in range(first, last):
        for j in range(size // 2):
            back[j] = -sin[s, j]
        for g in range(group):
            at = (head * group + g) * size
            rotated(d_q[g * positions + s], cos[s], back, d_qkv[s, at : at + size])
        at = (kv_heads * group + head) * size
        rotated(d_k[s], cos[s], back, d_qkv[s, at : at + size])
        at = (kv_heads * (group + 1) + head) * size
        copy(d_v[s], d_qkv[s, at : at + size])


@kernel
def place_gradients(
    team: Team, d_q: Array, d_k: Array, d_v: Array, cos: Array, sin: Array, head: int, d_qkv: Array
) -> None:
    """One head's gradients into the rows of its sequence, queries and keys rotated back."""
    share(_place_gradients, team, tasks_of(d_k.shape[0]), (d_q, d_k, d_v, cos, sin, head, d_qkv))
