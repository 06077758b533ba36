"""Kernels of clipping and of the optimizers, over flat vectors."""

from __future__ import annotations

import triton.language as tl

from swarm_protocol.exact.fused.rows import halves, kernel


@kernel
def leaf_squares(x, leaves, size, count, LEAVES: tl.constexpr, LEAF: tl.constexpr):
    """Sums of squares by halves of each LEAF numbers of x."""
    leaf = tl.program_id(0) * LEAVES + tl.arange(0, LEAVES)
    at = leaf.to(tl.int64)[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
    part = tl.load(x + at, at < size, 0.0)
    tl.store(leaves + leaf, halves(part * part, LEAVES, LEAF), leaf < count)


@kernel
def adamw(p, g, factor, m, v, beta1, rest1, beta2, rest2, correction2, eps, lr, decay, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    gradient = tl.load(g + at, mask, 0.0) * factor
    first = tl.load(m + at, mask, 0.0) * beta1 + gradient * rest1
    second = tl.load(v + at, mask, 0.0) * beta2 + (gradient * gradient) * rest2
    tl.store(m + at, first, mask)
    tl.store(v + at, second, mask)
    update = tl.div_rn(first, tl.sqrt_rn(second * correction2) + eps) * lr
    tl.store(p + at, tl.load(p + at, mask, 0.0) * decay - update, mask)


@kernel
def momentum(g, factor, momentum, mu, update, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    gradient = tl.load(g + at, mask, 0.0) * factor
    held = tl.load(momentum + at, mask, 0.0) * mu + gradient
    tl.store(momentum + at, held, mask)
    tl.store(update + at, gradient + held * mu, mask)


@kernel
def descend(p, direction, decay, rate, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    tl.store(p + at, tl.load(p + at, mask, 0.0) * decay - tl.load(direction + at, mask, 0.0) * rate, mask)
