"""The passes between products, one torch operation at a time: any device, no compiler, and the same bits as `compiled`.

Only operations whose float32 result is defined are used: + − × and ÷ of two tensors, comparisons, integers, and a square
root that is correctly rounded (torch's own is not, on the CPU). Shapes are those of `passes`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from swarm_protocol.exact import rule
from swarm_protocol.exact.products import power_of_two
from swarm_protocol.exact.rule import StepScalars

name = "torch"


def _sqrt(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return torch.from_numpy(np.sqrt(x.numpy()))
    return torch.sqrt(x)


def _reciprocal(x: Tensor) -> Tensor:
    return torch.ones_like(x) / x


def _padded(x: Tensor) -> Tensor:
    missing = rule.power_of_two_at_least(x.shape[-1]) - x.shape[-1]
    return torch.cat([x, x.new_zeros(*x.shape[:-1], missing)], -1) if missing else x


def _halves(x: Tensor) -> Tensor:
    """The sum over the last axis."""
    x = _padded(x)
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _exponents(x: Tensor, dim: int, status: Tensor) -> Tensor:
    largest = (x.contiguous().view(torch.int32) & 0x7FFFFFFF).amax(dim)
    e = ((largest >> 23) - 126).clamp_min(rule.LOWEST_EXPONENT)
    status.copy_(torch.maximum(status, e.max()))
    return e


def _digits(x: Tensor, scale: Tensor, planes: Tensor) -> None:
    """`planes` [L, M, K] of x · scale."""
    q = _whole(x * scale)
    for plane in range(len(planes) - 1, 0, -1):
        low = ((q + 64) & 127) - 64
        planes[plane] = low
        q = (q - low) >> 7
    planes[0] = q


def _whole(x: Tensor) -> Tensor:
    """Rounded half to even, as int32; what a NaN becomes matters to nobody, since `status` has seen it."""
    return torch.nan_to_num(torch.round(x), 0.0, 0.0, 0.0).int()


def _row_limbs(x: Tensor, planes: Tensor, e: Tensor, status: Tensor) -> None:
    e.copy_(_exponents(x, -1, status))
    _digits(x, power_of_two(rule.fraction_bits(len(planes)) - e)[:, None], planes)


def _column_limbs(x: Tensor, planes: Tensor, e: Tensor, status: Tensor) -> None:
    e.copy_(_exponents(x, 0, status))
    _digits(x, power_of_two(rule.fraction_bits(len(planes)) - e)[None, :], planes)


def _exp(x: Tensor) -> Tensor:
    x = x.clamp_min(rule.EXP_LOWEST)
    n = torch.round(x * rule.f32(rule.LOG2_E))
    r = (x - n * rule.f32(rule.LN2_HIGH)) - n * rule.f32(rule.LN2_LOW)
    p = torch.full_like(r, rule.f32(rule.EXP_POLYNOMIAL[0]))
    for coefficient in rule.EXP_POLYNOMIAL[1:]:
        p = p * r
        p = p + rule.f32(coefficient)
    y = p * (r * r)
    y = y + r
    y = y + 1.0
    return y * power_of_two(torch.nan_to_num(n).int())


def _log(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    e = ((bits >> 23) - 126).float()
    m = ((bits & 0x7FFFFF) | 0x3F000000).view(torch.float32)
    small = m < rule.f32(0.70710678)
    e, m = torch.where(small, e - 1.0, e), torch.where(small, m + m, m) - 1.0
    square = m * m
    p = torch.full_like(m, rule.f32(rule.LOG_POLYNOMIAL[0]))
    for coefficient in rule.LOG_POLYNOMIAL[1:]:
        p = p * m
        p = p + rule.f32(coefficient)
    y = (p * m) * square
    y = y + e * rule.f32(rule.LN2_LOW)
    y = y - square * 0.5
    return (m + y) + e * rule.f32(rule.LN2_HIGH)


def _sigmoid(x: Tensor) -> Tensor:
    t = _exp(-x.abs())
    return torch.where(x >= 0, torch.ones_like(t), t) / (t + 1.0)


def _value(s: Tensor, a_e: Tensor, b_e: Tensor) -> Tensor:
    """What integers of limb products stand for."""
    limbs = 2 if len(s) == 4 else 3
    weights = [i + j for i, j in rule.limb_pairs(limbs)]
    value = s[0].float()
    for weight in range(1, 2 * limbs - 1):
        first = weights.index(weight)
        group = s[first : first + weights.count(weight)].sum(0, dtype=torch.int32)
        value = value * 128.0
        value = value + group.float()
    return value * power_of_two(a_e[:, None] + b_e[None, :] - rule.product_bits(limbs))


def finish(s: Tensor, a_e: Tensor, b_e: Tensor, out: Tensor, keep: float) -> None:
    value = _value(s, a_e, b_e)
    out.copy_(value if keep == 0.0 else out * keep + value)


def limbs(x: Tensor, planes: Tensor, e: Tensor, status: Tensor) -> None:
    _row_limbs(x, planes, e, status)


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
    _row_limbs(dy * power_of_two(w_e), rows, rows_e, status)
    folded = dy * power_of_two(x_e)[:, None]
    for index, e in enumerate(columns_e):
        part = slice(index * grain, (index + 1) * grain)
        _column_limbs(folded[part], columns[:, part], e, status)


def norm_limbs(x: Tensor, gain: Tensor, eps: float, planes: Tensor, e: Tensor, r: Tensor, status: Tensor) -> None:
    mean = _halves(x * x) * rule.reciprocal(x.shape[1])
    r.copy_(_reciprocal(_sqrt(mean + rule.f32(eps))))
    n = x * r[:, None]
    _row_limbs(n * gain, planes, e, status)


def norm_gradient(
    dy: Tensor, x: Tensor, r: Tensor, gain: Tensor, grain: int, dx: Tensor, gain_gradient: Tensor, keep: bool
) -> None:
    n, dn = x * r[:, None], dy * gain
    c = _halves(dn * n) * rule.reciprocal(x.shape[1])
    dx.add_((dn - n * c[:, None]) * r[:, None])
    for part in torch.split(dy * n, grain):
        missing = rule.power_of_two_at_least(len(part)) - len(part)
        sums = torch.cat([part, part.new_zeros(missing, part.shape[1])])
        while len(sums) > 1:
            sums = sums[0::2] + sums[1::2]
        gain_gradient.copy_(gain_gradient + sums[0] if keep else sums[0])
        keep = True


def swiglu_limbs(gate_up: Tensor, planes: Tensor, e: Tensor, status: Tensor) -> None:
    gate, up = gate_up.chunk(2, 1)
    _row_limbs((gate * _sigmoid(gate)) * up, planes, e, status)


def swiglu_gradient(dy: Tensor, gate_up: Tensor) -> None:
    gate, up = gate_up.chunk(2, 1)
    s = _sigmoid(gate)
    slope = gate * (1.0 - s)
    d_gate = ((dy * up) * s) * (slope + 1.0)
    up.copy_(dy * (gate * s))
    gate.copy_(d_gate)


def cross_entropy(logits: Tensor, targets: Tensor, share: float, losses: Tensor) -> None:
    at = targets[:, None]
    z = logits - logits.amax(1, keepdim=True)
    p = _exp(z)
    total = _halves(p)
    losses.copy_(_log(total) - z.gather(1, at)[:, 0])
    p = p * _reciprocal(total)[:, None]
    p.scatter_(1, at, p.gather(1, at) - 1.0)
    logits.copy_(p * share)


def embedding_gradient(dx: Tensor, tokens: Tensor, out: Tensor, keep: bool, status: Tensor) -> None:
    e = _exponents(dx, 0, status)
    q = torch.nan_to_num(torch.round(dx * power_of_two(rule.SCATTER_BITS - e)), 0.0, 0.0, 0.0).long()
    found, rows = torch.unique(tokens, return_inverse=True)
    sums = torch.zeros(len(found), dx.shape[1], dtype=torch.int64, device=dx.device).index_add_(0, rows, q)
    if not keep:
        out.zero_()
    out[found] = out[found] + sums.float() * power_of_two(e - rule.SCATTER_BITS)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


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
    count, _, positions, size = k.shape
    group = q.shape[2] // positions
    kv_heads = qkv.shape[1] // size // (group + 2)
    for c in range(count):
        sequence, head = divmod(c, kv_heads)
        parts = qkv[sequence * positions : (sequence + 1) * positions].view(positions, -1, size)
        queries = parts[:, head * group : (head + 1) * group].transpose(0, 1)
        _row_limbs(_rotated(queries, cos, sin).reshape(-1, size), q[c], q_e[c], status)
        _row_limbs(_rotated(parts[:, kv_heads * group + head], cos, sin), k[c], k_e[c], status)
        _column_limbs(parts[:, kv_heads * (group + 1) + head], v[c], v_e[c], status)


def _visible(scores: Tensor) -> Tensor:
    """Which of the positions [R, S] a query may see: those up to its own."""
    rows, positions = scores.shape
    at = torch.arange(positions, device=scores.device)
    return at[None, :] <= at.repeat(rows // positions)[:, None]


def softmax_limbs(s: Tensor, q_e: Tensor, k_e: Tensor, scale: float, planes: Tensor, r: Tensor) -> None:
    bits = rule.fraction_bits(len(planes))
    scores = _value(s, q_e, k_e) * scale
    hidden = ~_visible(scores)
    scores = scores.masked_fill(hidden, -torch.inf)
    largest = scores.amax(1)
    p = _exp(scores - largest[:, None]).masked_fill(hidden, 0.0) * 2.0**bits
    _digits(p, torch.ones_like(largest)[:, None], planes)
    total = _whole(p).sum(1, dtype=torch.int64).float()
    nan = torch.full_like(largest, torch.nan)
    r.copy_(torch.where(largest < torch.inf, _reciprocal(total * 2.0**-bits), nan))


def place_heads(s: Tensor, v_e: Tensor, r: Tensor, out: Tensor, column: int) -> None:
    positions, size = len(out), s.shape[2]
    values = (_value(s, torch.zeros_like(r, dtype=torch.int32), v_e) * r[:, None]).view(-1, positions, size)
    out[:, column : column + len(values) * size].view(positions, -1, size).copy_(values.transpose(0, 1))


def _head_rows(x: Tensor, column: int, rows: int, size: int) -> Tensor:
    positions = len(x)
    width = rows // positions * size
    return x[:, column : column + width].reshape(positions, -1, size).transpose(0, 1).reshape(rows, size)


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
    _, count, size = rows.shape
    y, dy = _head_rows(out, column, count, size), _head_rows(d_out, column, count, size)
    correction.copy_(_halves(dy * y))
    _row_limbs(dy * power_of_two(v_e), rows, rows_e, status)
    _column_limbs(dy * r[:, None], columns, columns_e, status)


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
    p = weights[0].int()
    for plane in weights[1:]:
        p = (p << 7) + plane
    w = (p.float() * 2.0 ** -rule.fraction_bits(len(weights))) * r[:, None]
    d_w = _value(s, s_e, torch.zeros_like(k_e))
    d_s = (w * (d_w - correction[:, None])) * scale
    d_s = d_s.masked_fill(~_visible(d_s), 0.0)
    _row_limbs(d_s * power_of_two(k_e), rows, rows_e, status)
    _column_limbs(d_s * power_of_two(q_e)[:, None], columns, columns_e, status)


def place_gradients(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, head: int, d_qkv: Tensor) -> None:
    positions, size = d_k.shape
    group = len(d_q) // positions
    parts = d_qkv.view(positions, -1, size)
    kv_heads = parts.shape[1] // (group + 2)
    back = _rotated(d_q.view(group, positions, size), cos, -sin)
    parts[:, head * group : (head + 1) * group] = back.transpose(0, 1)
    parts[:, kv_heads * group + head] = _rotated(d_k, cos, -sin)
    parts[:, kv_heads * (group + 1) + head] = d_v


def sum_of_squares(x: Tensor) -> float:
    flat = x.reshape(-1)
    leaves = max(1, -(-flat.numel() // rule.LEAF))
    squares = flat.new_zeros(leaves * rule.LEAF)
    squares[: flat.numel()] = flat * flat
    return float(_halves(_halves(squares.view(leaves, rule.LEAF))))


def adamw(p: Tensor, g: Tensor, factor: float, m: Tensor, v: Tensor, s: StepScalars, decay: float) -> None:
    g = g * factor
    m.copy_(m * s.beta1 + g * s.rest1)
    v.copy_(v * s.beta2 + (g * g) * s.rest2)
    update = (m / (_sqrt(v * s.correction2) + s.eps)) * s.adamw_lr
    p.copy_(p * decay - update)


def momentum(g: Tensor, factor: float, momentum: Tensor, mu: float, update: Tensor) -> None:
    g = g * factor
    momentum.copy_(momentum * mu + g)
    update.copy_(g + momentum * mu)


def polynomial_limbs(
    gram: Tensor, square: Tensor, b: float, c: float, fold: Tensor, planes: Tensor, e: Tensor, status: Tensor
) -> None:
    _row_limbs((gram * b + square * c) * power_of_two(fold), planes, e, status)


def descend(p: Tensor, direction: Tensor, decay: float, rate: float) -> None:
    p.copy_(p * decay - direction * rate)
