"""Kernels of everything between products but attention: limbs, RMSNorm, SwiGLU, cross-entropy, embedding."""

from __future__ import annotations

from typing import Any

import numpy as np

from swarm_protocol.exact.compiled.rows import (
    MAGNITUDE,
    ONE,
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
    raise_columns,
    row_limbs,
    sigmoid,
)


@kernel
def finish(s: Array, ea: Array, eb: Array, out: Array, keep: Any) -> None:
    for t in range(out.shape[0]):
        finish_row(s, t, ea[t], eb, out[t], keep)


@kernel
def limbs(x: Array, planes: Array, e: Array, status: Array) -> None:
    for t in range(x.shape[0]):
        e[t] = row_limbs(x[t], planes, t, status)


@kernel
def gradient_limbs(
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
        factor[j] = power_of_two(fold[j])
    for g in range(columns_e.shape[0]):
        first, last = g * grain, min(tokens, (g + 1) * grain)
        clear(largest)
        for t in range(first, last):
            row = dy[t]
            for j in range(width):
                buffer[j] = row[j] * factor[j]
            rows_e[t] = row_limbs(buffer, rows, t, status)
            token = power_of_two(x_e[t])
            for j in range(width):
                b = i32(bits_of(f32(row[j] * token)) & MAGNITUDE)
                largest[j] = b if b > largest[j] else largest[j]
        column_scales(largest, 7 * columns.shape[0] - 1, columns_e[g], scale, status)
        for t in range(first, last):
            row, token = dy[t], power_of_two(x_e[t])
            for j in range(width):
                buffer[j] = row[j] * token
            digits(buffer, scale, columns, t)


# --- Normalisation, SwiGLU, loss, embedding


@kernel
def norm_limbs(x: Array, gain: Array, eps: Any, planes: Array, e: Array, r: Array, status: Array) -> None:
    tokens, width = x.shape
    buffer, row = np.empty(power_of_two_at_least(width), f32), np.empty(width, f32)
    share = ONE / f32(width)
    for t in range(tokens):
        source = x[t]
        for j in range(width):
            buffer[j] = source[j] * source[j]
        clear(buffer[width:])
        rms = ONE / np.sqrt(f32(halves(buffer) * share) + eps)
        r[t] = rms
        for j in range(width):
            row[j] = f32(source[j] * rms) * gain[j]
        e[t] = row_limbs(row, planes, t, status)


@kernel
def norm_gradient(
    dy: Array, x: Array, r: Array, gain: Array, grain: int, dx: Array, gain_gradient: Array, keep: bool
) -> None:
    tokens, width = x.shape
    buffer, dn, n = np.empty(power_of_two_at_least(width), f32), np.empty(width, f32), np.empty(width, f32)
    pairs = np.empty((64, width), f32)
    share = ONE / f32(width)
    for first in range(0, tokens, grain):
        count = min(tokens, first + grain) - first
        padded = power_of_two_at_least(count)
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
                clear(buffer[width:])
                c = f32(halves(buffer) * share)
                for j in range(width):
                    target[j] = target[j] + f32(f32(dn[j] - f32(n[j] * c)) * rms)
            else:
                clear(held)
            # A binary counter: level k holds the sum of 2^k rows that waits for its neighbour.
            level, carry = 0, index
            while carry & 1:
                left = pairs[level]
                for j in range(width):
                    held[j] = left[j] + held[j]
                carry >>= 1
                level += 1
            copy(held, pairs[level])
            top = level
        total = pairs[top]
        if keep or first > 0:
            for j in range(width):
                gain_gradient[j] = gain_gradient[j] + total[j]
        else:
            copy(total, gain_gradient)


@kernel
def swiglu_limbs(gate_up: Array, planes: Array, e: Array, status: Array) -> None:
    width = planes.shape[2]
    row = np.empty(width, f32)
    for t in range(gate_up.shape[0]):
        gate, up = gate_up[t, :width], gate_up[t, width:]
        for j in range(width):
            row[j] = f32(gate[j] * sigmoid(gate[j])) * up[j]
        e[t] = row_limbs(row, planes, t, status)


@kernel
def swiglu_gradient(dy: Array, gate_up: Array) -> None:
    width = dy.shape[1]
    for t in range(dy.shape[0]):
        upstream, gate, up = dy[t], gate_up[t, :width], gate_up[t, width:]
        for j in range(width):
            g, u, d = gate[j], up[j], upstream[j]
            s = sigmoid(g)
            gate[j] = f32(f32(d * u) * s) * f32(ONE + f32(g * f32(ONE - s)))
            up[j] = d * f32(g * s)


@kernel
def cross_entropy(logits: Array, targets: Array, share: Any, losses: Array) -> None:
    tokens, width = logits.shape
    buffer, p = np.empty(power_of_two_at_least(width), f32), np.empty(width, f32)
    for t in range(tokens):
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
            z[j] = f32(p[j] * r) * share
        z[target] = f32(f32(p[target] * r) - ONE) * share


@kernel
def embedding_gradient(dx: Array, rows: Array, sums: Array, e: Array, status: Array) -> None:
    """Integer sums of the rows of dx by `rows[t]`, and the exponent of each column."""
    width = dx.shape[1]
    largest, scale = np.zeros(width, i32), np.empty(width, f32)
    for t in range(dx.shape[0]):
        raise_columns(dx[t], largest)
    column_scales(largest, SCATTER_BITS, e, scale, status)
    for t in range(dx.shape[0]):
        total, row = sums[rows[t]], dx[t]
        for j in range(width):
            total[j] = total[j] + i64(np.rint(f32(row[j] * scale[j])))


@kernel
def place_embedding(sums: Array, e: Array, found: Array, out: Array) -> None:
    """Add integer sums, scaled back, to the rows of `out` that they belong to."""
    for u in range(sums.shape[0]):
        row = out[found[u]]
        for j in range(sums.shape[1]):
            row[j] = row[j] + f32(f32(sums[u, j]) * power_of_two(i32(e[j] - i32(SCATTER_BITS))))
