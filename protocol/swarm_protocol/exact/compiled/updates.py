"""Kernels of clipping and of the optimizers, over flat vectors and matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from swarm_protocol.exact.compiled.rows import LEAF, ZERO, Array, f32, halves, kernel, power_of_two, row_limbs


@kernel
def leaf_squares(x: Array, leaves: Array) -> None:
    buffer = np.empty(LEAF, f32)
    for leaf in range(leaves.shape[0]):
        part = x[leaf * LEAF : min((leaf + 1) * LEAF, x.shape[0])]
        for j in range(part.shape[0]):
            buffer[j] = part[j] * part[j]
        buffer[part.shape[0] :] = ZERO
        leaves[leaf] = halves(buffer)


@kernel
def adamw(
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
def momentum(g: Array, factor: Any, momentum: Array, mu: Any, update: Array) -> None:
    for j in range(g.shape[0]):
        gradient = g[j] * factor
        held = f32(momentum[j] * mu) + gradient
        momentum[j] = held
        update[j] = gradient + f32(held * mu)


@kernel
def polynomial_limbs(
    gram: Array, square: Array, b: Any, c: Any, fold: Array, planes: Array, e: Array, status: Array
) -> None:
    """Limbs by rows of (gram · b + square · c) with 2^fold folded into the columns."""
    width = gram.shape[1]
    row, factor = np.empty(width, f32), np.empty(width, f32)
    for j in range(width):
        factor[j] = power_of_two(fold[j])
    for t in range(gram.shape[0]):
        first, second = gram[t], square[t]
        for j in range(width):
            row[j] = f32(f32(first[j] * b) + f32(second[j] * c)) * factor[j]
        e[t] = row_limbs(row, planes, t, status)


@kernel
def descend(p: Array, direction: Array, decay: Any, rate: Any) -> None:
    for j in range(p.shape[0]):
        p[j] = f32(p[j] * decay) - f32(direction[j] * rate)
