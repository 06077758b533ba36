"""The passes between products, compiled by numba: one trip over the rows each, vectorised by LLVM.

The same functions and the same bits as `exact.eager`, several times faster, for tensors on the CPU. Numba compiles without
fastmath, so no multiplication is fused with an addition; a test reads the machine code for it. `numba` is an optional
dependency: importing this package without it raises ImportError. Rows are shared out to torch's threads (`team`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from swarm_protocol.exact.compiled import attention, layers, updates
from swarm_protocol.exact.compiled.team import team_for
from swarm_protocol.exact.reference import sum_by_halves
from swarm_protocol.exact.rule import LEAF, StepScalars

name = "numba"


def _arrays(*values: Any) -> Sequence[Any]:
    """Tensors as arrays of the same memory, floats as float32."""
    return [x.numpy() if isinstance(x, Tensor) else np.float32(x) if isinstance(x, float) else x for x in values]


def finish(s: Tensor, a_e: Tensor, b_e: Tensor, out: Tensor, keep: float) -> None:
    layers.finish(team_for(out.numel()), *_arrays(s, a_e, b_e, out, keep))


def limbs(x: Tensor, planes: Tensor, e: Tensor, status: Tensor) -> None:
    layers.limbs(team_for(x.numel()), *_arrays(x, planes, e, status))


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
    layers.gradient_limbs(team_for(dy.numel()), *_arrays(dy, w_e, x_e, grain, rows, rows_e, columns, columns_e, status))


def norm_limbs(x: Tensor, gain: Tensor, eps: float, planes: Tensor, e: Tensor, r: Tensor, status: Tensor) -> None:
    layers.norm_limbs(team_for(x.numel()), *_arrays(x, gain, eps, planes, e, r, status))


def norm_gradient(
    dy: Tensor, x: Tensor, r: Tensor, gain: Tensor, grain: int, dx: Tensor, gain_gradient: Tensor, keep: bool
) -> None:
    layers.norm_gradient(team_for(x.numel()), *_arrays(dy, x, r, gain, grain, dx, gain_gradient, keep))


def swiglu_limbs(gate_up: Tensor, planes: Tensor, e: Tensor, status: Tensor) -> None:
    layers.swiglu_limbs(team_for(gate_up.numel()), *_arrays(gate_up, planes, e, status))


def swiglu_gradient(dy: Tensor, gate_up: Tensor) -> None:
    layers.swiglu_gradient(team_for(gate_up.numel()), *_arrays(dy, gate_up))


def cross_entropy(logits: Tensor, targets: Tensor, share: float, losses: Tensor) -> None:
    layers.cross_entropy(team_for(logits.numel()), *_arrays(logits, targets, share, losses))


def embedding_gradient(dx: Tensor, tokens: Tensor, out: Tensor, keep: bool, status: Tensor) -> None:
    found, rows = np.unique(tokens.numpy(), return_inverse=True)
    if not keep:
        out.zero_()
    layers.embedding_gradient(team_for(dx.numel()), *_arrays(dx, rows.reshape(-1), found, out, status))


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
    attention.heads(team_for(qkv.numel()), *_arrays(qkv, cos, sin, q, q_e, k, k_e, v, v_e, status))


def softmax_limbs(s: Tensor, q_e: Tensor, k_e: Tensor, scale: float, planes: Tensor, r: Tensor) -> None:
    attention.softmax_limbs(team_for(planes[0].numel()), *_arrays(s, q_e, k_e, scale, planes, r))


def place_heads(s: Tensor, v_e: Tensor, r: Tensor, out: Tensor, column: int) -> None:
    attention.place_heads(team_for(s[0].numel()), *_arrays(s, v_e, r, out, column))


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
    attention.attended_limbs(
        team_for(rows[0].numel()),
        *_arrays(out, d_out, column, v_e, r, rows, rows_e, columns, columns_e, correction, status),
    )


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
    attention.softmax_gradient_limbs(
        team_for(rows[0].numel()),
        *_arrays(s, s_e, weights, r, correction, scale, q_e, k_e, rows, rows_e, columns, columns_e, status),
    )


def place_gradients(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, head: int, d_qkv: Tensor) -> None:
    attention.place_gradients(team_for(d_q.numel()), *_arrays(d_q, d_k, d_v, cos, sin, head, d_qkv))


def sum_of_squares(x: Tensor) -> float:
    flat = x.reshape(-1).numpy()
    leaves = np.empty(max(1, -(-flat.size // LEAF)), np.float32)
    updates.leaf_squares(team_for(flat.size), flat, leaves)
    return float(sum_by_halves(leaves))


def adamw(p: Tensor, g: Tensor, factor: float, m: Tensor, v: Tensor, s: StepScalars, decay: float) -> None:
    p, g, m, v = (x.view(-1) for x in (p, g, m, v))
    scalars = s.beta1, s.rest1, s.beta2, s.rest2, s.correction2, s.eps, s.adamw_lr, decay
    updates.adamw(team_for(p.numel()), *_arrays(p, g, factor, m, v, *scalars))


def momentum(g: Tensor, factor: float, momentum: Tensor, mu: float, update: Tensor) -> None:
    updates.momentum(team_for(g.numel()), *_arrays(g.view(-1), factor, momentum.view(-1), mu, update.view(-1)))


def polynomial_limbs(
    gram: Tensor, square: Tensor, b: float, c: float, fold: Tensor, planes: Tensor, e: Tensor, status: Tensor
) -> None:
    updates.polynomial_limbs(team_for(gram.numel()), *_arrays(gram, square, b, c, fold, planes, e, status))


def descend(p: Tensor, direction: Tensor, decay: float, rate: float) -> None:
    updates.descend(team_for(p.numel()), *_arrays(p.view(-1), direction.view(-1), decay, rate))
