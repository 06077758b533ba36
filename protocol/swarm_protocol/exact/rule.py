"""The constants of exact training and its scalars: what docs/numerics.md defines once and every backend shares.

Scalars of a step (learning rates, bias corrections) are Python floats made by single binary64 operations and rounded once
to float32; the rotary tables are made by binary64 operations in a fixed order, on the CPU, for every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Context, Decimal
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from swarm_protocol.optimizers import NEWTON_SCHULZ, learning_rate_factor
from swarm_protocol.spec import ModelSpec, OptimizerSpec

Float32 = npt.NDArray[np.float32]

LIMB_BITS = 7
"""A limb is a digit in base 128, from -64 to 64: int8 kernels that add pairs in 16 bits do not saturate on it."""

LOWEST_EXPONENT = -100
"""Scales are at least 2^-100; smaller magnitudes lose bits, and nothing divides by zero."""

HIGHEST_EXPONENT = 100
"""An operand of 2^100 or more, an infinity or a NaN ends the training."""

K_CUT = 1 << 16
"""Products are cut along K into runs of this length, so that int32 sums of limb products never overflow."""

GRAIN_TOKENS = 2048
"""A grain is by default the fewest sequences that hold this many tokens."""

LEAF = 4096
"""Elements per leaf of a sum of squares over a whole tensor."""

SCATTER_BITS = 30
"""Fixed-point bits in which the gradients of one embedding row are added."""

LOG2_E = 1.44269504
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP_LOWEST = -44.0
"""exp takes nothing lower, so that no probability is subnormal."""
EXP_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
LOG_POLYNOMIAL = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
"""Polynomials of the Cephes library (Moshier 1992), expf and logf, highest power first."""


def fraction_bits(limbs: int) -> int:
    """Bits after the binary point of a scaled operand: |x| < 2^e becomes an integer of magnitude at most 2^this."""
    return LIMB_BITS * limbs - 1


def limb_pairs(limbs: int) -> list[tuple[int, int]]:
    """Which limb of the left operand meets which of the right, most significant first; pairs of one weight are adjacent."""
    return sorted(((i, j) for i in range(limbs) for j in range(limbs)), key=sum)


def head_limbs(limbs: int) -> int:
    """Limbs of the loss gradient's rows where the head's input gradient is made: one more than elsewhere, at most 3.

    A row holds probabilities beside the target's, which is about 1. Of two limbs all below 2^-14 would vanish, always in the
    same direction, and their sum is not small: it was a relative error of 1e-2 in every gradient.
    """
    return min(3, limbs + 1)


def product_bits(limbs: int) -> int:
    """Bits after the binary point of the integers that a product sums."""
    return 2 * fraction_bits(limbs)


def default_grain(model: ModelSpec) -> int:
    """Sequences per grain: the fewest that hold `GRAIN_TOKENS` tokens."""
    return -(-GRAIN_TOKENS // model.max_position_embeddings)


def power_of_two_at_least(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class StepScalars:
    """What the optimizer multiplies by in one step; every field is a float that float32 holds."""

    adamw_lr: float
    adamw_decay: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    correction2: float
    eps: float
    muon_lr: float
    muon_decay: float
    momentum: float
    clip_norm: float

    @classmethod
    def of(cls, optimizer: OptimizerSpec, step: int) -> StepScalars:
        """For step `step` of the round, counted from 0. AdamW's `adamw_lr` includes its first bias correction."""
        factor = learning_rate_factor(optimizer, step)
        muon_lr = factor * optimizer.lr
        adamw_lr = factor * (optimizer.lr if optimizer.name == "adamw" else optimizer.adamw_lr)
        power1, power2 = 1.0, 1.0
        for _ in range(step + 1):  # not `**`, which is the C library's
            power1, power2 = power1 * optimizer.beta1, power2 * optimizer.beta2
        return cls(
            adamw_lr=f32(adamw_lr / (1.0 - power1)),
            adamw_decay=f32(1.0 - adamw_lr * optimizer.weight_decay),
            beta1=f32(optimizer.beta1),
            rest1=f32(1.0 - optimizer.beta1),
            beta2=f32(optimizer.beta2),
            rest2=f32(1.0 - optimizer.beta2),
            correction2=f32(1.0 / (1.0 - power2)),
            eps=f32(optimizer.eps),
            muon_lr=muon_lr,
            muon_decay=f32(1.0 - muon_lr * optimizer.weight_decay),
            momentum=f32(optimizer.momentum),
            clip_norm=f32(optimizer.clip_norm),
        )

    def muon_rate(self, rows: int, columns: int) -> float:
        """The learning rate of a matrix of this shape."""
        return f32(self.muon_lr * math.sqrt(max(1.0, rows / columns)))


MUON_EPS = 1e-7
NEWTON_SCHULZ_F32 = tuple(float(np.float32(c)) for c in NEWTON_SCHULZ)


def f32(value: float) -> float:
    """`value` rounded to float32."""
    return float(np.float32(value))


def reciprocal(n: int) -> float:
    """1 / n in float32."""
    return float(np.float32(1.0) / np.float32(n))


def attention_scale(model: ModelSpec) -> float:
    """1 / sqrt(head size), two float32 operations."""
    return float(np.float32(1.0) / np.sqrt(np.float32(model.head_dim)))


@lru_cache(maxsize=4)
def rotary_tables(theta: float, head_dim: int, positions: int) -> tuple[Float32, Float32]:
    """Cosines and sines, each float32 [positions, head_dim / 2]: of float32 angles position · theta^(-2i / head_dim).

    Frequencies come from correctly rounded decimal arithmetic of 40 digits, so that they are no library's either.
    """
    context = Context(prec=40)
    log_theta = context.ln(Decimal(theta))
    exponents = [context.divide(Decimal(-2 * i), Decimal(head_dim)) for i in range(head_dim // 2)]
    frequencies = np.array([float(context.exp(context.multiply(x, log_theta))) for x in exponents]).astype(np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies[None, :]
    cos, sin = _cos_sin(angles.astype(np.float64))
    return cos.astype(np.float32), sin.astype(np.float32)


# pi / 2 in three pieces of which the first two have 33 bits, so that their multiples by a quadrant number are exact; and
# the Taylor polynomials of sine and cosine, whose error on [-pi/4, pi/4] is below 2^-53.
_HALF_PI = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
_SIN = [(-1.0) ** k / math.factorial(2 * k + 1) for k in range(9, -1, -1)]
_COS = [(-1.0) ** k / math.factorial(2 * k) for k in range(9, -1, -1)]


def _cos_sin(angles: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    quadrant = np.rint(angles * (2.0 / math.pi))
    r = ((angles - quadrant * _HALF_PI[0]) - quadrant * _HALF_PI[1]) - quadrant * _HALF_PI[2]
    square = r * r
    sin, cos = np.full_like(r, _SIN[0]), np.full_like(r, _COS[0])
    for s, c in zip(_SIN[1:], _COS[1:], strict=True):
        sin, cos = sin * square + s, cos * square + c
    sin = sin * r
    turn = quadrant.astype(np.int64) & 3
    return (
        np.choose(turn, [cos, -sin, -cos, sin]),
        np.choose(turn, [sin, cos, -sin, -cos]),
    )
