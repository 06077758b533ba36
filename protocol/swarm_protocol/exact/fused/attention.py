"""Kernels of attention, forward and backward.

Index c counts the key-value heads of all sequences; rows of a head's queries are (group, position).
"""

from __future__ import annotations

import triton.language as tl

from swarm_protocol.exact.fused.rows import (
    LOWEST,
    exp,
    exponent,
    halves,
    kernel,
    largest_of,
    load_digits,
    magnitude,
    power_of_two,
    product_value,
    raise_status,
    reciprocal,
    store_digits,
    total_of,
    whole,
)


@kernel
def rotated_heads(
    qkv,
    cos,
    sin,
    q,
    q_e,
    k,
    k_e,
    status,
    positions,
    size,
    group,
    kv_heads,
    LIMBS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Limbs by rows of some positions of one head: queries `part` of its group, or keys if that is the group's size."""
    s, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    part, c, half = tl.program_id(1), tl.program_id(2), size // 2
    present = s < positions
    mask = present[:, None] & (j < half)[None, :]
    sequence, head = c // kv_heads, c % kv_heads
    column = tl.where(part < group, head * group + part, kv_heads * group + head) * size
    row = (sequence * positions + s).to(tl.int64) * ((group + 2) * kv_heads * size)
    at = row[:, None] + column + j[None, :]
    first, second = tl.load(qkv + at, mask, 0.0), tl.load(qkv + at + half, mask, 0.0)
    angle = s[:, None] * half + j[None, :]
    cosine, sine = tl.load(cos + angle, mask, 0.0), tl.load(sin + angle, mask, 0.0)
    left, right = first * cosine - second * sine, second * cosine + first * sine
    e = exponent(tl.maximum(largest_of(magnitude(left), 1), largest_of(magnitude(right), 1)))
    raise_status(status, tl.where(present, e, LOWEST))
    scale = power_of_two(7 * LIMBS - 1 - e)[:, None]
    left_q, right_q = whole(left * scale), whole(right * scale)
    if part < group:
        t = part * positions + s
        plane = group * positions * size
        target = q + c.to(tl.int64) * LIMBS * plane
        tl.store(q_e + c * group * positions + t, e, present)
        _store_halves(target, plane, t[:, None] * size + j[None, :], half, mask, left_q, right_q, LIMBS)
    else:
        plane = positions * size
        target = k + c.to(tl.int64) * LIMBS * plane
        tl.store(k_e + c * positions + s, e, present)
        _store_halves(target, plane, s[:, None] * size + j[None, :], half, mask, left_q, right_q, LIMBS)


@kernel
def _store_halves(planes, plane, at, half, mask, left, right, LIMBS: tl.constexpr):
    store_digits(planes, plane, at, mask, left, LIMBS)
    store_digits(planes, plane, at + half, mask, right, LIMBS)


@kernel
def value_heads(
    qkv,
    v,
    v_e,
    status,
    positions,
    size,
    group,
    kv_heads,
    LIMBS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Limbs by columns of one head's values, some columns of all positions."""
    rows, j = tl.arange(0, ROWS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1)
    sequence, head = c // kv_heads, c % kv_heads
    width = (group + 2) * kv_heads * size
    source = qkv + sequence.to(tl.int64) * positions * width + (kv_heads * (group + 1) + head) * size
    largest = tl.full((ROWS, BLOCK), 0, tl.int32)
    for start in range(0, positions, ROWS):
        s = start + rows
        mask = (s < positions)[:, None] & (j < size)[None, :]
        x = tl.load(source + s.to(tl.int64)[:, None] * width + j[None, :], mask, 0.0)
        largest = tl.maximum(largest, magnitude(x))
    e = exponent(largest_of(largest, 0))
    tl.store(v_e + c * size + j, e, j < size)
    raise_status(status, tl.where(j < size, e, LOWEST))
    scale = power_of_two(7 * LIMBS - 1 - e)[None, :]
    plane = positions * size
    target = v + c.to(tl.int64) * LIMBS * plane
    for start in range(0, positions, ROWS):
        s = start + rows
        mask = (s < positions)[:, None] & (j < size)[None, :]
        x = tl.load(source + s.to(tl.int64)[:, None] * width + j[None, :], mask, 0.0)
        store_digits(target, plane, s[:, None] * size + j[None, :], mask, whole(x * scale), LIMBS)


@kernel
def softmax_limbs(
    s,
    q_e,
    k_e,
    scale,
    planes,
    r,
    plane,
    rows,
    positions,
    LIMBS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    row, last = t.to(tl.int64)[:, None] * positions, t % positions
    row_e = tl.load(q_e + t, t < rows, 0)[:, None]
    largest = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    for start in range(0, positions, BLOCK):
        seen = (t < rows)[:, None] & (start + j[None, :] <= last[:, None])
        e = row_e + tl.load(k_e + start + j, start + j < positions, 0)[None, :]
        score = product_value(s, plane, row + start + j[None, :], seen, e, LIMBS) * scale
        largest = tl.maximum(largest, tl.where(seen, score, float("-inf")))
    m = tl.reduce(largest, 1, tl.standard._elementwise_max)
    total = tl.full((ROWS, BLOCK), 0, tl.int32)
    for start in range(0, positions, BLOCK):
        mask = (t < rows)[:, None] & (start + j < positions)[None, :]
        seen = mask & (start + j[None, :] <= last[:, None])
        at = row + start + j[None, :]
        e = row_e + tl.load(k_e + start + j, start + j < positions, 0)[None, :]
        p = exp(product_value(s, plane, at, seen, e, LIMBS) * scale - m[:, None])
        q = tl.where(seen, whole(p * (1 << 7 * LIMBS - 1)), 0)
        total += q
        store_digits(planes, plane, at, mask, q, LIMBS)
    sums = total_of(total.to(tl.int64), 1).to(tl.float32) * power_of_two(1 - 7 * LIMBS + tl.full((ROWS,), 0, tl.int32))
    # A score that overflowed must not pass for a weight: NaN is refused where it next becomes limbs.
    tl.store(r + t, tl.where(m < float("inf"), reciprocal(sums), float("nan")), t < rows)


@kernel
def place_heads(
    s,
    v_e,
    r,
    out,
    plane,
    rows,
    positions,
    size,
    width,
    column,
    LIMBS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (t < rows)[:, None] & (j < size)[None, :]
    e = tl.load(v_e + j, j < size, 0)[None, :]
    value = product_value(s, plane, t.to(tl.int64)[:, None] * size + j[None, :], mask, e, LIMBS)
    value = value * tl.load(r + t, t < rows, 0.0)[:, None]
    tl.store(out + _head_place(t, j, positions, size, width, column), value, mask)


@kernel
def _head_place(t, j, positions, size, width, column):
    """Where row t of a head lies in the rows of its sequence."""
    return ((t % positions).to(tl.int64) * width + column + (t // positions) * size)[:, None] + j[None, :]


@kernel
def attended_rows(
    out,
    d_out,
    v_e,
    r,
    planes,
    e,
    column_bits,
    correction,
    status,
    plane,
    rows,
    positions,
    size,
    width,
    column,
    LIMBS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Limbs by rows, and the bits of the largest magnitudes of columns [H], which are 0 before."""
    t, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (t < rows)[:, None] & (j < size)[None, :]
    place = _head_place(t, j, positions, size, width, column)
    dy = tl.load(d_out + place, mask, 0.0)
    tl.store(correction + t, halves(dy * tl.load(out + place, mask, 0.0), ROWS, BLOCK), t < rows)
    by_columns = magnitude(dy * tl.load(r + t, t < rows, 0.0)[:, None])
    tl.atomic_max(column_bits + j, largest_of(by_columns, 0), j < size, sem="relaxed")
    folded = dy * power_of_two(tl.load(v_e + j, j < size, 0))[None, :]
    found = exponent(largest_of(magnitude(folded), 1))
    tl.store(e + t, found, t < rows)
    raise_status(status, tl.where(t < rows, found, LOWEST))
    q = whole(folded * power_of_two(7 * LIMBS - 1 - found)[:, None])
    store_digits(planes, plane, t.to(tl.int64)[:, None] * size + j[None, :], mask, q, LIMBS)


@kernel
def attended_columns(
    d_out,
    r,
    planes,
    e,
    column_bits,
    status,
    plane,
    rows,
    positions,
    size,
    width,
    column,
    LIMBS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (t < rows)[:, None] & (j < size)[None, :]
    found = exponent(tl.load(column_bits + j, j < size, 0))
    if tl.program_id(0) == 0:
        tl.store(e + j, found, j < size)
        raise_status(status, found)
    dy = tl.load(d_out + _head_place(t, j, positions, size, width, column), mask, 0.0)
    folded = dy * tl.load(r + t, t < rows, 0.0)[:, None]
    q = whole(folded * power_of_two(7 * LIMBS - 1 - found)[None, :])
    store_digits(planes, plane, t.to(tl.int64)[:, None] * size + j[None, :], mask, q, LIMBS)


@kernel
def score_gradients(
    s,
    s_e,
    weights,
    r,
    correction,
    scale,
    q_e,
    k_e,
    d_s,
    row_bits,
    column_bits,
    plane,
    rows,
    positions,
    LIMBS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The scores' gradient, and the bits of the largest magnitudes of its rows and columns, which are 0 before."""
    t, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present, inside = t < rows, j < positions
    mask = present[:, None] & inside[None, :]
    at = t.to(tl.int64)[:, None] * positions + j[None, :]
    seen = mask & (j[None, :] <= (t % positions)[:, None])
    unit = power_of_two(1 - 7 * LIMBS + tl.full((ROWS,), 0, tl.int32))[:, None]
    w = (load_digits(weights, plane, at, seen, LIMBS).to(tl.float32) * unit) * tl.load(r + t, present, 0.0)[:, None]
    e = tl.load(s_e + t, present, 0)[:, None]
    d_w = product_value(s, plane, at, seen, e, LIMBS)
    x = (w * (d_w - tl.load(correction + t, present, 0.0)[:, None])) * scale
    x = tl.where(seen, x, 0.0)
    tl.store(d_s + at, x, mask)
    by_rows = magnitude(x * power_of_two(tl.load(k_e + j, inside, 0))[None, :])
    by_columns = magnitude(x * power_of_two(tl.load(q_e + t, present, 0))[:, None])
    tl.atomic_max(row_bits + t, largest_of(by_rows, 1), present, sem="relaxed")
    tl.atomic_max(column_bits + j, largest_of(by_columns, 0), inside, sem="relaxed")


@kernel
def place_gradients(
    d_q,
    d_k,
    d_v,
    cos,
    sin,
    d_qkv,
    positions,
    size,
    group,
    head,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some positions of a head: queries `part` of its group, or keys or values if that is the group's size or more."""
    s, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    part, half = tl.program_id(1), size // 2
    kv_heads = width // size // (group + 2)
    mask = (s < positions)[:, None] & (j < half)[None, :]
    source = s[:, None] * size + j[None, :]
    target = d_qkv + s.to(tl.int64)[:, None] * width + j[None, :]
    angle = s[:, None] * half + j[None, :]
    if part < group:
        at = (head * group + part) * size
        _place_rotated(d_q + part * positions * size + source, cos + angle, sin + angle, target + at, half, mask)
    elif part == group:
        at = (kv_heads * group + head) * size
        _place_rotated(d_k + source, cos + angle, sin + angle, target + at, half, mask)
    else:
        at = (kv_heads * (group + 1) + head) * size
        tl.store(target + at, tl.load(d_v + source, mask, 0.0), mask)
        tl.store(target + at + half, tl.load(d_v + source + half, mask, 0.0), mask)


@kernel
def _place_rotated(source, cos, sin, target, half, mask):
    """Rotated back; a - b · (-sin) is a + b · sin to the bit."""
    first, second = tl.load(source, mask, 0.0), tl.load(source + half, mask, 0.0)
    cosine, sine = tl.load(cos, mask, 0.0), tl.load(sin, mask, 0.0)
    tl.store(target, first * cosine + second * sine, mask)
    tl.store(target + half, second * cosine - first * sine, mask)
