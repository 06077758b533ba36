"""The passes between products, compiled by Triton: a few kernels each, for tensors on an NVIDIA GPU.

The same functions and the same bits as `exact.eager`, with one trip through memory where that takes dozens. Multiplications
are not fused with additions: both compilers are told so, and a test reads their code for it. `triton` comes with torch's CUDA
builds; importing this package without it raises ImportError. The package is not called triton, which it would hide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swarm_protocol.exact import eager, rule
from swarm_protocol.exact.fused import attention, layers, updates
from swarm_protocol.exact.fused.rows import launch, programs, tiles, warps_for, whole_rows
from swarm_protocol.exact.reference import sum_by_halves
from swarm_protocol.exact.rule import StepScalars, power_of_two_at_least

name = "triton"

embedding_gradient = eager.embedding_gradient
"""Torch's: it sorts tokens, and takes little of a step."""

TILE = 4096
"""Elements that a program holds of each operand; half of it where it holds many."""

WIDEST = 1 << 14
"""Elements of the longest row that one program sums; RMSNorm of longer rows is torch's."""

_PARTIAL = 1024
"""Numbers to which a row of exponentials is summed before the last kernel of the cross-entropy."""

_ELEMENTS = 1024
"""Of each vector, for a program of a pass over flat vectors."""

_LINES = 256
"""Rows that a program sums by pairs, in the gradients of gains."""


def _limbs(products: int) -> int:
    return 2 if products == 4 else 3


def finish(s: Tensor, a_e: Tensor, b_e: Tensor, out: Tensor, keep: float) -> None:
    rows, width = out.shape
    tile, block = tiles(rows, width, TILE, 1024)
    grid = programs(rows, tile), programs(width, block)
    sizes = {"LIMBS": _limbs(len(s)), "ROWS": tile, "BLOCK": block}
    launch(layers.finish, grid, s, s.stride(0), a_e, b_e, out, rows, width, keep, KEEP=keep != 0.0, **sizes)


def limbs(x: Tensor, planes: Tensor, e: Tensor, status: Tensor) -> None:
    rows, width = x.shape
    tile, block = tiles(rows, width, TILE, TILE)
    sizes = {"LIMBS": len(planes), "ROWS": tile, "BLOCK": block}
    launch(layers.limbs, (programs(rows, tile),), x, planes, planes.stride(0), e, status, rows, width, **sizes)


def gradient_limbs(
    dy: Tensor,
    w_e: Tensor,
    x_e: Tensor,
    grain: int,
    rows: Tensor,
    rows_e: Tensor,
    columns: Tensor,
    columns_e: Tensor,
    status: Tensor,
) -> None:
    tokens, width = dy.shape
    row_bits, column_bits = torch.zeros_like(rows_e), torch.zeros_like(columns_e)
    grid, sizes = _grain_tiles(tokens, width, grain)
    launch(layers.gradient_scales, grid, dy, w_e, x_e, row_bits, column_bits, tokens, width, grain, **sizes)
    _two_way_digits(dy, w_e, x_e, row_bits, column_bits, grain, rows, rows_e, columns, columns_e, status)


def _grain_tiles(tokens: int, width: int, grain: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Tiles that are low enough for a grain and wide enough for whole lines of memory."""
    grain = min(grain, tokens)
    tile, block = tiles(grain, width, TILE, 128)
    return (programs(grain, tile), programs(width, block), programs(tokens, grain)), {"ROWS": tile, "BLOCK": block}


def _two_way_digits(
    dy: Tensor,
    w_e: Tensor,
    x_e: Tensor,
    row_bits: Tensor,
    column_bits: Tensor,
    grain: int,
    rows: Tensor,
    rows_e: Tensor,
    columns: Tensor,
    columns_e: Tensor,
    status: Tensor,
) -> None:
    tokens, width = dy.shape
    grid, sizes = _grain_tiles(tokens, width, grain)
    sizes |= {"ROW_LIMBS": len(rows), "COLUMN_LIMBS": len(columns)}
    scales = dy, w_e, x_e, row_bits, column_bits
    results = rows, rows_e, columns, columns_e, status, rows.stride(0)
    launch(layers.gradient_digits, grid, *scales, *results, tokens, width, grain, **sizes)


# --- Normalisation, SwiGLU, loss


def norm_limbs(x: Tensor, gain: Tensor, eps: float, planes: Tensor, e: Tensor, r: Tensor, status: Tensor) -> None:
    rows, width = x.shape
    if width > WIDEST:
        eager.norm_limbs(x, gain, eps, planes, e, r, status)
        return
    tile, block = whole_rows(rows, width, TILE)
    sizes = {"LIMBS": len(planes), "ROWS": tile, "BLOCK": block}
    given = x, gain, eps, rule.reciprocal(width), planes, planes.stride(0), e, r, status
    launch(layers.norm_limbs, (programs(rows, tile),), *given, rows, width, **sizes, warps=warps_for(tile * block))


def norm_gradient(
    dy: Tensor, x: Tensor, r: Tensor, gain: Tensor, grain: int, dx: Tensor, gain_gradient: Tensor, keep: bool
) -> None:
    tokens, width = x.shape
    if width > WIDEST:
        eager.norm_gradient(dy, x, r, gain, grain, dx, gain_gradient, keep)
        return
    grain = min(grain, tokens)
    grains = programs(tokens, grain)
    padded, last_padded = (power_of_two_at_least(n) for n in (grain, tokens - (grains - 1) * grain))
    tile, block = whole_rows(grain, width, TILE)
    lines = max(1, padded // tile)
    sums = x.new_empty(grains * lines, width)
    given = dy, x, r, gain, rule.reciprocal(width), dx, sums, tokens, width, grain, padded, last_padded
    warps = warps_for(tile * block)
    launch(layers.norm_gradient, (lines, grains), *given, ROWS=tile, BLOCK=block, warps=warps)
    while lines > 1:
        at_once = min(lines, _LINES)
        lines //= at_once
        longer, sums = sums, x.new_empty(grains * lines, width)
        grid, sizes = (len(sums), programs(width, 16)), {"ROWS": at_once, "BLOCK": 16}
        launch(layers.pair_sums, grid, longer, sums, width, **sizes)
    launch(layers.grain_sums, (programs(width, 128),), sums, gain_gradient, grains, width, KEEP=keep, BLOCK=128)


def swiglu_limbs(gate_up: Tensor, planes: Tensor, e: Tensor, status: Tensor) -> None:
    rows, width = planes.shape[1:]
    tile, block = tiles(rows, width, TILE // 2, 1024)
    sizes = {"LIMBS": len(planes), "ROWS": tile, "BLOCK": block}
    given = gate_up, planes, planes.stride(0), e, status
    launch(layers.swiglu_limbs, (programs(rows, tile),), *given, rows, width, **sizes)


def swiglu_gradient(dy: Tensor, gate_up: Tensor) -> None:
    rows, width = dy.shape
    tile, block = tiles(rows, width, TILE // 2, 1024)
    grid = programs(rows, tile), programs(width, block)
    launch(layers.swiglu_gradient, grid, dy, gate_up, rows, width, ROWS=tile, BLOCK=block)


def cross_entropy(logits: Tensor, targets: Tensor, share: float, losses: Tensor) -> None:
    rows, vocabulary = logits.shape
    padded = power_of_two_at_least(vocabulary)
    width = min(padded, max(_PARTIAL, padded // TILE))
    lines = padded // width
    largest, chosen, sums = logits.new_empty(rows), logits.new_empty(rows), logits.new_empty(rows, width)
    chunk, targets = min(padded, TILE), targets.contiguous()
    sizes = {"LINES": lines, "WIDTH": width, "BLOCK": min(width, max(1, TILE // lines)), "CHUNK": chunk}
    launch(layers.exponential_sums, (rows,), logits, targets, largest, chosen, sums, vocabulary, **sizes)
    given = logits, targets, largest, chosen, sums, share, losses, vocabulary
    launch(layers.cross_entropy, (rows,), *given, WIDTH=width, CHUNK=chunk)


# --- Attention


def heads(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q: Tensor,
    q_e: Tensor,
    k: Tensor,
    k_e: Tensor,
    v: Tensor,
    v_e: Tensor,
    status: Tensor,
) -> None:
    count, planes, positions, size = k.shape
    group = q.shape[2] // positions
    shape = positions, size, group, qkv.shape[1] // size // (group + 2)
    tile, block = whole_rows(positions, size // 2, TILE)
    grid = programs(positions, tile), group + 1, count
    given = qkv, cos, sin, q, q_e, k, k_e, status
    launch(attention.rotated_heads, grid, *given, *shape, LIMBS=planes, ROWS=tile, BLOCK=block)
    tile, block = tiles(positions, size, TILE, 64)
    sizes = {"LIMBS": planes, "ROWS": tile, "BLOCK": block}
    launch(attention.value_heads, (programs(size, block), count), qkv, v, v_e, status, *shape, **sizes)


def softmax_limbs(s: Tensor, q_e: Tensor, k_e: Tensor, scale: float, planes: Tensor, r: Tensor) -> None:
    count, rows, positions = planes.shape
    tile, block = tiles(rows, positions, TILE // 2, 1024)
    sizes = {"LIMBS": count, "ROWS": tile, "BLOCK": block}
    given = s, q_e, k_e, scale, planes, r, planes.stride(0)
    launch(attention.softmax_limbs, (programs(rows, tile),), *given, rows, positions, **sizes)


def place_heads(s: Tensor, v_e: Tensor, r: Tensor, out: Tensor, column: int) -> None:
    _, rows, size = s.shape
    tile, block = whole_rows(rows, size, TILE)
    sizes = {"LIMBS": _limbs(len(s)), "ROWS": tile, "BLOCK": block}
    shape = rows, len(out), size, out.shape[1], column
    launch(attention.place_heads, (programs(rows, tile),), s, v_e, r, out, s.stride(0), *shape, **sizes)


def attended_limbs(
    out: Tensor,
    d_out: Tensor,
    column: int,
    v_e: Tensor,
    r: Tensor,
    rows: Tensor,
    rows_e: Tensor,
    columns: Tensor,
    columns_e: Tensor,
    correction: Tensor,
    status: Tensor,
) -> None:
    planes, count, size = rows.shape
    tile, block = whole_rows(count, size, TILE)
    column_bits = torch.zeros_like(columns_e)
    grid, sizes = (programs(count, tile),), {"LIMBS": planes, "ROWS": tile, "BLOCK": block}
    shape = rows.stride(0), count, len(out), size, out.shape[1], column
    by_rows = out, d_out, v_e, r, rows, rows_e, column_bits, correction, status
    launch(attention.attended_rows, grid, *by_rows, *shape, **sizes)
    launch(attention.attended_columns, grid, d_out, r, columns, columns_e, column_bits, status, *shape, **sizes)


def softmax_gradient_limbs(
    s: Tensor,
    s_e: Tensor,
    weights: Tensor,
    r: Tensor,
    correction: Tensor,
    scale: float,
    q_e: Tensor,
    k_e: Tensor,
    rows: Tensor,
    rows_e: Tensor,
    columns: Tensor,
    columns_e: Tensor,
    status: Tensor,
) -> None:
    planes, count, positions = weights.shape
    tile, block = tiles(count, positions, TILE // 2, 128)
    d_s, row_bits, column_bits = r.new_empty(count, positions), torch.zeros_like(rows_e), torch.zeros_like(columns_e)
    grid, sizes = (programs(count, tile), programs(positions, block)), {"LIMBS": planes, "ROWS": tile, "BLOCK": block}
    given = s, s_e, weights, r, correction, scale, q_e, k_e, d_s, row_bits, column_bits
    launch(attention.score_gradients, grid, *given, weights.stride(0), count, positions, **sizes)
    _two_way_digits(d_s, k_e, q_e, row_bits, column_bits, count, rows, rows_e, columns, columns_e, status)


def place_gradients(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, head: int, d_qkv: Tensor) -> None:
    positions, size = d_k.shape
    group = len(d_q) // positions
    tile, block = whole_rows(positions, size // 2, TILE)
    grid = programs(positions, tile), group + 2
    shape = positions, size, group, head, d_qkv.shape[1]
    launch(attention.place_gradients, grid, d_q, d_k, d_v, cos, sin, d_qkv, *shape, ROWS=tile, BLOCK=block)


# --- Clipping and the optimizers


def sum_of_squares(x: Tensor) -> float:
    flat = x.reshape(-1)
    count = max(1, programs(flat.numel(), rule.LEAF))
    leaves = flat.new_empty(count)
    launch(updates.leaf_squares, (count,), flat, leaves, flat.numel(), count, LEAVES=1, LEAF=rule.LEAF)
    return float(sum_by_halves(leaves.cpu().numpy()))


def adamw(p: Tensor, g: Tensor, factor: float, m: Tensor, v: Tensor, s: StepScalars, decay: float) -> None:
    grid, size = (programs(p.numel(), _ELEMENTS),), p.numel()
    scalars = s.beta1, s.rest1, s.beta2, s.rest2, s.correction2, s.eps, s.adamw_lr, decay
    launch(updates.adamw, grid, p, g, factor, m, v, *scalars, size, BLOCK=_ELEMENTS)


def momentum(g: Tensor, factor: float, momentum: Tensor, mu: float, update: Tensor) -> None:
    grid, size = (programs(g.numel(), _ELEMENTS),), g.numel()
    launch(updates.momentum, grid, g, factor, momentum, mu, update, size, BLOCK=_ELEMENTS)


def polynomial_limbs(
    gram: Tensor, square: Tensor, b: float, c: float, fold: Tensor, planes: Tensor, e: Tensor, status: Tensor
) -> None:
    size = len(gram)
    tile, block = tiles(size, size, TILE // 2, 1024)
    sizes = {"LIMBS": len(planes), "ROWS": tile, "BLOCK": block}
    given = gram, square, b, c, fold, planes, planes.stride(0), e, status
    launch(layers.polynomial_limbs, (programs(size, tile),), *given, size, **sizes)


def descend(p: Tensor, direction: Tensor, decay: float, rate: float) -> None:
    grid, size = (programs(p.numel(), _ELEMENTS),), p.numel()
    launch(updates.descend, grid, p, direction, decay, rate, size, BLOCK=_ELEMENTS)
