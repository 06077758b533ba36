"""Kernels of clipping and of the optimizers, over flat vectors and matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from swarm_protocol.exact.compiled.rows import (
    LEAF,
    ZERO,
    Array,
    f32,
    halves,
    kernel,
    powers_of_two,
    raise_status,
    row_limbs,
    rows_of,
    tasks_of,
)
from swarm_protocol.exact.compiled.team import Team, share

ELEMENTS = 1 << 14
"""Elements per task of a pass over a flat vector."""


@kernel
def _tasks(x: Array) -> int:
    size: int = x.shape[0]
    return (size + ELEMENTS - 1) // ELEMENTS


@kernel
def _part(task: int, x: Array) -> Array:
    return x[task * ELEMENTS : min((task + 1) * ELEMENTS, x.shape[0])]


@kernel
def _leaf_squares(task: int, x: Array, leaves: Array) -> None:
    buffer = np.empty(LEAF, f32)
    first, last = rows_of(task, leaves.shape[0])
    for leaf in range(first, last):
        part = x[leaf * LEAF : min((leaf + 1) * LEAF, x.shape[0])]
        for j in range(part.shape[0]):
            buffer[j] = part[j] * part[j]
        buffer[part.shape[0] :] = ZERO
        leaves[leaf] = halves(buffer)


@kernel
def leaf_squares(team: Team, x: Array, leaves: Array) -> None:
    share(_leaf_squares, team, tasks_of(leaves.shape[0]), (x, leaves))


@kernel
def _adamw(
    task: int,
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
    p, g, m, v = _part(task, p), _part(task, g), _part(task, m), _part(task, v)
    for j in range(p.shape[0]):
        gradient = g[j] * factor
        first = f32(m[j] * beta1) + f32(gradient * rest1)
        second = f32(v[j] * beta2) + f32(f32(gradient * gradient) * rest2)
        m[j], v[j] = first, second
        update = f32(first / f32(np.sqrt(f32(second * correction2)) + eps)) * lr
        p[j] = f32(p[j] * decay) - update


@kernel
def adamw(
    team: Team,
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
    share(_adamw, team, _tasks(p), (p, g, factor, m, v, beta1, rest1, beta2, rest2, correction2, eps, lr, decay))


@kernel
def _momentum(task: int, g: Array, factor: Any, momentum: Array, mu: Any, update: Array) -> None:
    g, momentum, update = _part(task, g), _part(task, momentum), _part(task, update)
    for j in range(g.shape[0]):
        gradient = g[j] * factor
        held = f32(momentum[j] * mu) + gradient
        momentum[j] = held
        update[j] = gradient + f32(held * mu)


@kernel
def momentum(team: Team, g: Array, factor: Any, momentum: Array, mu: Any, update: Array) -> None:
    share(_momentum, team, _tasks(g), (g, factor, momentum, mu, update))


@kernel
def _polynomial_limbs(
    task: int, gram: Array, square: Array, b: Any, c: Any, factor: Array, planes: Array, e: Array
) -> None:
    row = np.empty(gram.shape[1], f32)
    first_row, last_row = rows_of(task, gram.shape[0])
    for t in range(first_row, last_row):
        first, second = gram[t], square[t]
        for j in range(gram.shape[1]):
            row[j] = f32(f32(first[j] * b) + f32(second[j] * c)) * factor[j]
        e[t] = row_limbs(row, planes, t)


@kernel
def polynomial_limbs(
    team: Team, gram: Array, square: Array, b: Any, c: Any, fold: Array, planes: Array, e: Array, status: Array
) -> None:
    """Limbs by rows of (gram · b + square · c) with 2^fold folded into the columns."""
    factor = powers_of_two(fold)
    share(_polynomial_limbs, team, tasks_of(gram.shape[0]), (gram, square, b, c, factor, planes, e))
    raise_status(e, status)


@kernel
def _descend(task: int, p: Array, direction: Array, decay: Any, rate: Any) -> None:
    p, direction = _part(task, p), _part(task, direction)
    for j in range(p.shape[0]):
        p[j] = f32(p[j] * decay) - f32(direction[j] * rate)


@kernel
def descend(team: Team, p: Array, direction: Array, decay: Any, rate: Any) -> None:
    share(_descend, team, _tasks(p), (p, direction, decay, rate))
