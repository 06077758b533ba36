"""Kernels of everything between products but attention: limbs, RMSNorm, SwiGLU, cross-entropy, embedding.

The name of a kernel with a leading underscore is one task of it: some rows, or some columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swarm_protocol.exact.compiled.rows import (
    MAGNITUDE,
    ONE,
    ROWS,
    SCATTER_BITS,
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
    log,
    power_of_two,
    power_of_two_at_least,
    powers_of_two,
    raise_columns,
    raise_status,
    row_limbs,
    rows_of,
    sigmoid,
    tasks_of,
)
from swarm_protocol.exact.compiled.team import Team, share

COLUMNS = 64
"""Columns per task of the embedding's gradient."""


@kernel
def _finish(task: int, s: Array, ea: Array, eb: Array, out: Array, keep: Any) -> None:
    first, last = rows_of(task, out.shape[0])
    for t in range(first, last):
        finish_row(s, t, ea[t], eb, out[t], keep)


@kernel
def finish(team: Team, s: Array, ea: Array, eb: Array, out: Array, keep: Any) -> None:
    share(_finish, team, tasks_of(out.shape[0]), (s, ea, eb, out, keep))


@kernel
def _limbs(task: int, x: Array, planes: Array, e: Array) -> None:
    first, last = rows_of(task, x.shape[0])
    for t in range(first, last):
        e[t] = row_limbs(x[t], planes, t)


@kernel
def limbs(team: Team, x: Array, planes: Array, e: Array, status: Array) -> None:
    share(_limbs, team, tasks_of(x.shape[0]), (x, planes, e))
    raise_status(e, status)


@kernel
def _gradient_rows(
    task: int, dy: Array, factor: Array, token: Array, rows: Array, rows_e: Array, start: int, stop: int, largest: Array
) -> None:
    buffer, top = np.empty(dy.shape[1], f32), largest[task]
    first, last = rows_of(task, stop - start)
    clear(top)
    for t in range(start + first, start + last):
        row, scale = dy[t], token[t]
        for j in range(row.shape[0]):
            buffer[j] = row[j] * factor[j]
        rows_e[t] = row_limbs(buffer, rows, t)
        for j in range(row.shape[0]):
            b = i32(bits_of(f32(row[j] * scale)) & MAGNITUDE)
            top[j] = b if b > top[j] else top[j]


@kernel
def _gradient_columns(task: int, dy: Array, token: Array, scale: Array, columns: Array, start: int, stop: int) -> None:
    buffer = np.empty(dy.shape[1], f32)
    first, last = rows_of(task, stop - start)
    for t in range(start + first, start + last):
        row, power = dy[t], token[t]
        for j in range(row.shape[0]):
            buffer[j] = row[j] * power
        digits(buffer, scale, columns, t)


@kernel
def gradient_limbs(
    team: Team,
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
    factor, token, scale = powers_of_two(fold), powers_of_two(x_e), np.empty(width, f32)
    for g in range(columns_e.shape[0]):
        start, stop = g * grain, min(tokens, (g + 1) * grain)
        tasks = tasks_of(stop - start)
        largest = np.empty((tasks, width), i32)
        share(_gradient_rows, team, tasks, (dy, factor, token, rows, rows_e, start, stop, largest))
        column_scales(largest, 7 * columns.shape[0] - 1, columns_e[g], scale)
        raise_status(columns_e[g], status)
        share(_gradient_columns, team, tasks, (dy, token, scale, columns, start, stop))
    raise_status(rows_e, status)


# --- Normalisation, SwiGLU, loss, embedding


@kernel
def _norm_limbs(task: int, x: Array, gain: Array, eps: Any, planes: Array, e: Array, r: Array) -> None:
    width = x.shape[1]
    buffer, row = np.empty(power_of_two_at_least(width), f32), np.empty(width, f32)
    share_of_one = ONE / f32(width)
    first, last = rows_of(task, x.shape[0])
    for t in range(first, last):
        source = x[t]
        for j in range(width):
            buffer[j] = source[j] * source[j]
        clear(buffer[width:])
        rms = ONE / np.sqrt(f32(halves(buffer) * share_of_one) + eps)
        r[t] = rms
        for j in range(width):
            row[j] = f32(source[j] * rms) * gain[j]
        e[t] = row_limbs(row, planes, t)


@kernel
def norm_limbs(team: Team, x: Array, gain: Array, eps: Any, planes: Array, e: Array, r: Array, status: Array) -> None:
    share(_norm_limbs, team, tasks_of(x.shape[0]), (x, gain, eps, planes, e, r))
    raise_status(e, status)


@kernel
def _add_by_pairs(held: Array, pairs: Array, index: int) -> int:
    """Row `index` of a sum by pairs: a binary counter, whose level k holds the sum of 2^k rows that waits for its neighbour.

    Returns the level where the row came to rest; that of the last row holds the sum.
    """
    level = 0
    while index & 1:
        left = pairs[level]
        for j in range(held.shape[0]):
            held[j] = left[j] + held[j]
        index >>= 1
        level += 1
    copy(held, pairs[level])
    return level


@kernel
def _norm_gradient(
    task: int, dy: Array, x: Array, r: Array, gain: Array, start: int, stop: int, dx: Array, sums: Array
) -> None:
    """Some rows, and their sum by pairs for the gain, padded to `ROWS` where others follow or precede."""
    width = x.shape[1]
    buffer, dn, n = np.empty(power_of_two_at_least(width), f32), np.empty(width, f32), np.empty(width, f32)
    held, pairs = np.empty(width, f32), np.empty((64, width), f32)
    share_of_one = ONE / f32(width)
    first, last = start + task * ROWS, min(start + (task + 1) * ROWS, stop)
    padded = ROWS if sums.shape[0] > 1 else power_of_two_at_least(stop - start)
    top = 0
    for index in range(padded):
        t = first + index
        if t < last:
            source, upstream, target, rms = x[t], dy[t], dx[t], r[t]
            for j in range(width):
                n[j] = source[j] * rms
                dn[j] = upstream[j] * gain[j]
                buffer[j] = dn[j] * n[j]
                held[j] = upstream[j] * n[j]
            clear(buffer[width:])
            c = f32(halves(buffer) * share_of_one)
            for j in range(width):
                target[j] = target[j] + f32(f32(dn[j] - f32(n[j] * c)) * rms)
        else:
            clear(held)
        top = _add_by_pairs(held, pairs, index)
    copy(pairs[top], sums[task])


@kernel
def norm_gradient(
    team: Team,
    dy: Array,
    x: Array,
    r: Array,
    gain: Array,
    grain: int,
    dx: Array,
    gain_gradient: Array,
    keep: bool,
) -> None:
    tokens, width = x.shape
    held, pairs = np.empty(width, f32), np.empty((64, width), f32)
    for start in range(0, tokens, grain):
        stop = min(tokens, start + grain)
        tasks = tasks_of(stop - start)
        sums = np.empty((tasks, width), f32)
        share(_norm_gradient, team, tasks, (dy, x, r, gain, start, stop, dx, sums))
        top = 0
        for index in range(power_of_two_at_least(tasks)):
            if index < tasks:
                copy(sums[index], held)
            else:
                clear(held)
            top = _add_by_pairs(held, pairs, index)
        total = pairs[top]
        if keep or start > 0:
            for j in range(width):
                gain_gradient[j] = gain_gradient[j] + total[j]
        else:
            copy(total, gain_gradient)


@kernel
def _swiglu_limbs(task: int, gate_up: Array, planes: Array, e: Array) -> None:
    width = planes.shape[2]
    row = np.empty(width, f32)
    first, last = rows_of(task, gate_up.shape[0])
    for t in range(first, last):
        gate, up = gate_up[t, :width], gate_up[t, width:]
        for j in range(width):
            row[j] = f32(gate[j] * sigmoid(gate[j])) * up[j]
        e[t] = row_limbs(row, planes, t)


@kernel
def swiglu_limbs(team: Team, gate_up: Array, planes: Array, e: Array, status: Array) -> None:
    share(_swiglu_limbs, team, tasks_of(gate_up.shape[0]), (gate_up, planes, e))
    raise_status(e, status)


@kernel
def _swiglu_gradient(task: int, dy: Array, gate_up: Array) -> None:
    width = dy.shape[1]
    first, last = rows_of(task, dy.shape[0])
    for t in range(first, last):
        upstream, gate, up = dy[t], gate_up[t, :width], gate_up[t, width:]
        for j in range(width):
            g, u, d = gate[j], up[j], upstream[j]
            s = sigmoid(g)
            gate[j] = f32(f32(d * u) * s) * f32(ONE + f32(g * f32(ONE - s)))
            up[j] = d * f32(g * s)


@kernel
def swiglu_gradient(team: Team, dy: Array, gate_up: Array) -> None:
    share(_swiglu_gradient, team, tasks_of(dy.shape[0]), (dy, gate_up))


@kernel
def _cross_entropy(task: int, logits: Array, targets: Array, share_of_one: Any, losses: Array) -> None:
    tokens, width = logits.shape
    buffer, p = np.empty(power_of_two_at_least(width), f32), np.empty(width, f32)
    first, last = rows_of(task, tokens)
    for t in range(first, last):
        z, target = logits[t], targets[t]
        m = z[0]
        for j in range(width):
            m = z[j] if z[j] > m else m
        for j in range(width):
            p[j] = exp(z[j] - m)
            buffer[j] = p[j]
        clear(buffer[width:])
        total = halves(buffer)
        losses[t] = log(total) - f32(z[target] - m)
        r = ONE / total
        for j in range(width):
            z[j] = f32(p[j] * r) * share_of_one
        z[target] = f32(f32(p[target] * r) - ONE) * share_of_one


@kernel
def cross_entropy(team: Team, logits: Array, targets: Array, share_of_one: Any, losses: Array) -> None:
    share(_cross_entropy, team, tasks_of(logits.shape[0]), (logits, targets, share_of_one, losses))


@kernel
def _embedding_gradient(task: int, dx: Array, rows: Array, found: Array, e: Array, out: Array) -> None:
    """Integer sums of some columns of dx by `rows[t]`, scaled back and added to the rows `found` of `out`."""
    first, last = task * COLUMNS, min((task + 1) * COLUMNS, dx.shape[1])
    width = last - first
    largest, scale = np.zeros((1, width), i32), np.empty(width, f32)
    for t in range(dx.shape[0]):
        raise_columns(dx[t, first:last], largest[0])
    column_scales(largest, SCATTER_BITS, e[first:last], scale)
    sums = np.zeros((found.shape[0], width), i64)
    for t in range(dx.shape[0]):
        total, row = sums[rows[t]], dx[t, first:last]
        for j in range(width):
            total[j] = total[j] + i64(np.rint(f32(row[j] * scale[j])))
    for u in range(found.shape[0]):
        row = out[found[u], first:last]
        for j in range(width):
            row[j] = row[j] + f32(f32(sums[u, j]) * power_of_two(i32(e[first + j] - i32(SCATTER_BITS))))


@kernel
def embedding_gradient(team: Team, dx: Array, rows: Array, found: Array, out: Array, status: Array) -> None:
    """Add the rows of dx to the rows found[rows[t]] of `out`."""
    e = np.empty(dx.shape[1], i32)
    share(_embedding_gradient, team, (dx.shape[1] + COLUMNS - 1) // COLUMNS, (dx, rows, found, e, out))
    raise_status(e, status)
