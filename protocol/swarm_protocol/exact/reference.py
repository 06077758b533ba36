"""Exact training in plain numpy: slow, obvious, and what every other backend is tested against.

One function per section of docs/numerics.md, in its order. Float32 arrays go through one numpy operation at a time, each
correctly rounded; integers are int64. Nothing here is fast enough for anything but tiny models.

Shapes: T tokens of some sequences, S positions, D hidden, F intermediate, V vocabulary, H head size, K key-value heads,
G query heads per key-value head. Layers' parameters are looked up by their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarm_protocol.exact import rule
from swarm_protocol.training import NonFiniteError

Float32 = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

F = np.float32


# --- 1. Sums, exponents, limbs, products


def sum_by_halves(x: Float32) -> Float32:
    """The sum over the last axis: padded with +0 to a power of two, then x[i] + x[i + n/2] until one is left."""
    x = _padded(x)
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def sum_by_pairs(x: Float32) -> Float32:
    """The sum over the first axis: padded with +0 to a power of two, then x[2i] + x[2i + 1] until one is left."""
    x = np.moveaxis(_padded(np.moveaxis(x, 0, -1)), -1, 0)
    while x.shape[0] > 1:
        x = x[0::2] + x[1::2]
    total: Float32 = x[0]
    return total


def _padded(x: Float32) -> Float32:
    missing = rule.power_of_two_at_least(x.shape[-1]) - x.shape[-1]
    return np.concatenate([x, np.zeros((*x.shape[:-1], missing), np.float32)], axis=-1)


def sum_of_squares(x: Float32) -> np.float32:
    """Over a whole tensor in row-major order: leaves of `rule.LEAF`, each by halves, then the leaves by halves."""
    x = x.reshape(-1)
    leaves = max(1, -(-x.size // rule.LEAF))
    padded = np.zeros(leaves * rule.LEAF, np.float32)
    padded[: x.size] = x * x
    return np.float32(sum_by_halves(sum_by_halves(padded.reshape(leaves, rule.LEAF))))


def exponents(x: Float32, axis: int) -> Integers:
    """The e of each row along `axis` (kept as length 1): the smallest with |x| < 2^e for all of it, but at least -100.

    Raises:
        NonFiniteError: a magnitude of 2^100 or more, an infinity or a NaN.
    """
    bits = (np.ascontiguousarray(x).view(np.int32) & 0x7FFFFFFF).max(axis=axis, keepdims=True).astype(np.int64)
    e: Integers = np.maximum((bits >> 23) - 126, rule.LOWEST_EXPONENT)
    if (e > rule.HIGHEST_EXPONENT).any():
        raise NonFiniteError("a value of exact training left the range below 2^100; a lower learning rate may help")
    return e


def power_of_two(e: Integers) -> Float32:
    """2^e with e clamped to the exponents of normal float32 numbers."""
    return ((np.clip(e, -126, 127) + 127) << 23).astype(np.int32).view(np.float32)


@dataclass(frozen=True)
class Operand:
    """Integers `q` of a matrix with one exponent per row: element (m, k) stands for q · 2^(e[m] - fraction_bits)."""

    q: Integers
    e: Integers

    def limbs(self, count: int) -> list[Integers]:
        """Balanced digits in base 128, most significant first."""
        digits, rest = [], self.q
        for _ in range(count - 1):
            low = ((rest + 64) & 127) - 64
            digits.append(low)
            rest = (rest - low) >> 7
        return [rest, *reversed(digits)]

    @property
    def scales(self) -> Float32:
        """2^e, to fold into whatever this operand's rows will be summed against."""
        return power_of_two(self.e)


def operand(x: Float32, limbs: int) -> Operand:
    """Rows of `x` as integers."""
    e = exponents(x, axis=1)
    return Operand(np.rint(x * power_of_two(rule.fraction_bits(limbs) - e)).astype(np.int64), e[:, 0])


def product(a: list[Integers], ea: Integers, b: list[Integers], eb: Integers) -> Float32:
    """Limbs [M, K] times limbs [K, N] with the exponents of the rows of the one and the columns of the other."""
    limbs, size = len(a), a[0].shape[1]
    total: Float32 | None = None
    for cut in range(0, size, rule.K_CUT):
        part = slice(cut, cut + rule.K_CUT)
        result: Float32 | None = None
        for weight in range(2 * limbs - 1):
            pairs = [(i, j) for i, j in rule.limb_pairs(limbs) if i + j == weight]
            s = sum((a[i][:, part] @ b[j][part] for i, j in pairs), np.zeros((), np.int64))
            value = s.astype(np.float32)
            result = value if result is None else result * F(128) + value
        assert result is not None
        total = result if total is None else total + result
    assert total is not None
    return total * power_of_two(ea[:, None] + eb[None, :] - rule.product_bits(limbs))


@dataclass(frozen=True)
class Linear:
    """y = x · Wᵀ and its gradients. Both operands are scaled along K once, and folded into dy where they are met again."""

    x: Operand
    w: Operand
    limbs: int

    def forward(self) -> Float32:
        return product(self.x.limbs(self.limbs), self.x.e, [limb.T for limb in self.w.limbs(self.limbs)], self.w.e)

    def input_gradient(self, dy: Float32, row_limbs: int | None = None) -> Float32:
        """`row_limbs` of dy's rows, where they are more than elsewhere; W's further limbs are zero."""
        limbs = row_limbs or self.limbs
        w = Operand(self.w.q << rule.LIMB_BITS * (limbs - self.limbs), self.w.e)
        return times_operand(dy * self.w.scales[None, :], w, limbs)

    def weight_gradient(self, dy: Float32, grain_tokens: int) -> Float32:
        """Grain by grain, added in grain order."""
        return in_grains(
            lambda rows: times_operand((dy * self.x.scales[:, None])[rows].T, rows_of(self.x, rows), self.limbs),
            len(dy),
            grain_tokens,
        )


def times_operand(x: Float32, b: Operand, limbs: int) -> Float32:
    """x [M, K] times b [K, N], where the scales of b's rows have been folded into x."""
    a = operand(np.ascontiguousarray(x), limbs)
    return product(a.limbs(limbs), a.e, b.limbs(limbs), np.zeros(b.q.shape[1], np.int64))


def rows_of(a: Operand, rows: slice) -> Operand:
    return Operand(a.q[rows], a.e[rows])


def in_grains(gradient: Callable[[slice], Float32], tokens: int, grain_tokens: int) -> Float32:
    """The sum, in grain order, of `gradient(slice)` over the grains of `tokens` rows."""
    total: Float32 | None = None
    for start in range(0, tokens, grain_tokens):
        part = gradient(slice(start, start + grain_tokens))
        total = part if total is None else total + part
    assert total is not None
    return total


# --- 2. Functions


def exp(x: Float32) -> Float32:
    """Of x <= 0."""
    x = np.maximum(x, F(rule.EXP_LOWEST))
    n = np.rint(x * F(rule.LOG2_E))
    r = (x - n * F(rule.LN2_HIGH)) - n * F(rule.LN2_LOW)
    p = np.full_like(r, F(rule.EXP_POLYNOMIAL[0]))
    for coefficient in rule.EXP_POLYNOMIAL[1:]:
        p = p * r + F(coefficient)
    result: Float32 = ((p * (r * r) + r) + F(1)) * power_of_two(n.astype(np.int64))
    return result


def log(x: Float32) -> Float32:
    """Of normal x > 0."""
    bits = x.view(np.int32).astype(np.int64)
    e = (bits >> 23) - 126
    m = ((bits & 0x7FFFFF) | 0x3F000000).astype(np.int32).view(np.float32)
    small = m < F(0.70710678)
    e, m = np.where(small, e - 1, e).astype(np.float32), np.where(small, m + m, m) - F(1)
    square = m * m
    p = np.full_like(m, F(rule.LOG_POLYNOMIAL[0]))
    for coefficient in rule.LOG_POLYNOMIAL[1:]:
        p = p * m + F(coefficient)
    y = (p * m) * square
    y = y + e * F(rule.LN2_LOW)
    y = y - square * F(0.5)
    result: Float32 = (m + y) + e * F(rule.LN2_HIGH)
    return result


def sigmoid(x: Float32) -> Float32:
    t = exp(-np.abs(x))
    result: Float32 = np.where(x >= 0, F(1), t) / (F(1) + t)
    return result


# --- 3. Layers


def rms_norm(x: Float32, gain: Float32, eps: float) -> tuple[Float32, Float32, Float32]:
    """The normalised and scaled rows; and for the gradient x / rms and 1 / rms."""
    mean = sum_by_halves(x * x) * (F(1) / F(x.shape[1]))
    r = F(1) / np.sqrt(mean + F(eps))
    n = x * r[:, None]
    return n * gain, n, r


def rms_norm_gradient(dy: Float32, n: Float32, r: Float32, gain: Float32) -> Float32:
    dn = dy * gain
    c = sum_by_halves(dn * n) * (F(1) / F(n.shape[1]))
    return (dn - n * c[:, None]) * r[:, None]


def rotate(x_TH: Float32, cos: Float32, sin: Float32) -> Float32:
    """With -sin it is the gradient."""
    first, second = np.split(x_TH, 2, axis=1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


@dataclass(frozen=True)
class Attention:
    """One key-value head of one sequence, with the query heads of its group one after the other: rows are (G, S)."""

    q: Operand
    k: Operand
    v: Operand
    """Of the transpose [H, S]: a scale per element of the head, not per position."""
    scale: float
    limbs: int

    def weights(self) -> tuple[Integers, Float32]:
        """Unnormalised weights as integers of `fraction_bits` bits [G·S, S], and the reciprocal of their row sums."""
        limbs, bits = self.limbs, rule.fraction_bits(self.limbs)
        s = product(self.q.limbs(limbs), self.q.e, [limb.T for limb in self.k.limbs(limbs)], self.k.e) * F(self.scale)
        s = np.where(self._visible(), s, F(-np.inf))
        largest = s.max(axis=1, keepdims=True)
        if not (largest < np.inf).all():
            raise NonFiniteError("an attention score of exact training is infinite; a lower learning rate may help")
        p = exp(s - largest) * F(2**bits)
        q: Integers = np.where(self._visible(), np.rint(p), F(0)).astype(np.int64)
        reciprocals: Float32 = F(1) / (q.sum(axis=1).astype(np.float32) * F(2.0**-bits))
        return q, reciprocals

    def forward(self) -> Float32:
        """[G·S, H]"""
        p, r = self.weights()
        limbs = Operand(p, np.zeros(len(p), np.int64)).limbs(self.limbs)
        out = product(limbs, np.zeros(len(p), np.int64), [limb.T for limb in self.v.limbs(self.limbs)], self.v.e)
        return out * r[:, None]

    def gradient(self, out: Float32, d_out: Float32) -> tuple[Float32, Float32, Float32]:
        """Of q [G·S, H], k and v [S, H]."""
        limbs = self.limbs
        p, r = self.weights()
        w = (p.astype(np.float32) * F(2.0 ** -rule.fraction_bits(limbs))) * r[:, None]
        correction = sum_by_halves(d_out * out)
        d_w = times_operand(d_out * self.v.scales[None, :], self.v, limbs)
        d_s = np.where(self._visible(), (w * (d_w - correction[:, None])) * F(self.scale), F(0))
        d_q = times_operand(d_s * self.k.scales[None, :], self.k, limbs)
        d_k = times_operand((d_s * self.q.scales[:, None]).T, self.q, limbs)
        weighted = operand(np.ascontiguousarray((d_out * r[:, None]).T), limbs)
        weights = Operand(p.T, np.zeros(p.shape[1], np.int64))
        d_v = product(weights.limbs(limbs), weights.e, [limb.T for limb in weighted.limbs(limbs)], weighted.e)
        return d_q, d_k, d_v

    def _visible(self) -> npt.NDArray[np.bool_]:
        positions = self.k.q.shape[0]
        rows = np.arange(self.q.q.shape[0]) % positions
        visible: npt.NDArray[np.bool_] = np.arange(positions)[None, :] <= rows[:, None]
        return visible


def swiglu(gate: Float32, up: Float32) -> Float32:
    return (gate * sigmoid(gate)) * up


def swiglu_gradient(dy: Float32, gate: Float32, up: Float32) -> tuple[Float32, Float32]:
    s = sigmoid(gate)
    slope: Float32 = F(1) - s
    d_gate: Float32 = ((dy * up) * s) * (F(1) + gate * slope)
    d_up: Float32 = dy * (gate * s)
    return d_gate, d_up


def cross_entropy(logits: Float32, targets: Integers, share: float) -> tuple[Float32, Float32]:
    """Each token's loss, and the gradient of their sum times `share`."""
    rows = np.arange(len(logits))
    z = logits - logits.max(axis=1, keepdims=True)
    p = exp(z)
    total = sum_by_halves(p)
    gradient = p * (F(1) / total)[:, None]
    gradient[rows, targets] = gradient[rows, targets] - F(1)
    return log(total) - z[rows, targets], gradient * F(share)


def embedding_gradient(dx: Float32, tokens: Integers, vocabulary: int) -> Float32:
    """One grain: integers of `rule.SCATTER_BITS` bits, one scale per column."""
    e = exponents(dx, axis=0)
    q = np.rint(dx * power_of_two(rule.SCATTER_BITS - e)).astype(np.int64)
    total = np.zeros((vocabulary, dx.shape[1]), np.int64)
    np.add.at(total, tokens, q)
    return total.astype(np.float32) * power_of_two(e - rule.SCATTER_BITS)
