"""Kernels of everything between products but attention: limbs, RMSNorm, SwiGLU, cross-entropy.

Programs hold a tile [ROWS, BLOCK] of row-major matrices. `plane` is the number of elements between two planes of limbs.
"""

from __future__ import annotations

import triton.language as tl

from swarm_protocol.exact.fused.rows import (
    LOWEST,
    NEGATIVE_ZERO,
    exp,
    exponent,
    from_bits,
    halves,
    halves_of_columns,
    kernel,
    largest_of,
    log,
    magnitude,
    pairs_of_columns,
    power_of_two,
    product_value,
    raise_status,
    reciprocal,
    sigmoid,
    store_digits,
    whole,
)


@kernel
def finish(
    s,
    plane,
    a_e,
    b_e,
    out,
    rows,
    width,
    keep,
    KEEP: tl.constexpr,
    LIMBS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (t < rows)[:, None] & (j < width)[None, :]
    at = t.to(tl.int64)[:, None] * width + j[None, :]
    e = tl.load(a_e + t, t < rows, 0)[:, None] + tl.load(b_e + j, j < width, 0)[None, :]
    value = product_value(s, plane, at, mask, e, LIMBS)
    if KEEP:
        value = tl.load(out + at, mask, 0.0) * keep + value
    tl.store(out + at, value, mask)


# --- Limbs


@kernel
def limbs(x, planes, plane, e, status, rows, width, LIMBS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    t, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    row = t.to(tl.int64)[:, None] * width
    largest = tl.full((ROWS, BLOCK), 0, tl.int32)
    for start in range(0, width, BLOCK):
        mask = (t < rows)[:, None] & (start + j < width)[None, :]
        largest = tl.maximum(largest, magnitude(tl.load(x + row + start + j[None, :], mask, 0.0)))
    found = exponent(largest_of(largest, 1))
    tl.store(e + t, found, t < rows)
    raise_status(status, tl.where(t < rows, found, LOWEST))
    scale = power_of_two(7 * LIMBS - 1 - found)[:, None]
    for start in range(0, width, BLOCK):
        mask = (t < rows)[:, None] & (start + j < width)[None, :]
        at = row + start + j[None, :]
        store_digits(planes, plane, at, mask, whole(tl.load(x + at, mask, 0.0) * scale), LIMBS)


@kernel
def polynomial_limbs(
    gram,
    square,
    b,
    c,
    fold,
    planes,
    plane,
    e,
    status,
    size,
    LIMBS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    row = t.to(tl.int64)[:, None] * size
    largest = tl.full((ROWS, BLOCK), 0, tl.int32)
    for start in range(0, size, BLOCK):
        mask = (t < size)[:, None] & (start + j < size)[None, :]
        value = _polynomial(gram, square, b, c, fold, row + start + j[None, :], start + j, size, mask)
        largest = tl.maximum(largest, magnitude(value))
    found = exponent(largest_of(largest, 1))
    tl.store(e + t, found, t < size)
    raise_status(status, tl.where(t < size, found, LOWEST))
    scale = power_of_two(7 * LIMBS - 1 - found)[:, None]
    for start in range(0, size, BLOCK):
        mask = (t < size)[:, None] & (start + j < size)[None, :]
        at = row + start + j[None, :]
        value = _polynomial(gram, square, b, c, fold, at, start + j, size, mask)
        store_digits(planes, plane, at, mask, whole(value * scale), LIMBS)


@kernel
def _polynomial(gram, square, b, c, fold, at, column, size, mask):
    value = tl.load(gram + at, mask, 0.0) * b + tl.load(square + at, mask, 0.0) * c
    return value * power_of_two(tl.load(fold + column, column < size, 0))[None, :]


@kernel
def gradient_scales(dy, w_e, x_e, row_bits, column_bits, tokens, width, grain, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Raise the bits of the largest magnitudes of rows [T] and of columns [grains, N], which are 0 before."""
    t, j, present, inside = _grain_tile(tokens, width, grain, ROWS, BLOCK)
    mask = present[:, None] & inside[None, :]
    x = tl.load(dy + t.to(tl.int64)[:, None] * width + j[None, :], mask, 0.0)
    by_rows = magnitude(x * power_of_two(tl.load(w_e + j, inside, 0))[None, :])
    by_columns = magnitude(x * power_of_two(tl.load(x_e + t, present, 0))[:, None])
    tl.atomic_max(row_bits + t, largest_of(by_rows, 1), present, sem="relaxed")
    tl.atomic_max(column_bits + tl.program_id(2) * width + j, largest_of(by_columns, 0), inside, sem="relaxed")


@kernel
def _grain_tile(tokens, width, grain, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens and columns of the tile (program 0, program 1) of grain (program 2), and which of them there are."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, j = tl.program_id(2) * grain + at, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return t, j, (at < grain) & (t < tokens), j < width


@kernel
def gradient_digits(
    dy,
    w_e,
    x_e,
    row_bits,
    column_bits,
    rows,
    rows_e,
    columns,
    columns_e,
    status,
    plane,
    tokens,
    width,
    grain,
    ROW_LIMBS: tl.constexpr,
    COLUMN_LIMBS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Limbs from the bits that `gradient_scales` found."""
    t, j, present, inside = _grain_tile(tokens, width, grain, ROWS, BLOCK)
    mask = present[:, None] & inside[None, :]
    at = t.to(tl.int64)[:, None] * width + j[None, :]
    row_e = exponent(tl.load(row_bits + t, present, 0))
    column_e = exponent(tl.load(column_bits + tl.program_id(2) * width + j, inside, 0))
    if tl.program_id(1) == 0:
        tl.store(rows_e + t, row_e, present)
        raise_status(status, row_e)
    if tl.program_id(0) == 0:
        tl.store(columns_e + tl.program_id(2) * width + j, column_e, inside)
        raise_status(status, column_e)
    x = tl.load(dy + at, mask, 0.0)
    folded = x * power_of_two(tl.load(w_e + j, inside, 0))[None, :]
    scaled = folded * power_of_two(7 * ROW_LIMBS - 1 - row_e)[:, None]
    store_digits(rows, plane, at, mask, whole(scaled), ROW_LIMBS)
    folded = x * power_of_two(tl.load(x_e + t, present, 0))[:, None]
    scaled = folded * power_of_two(7 * COLUMN_LIMBS - 1 - column_e)[None, :]
    store_digits(columns, plane, at, mask, whole(scaled), COLUMN_LIMBS)


# --- Normalisation: a program holds whole rows


@kernel
def norm_limbs(
    x,
    gain,
    eps,
    share_of_one,
    planes,
    plane,
    e,
    r,
    status,
    rows,
    width,
    LIMBS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (t < rows)[:, None] & (j < width)[None, :]
    at = t.to(tl.int64)[:, None] * width + j[None, :]
    source = tl.load(x + at, mask, 0.0)
    mean = halves(source * source, ROWS, BLOCK) * share_of_one
    rms = reciprocal(tl.sqrt_rn(mean + eps))
    tl.store(r + t, rms, t < rows)
    y = (source * rms[:, None]) * tl.load(gain + j, j < width, 0.0)[None, :]
    found = exponent(largest_of(magnitude(y), 1))
    tl.store(e + t, found, t < rows)
    raise_status(status, tl.where(t < rows, found, LOWEST))
    store_digits(planes, plane, at, mask, whole(y * power_of_two(7 * LIMBS - 1 - found)[:, None]), LIMBS)


@kernel
def norm_gradient(
    dy,
    x,
    r,
    gain,
    share_of_one,
    dx,
    sums,
    tokens,
    width,
    grain,
    padded,
    last_padded,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Also the sums by pairs of each program's rows for the gain, [grains, programs, D].

    A grain's rows are followed by rows of +0 up to a power of two, `padded`, or `last_padded` in the last grain; what comes
    after that is -0, which changes no sum.
    """
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, j = tl.program_id(1) * grain + at, tl.arange(0, BLOCK)
    present = (at < grain) & (t < tokens)
    mask = present[:, None] & (j < width)[None, :]
    place = t.to(tl.int64)[:, None] * width + j[None, :]
    upstream, rms = tl.load(dy + place, mask, 0.0), tl.load(r + t, present, 0.0)[:, None]
    n = tl.load(x + place, mask, 0.0) * rms
    dn = upstream * tl.load(gain + j, j < width, 0.0)[None, :]
    c = halves(dn * n, ROWS, BLOCK) * share_of_one
    tl.store(dx + place, tl.load(dx + place, mask, 0.0) + (dn - n * c[:, None]) * rms, mask)
    is_last = tl.program_id(1) == tl.num_programs(1) - 1
    absent = from_bits(tl.where(at < tl.where(is_last, last_padded, padded), 0, NEGATIVE_ZERO))
    total = pairs_of_columns(tl.where(present[:, None], upstream * n, absent[:, None]), ROWS, BLOCK)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + program.to(tl.int64) * width + j, total, j < width)


@kernel
def pair_sums(sums, out, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums by pairs of each ROWS rows of a matrix."""
    program, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = (program * ROWS + tl.arange(0, ROWS))[:, None] * width + j[None, :]
    rows = tl.load(sums + at, (j < width)[None, :], 0.0)
    tl.store(out + program * width + j, pairs_of_columns(rows, ROWS, BLOCK), j < width)


@kernel
def grain_sums(sums, out, grains, width, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """The grains' sums added in order; apart from `pair_sums`, because Triton reorders sums that are reduced in a loop."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(sums + j, j < width, 0.0)
    if KEEP:
        total = tl.load(out + j, j < width, 0.0) + total
    for grain in range(1, grains):
        total = total + tl.load(sums + grain * width + j, j < width, 0.0)
    tl.store(out + j, total, j < width)


# --- SwiGLU


@kernel
def swiglu_limbs(
    gate_up, planes, plane, e, status, rows, width, LIMBS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    t, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    row = t.to(tl.int64)[:, None] * width
    largest = tl.full((ROWS, BLOCK), 0, tl.int32)
    for start in range(0, width, BLOCK):
        mask = (t < rows)[:, None] & (start + j < width)[None, :]
        largest = tl.maximum(largest, magnitude(_swiglu(gate_up, 2 * row + start + j[None, :], width, mask)))
    found = exponent(largest_of(largest, 1))
    tl.store(e + t, found, t < rows)
    raise_status(status, tl.where(t < rows, found, LOWEST))
    scale = power_of_two(7 * LIMBS - 1 - found)[:, None]
    for start in range(0, width, BLOCK):
        mask = (t < rows)[:, None] & (start + j < width)[None, :]
        y = _swiglu(gate_up, 2 * row + start + j[None, :], width, mask)
        store_digits(planes, plane, row + start + j[None, :], mask, whole(y * scale), LIMBS)


@kernel
def _swiglu(gate_up, at, width, mask):
    gate = tl.load(gate_up + at, mask, 0.0)
    return (gate * sigmoid(gate)) * tl.load(gate_up + at + width, mask, 0.0)


@kernel
def swiglu_gradient(dy, gate_up, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    t, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (t < rows)[:, None] & (j < width)[None, :]
    row = t.to(tl.int64)[:, None] * width
    at = 2 * row + j[None, :]
    gate, up = tl.load(gate_up + at, mask, 0.0), tl.load(gate_up + at + width, mask, 0.0)
    upstream, s = tl.load(dy + row + j[None, :], mask, 0.0), sigmoid(gate)
    slope = gate * (1.0 - s)
    tl.store(gate_up + at, ((upstream * up) * s) * (slope + 1.0), mask)
    tl.store(gate_up + at + width, upstream * (gate * s), mask)


# --- Loss: a program holds one row, in LINES lines of WIDTH numbers that make a power of two


@kernel
def exponential_sums(
    logits,
    targets,
    largest,
    chosen,
    sums,
    vocabulary,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A row's largest logit, its target's less that, and exp(z - largest) summed by halves down to WIDTH numbers."""
    t = tl.program_id(0)
    row = logits + t.to(tl.int64) * vocabulary
    j = tl.arange(0, CHUNK)
    top = tl.full((CHUNK,), float("-inf"), tl.float32)
    for start in range(0, vocabulary, CHUNK):
        top = tl.maximum(top, tl.load(row + start + j, start + j < vocabulary, float("-inf")))
    m = tl.reduce(top, 0, tl.standard._elementwise_max)
    tl.store(largest + t, m)
    tl.store(chosen + t, tl.load(row + tl.load(targets + t)) - m)
    line, j = tl.arange(0, LINES), tl.arange(0, BLOCK)
    for start in range(0, WIDTH, BLOCK):
        at = line[:, None] * WIDTH + start + j[None, :]
        p = tl.where(at < vocabulary, exp(tl.load(row + at, at < vocabulary, 0.0) - m), 0.0)
        tl.store(sums + t.to(tl.int64) * WIDTH + start + j, halves_of_columns(p, LINES, BLOCK))


@kernel
def cross_entropy(
    logits, targets, largest, chosen, sums, share, losses, vocabulary, WIDTH: tl.constexpr, CHUNK: tl.constexpr
):
    """The chosen logits are given, since other threads overwrite them meanwhile."""
    t = tl.program_id(0)
    row = logits + t.to(tl.int64) * vocabulary
    m, target = tl.load(largest + t), tl.load(targets + t)
    total = halves(tl.load(sums + t.to(tl.int64) * WIDTH + tl.arange(0, WIDTH))[None, :], 1, WIDTH)
    tl.store(losses + t + tl.arange(0, 1), log(total) - tl.load(chosen + t))
    r = reciprocal(total)
    for start in range(0, vocabulary, CHUNK):
        j = start + tl.arange(0, CHUNK)
        p = exp(tl.load(row + j, j < vocabulary, 0.0) - m) * r
        tl.store(row + j, tl.where(j == target, p - 1.0, p) * share, j < vocabulary)
