"""What happens between products of limbs: the interface of `eager` (torch), `compiled` (numba) and `fused` (Triton).

All three implement these functions with the same bits; docs/numerics.md defines them. Everything is written into
tensors that the caller owns. Integer exponents are int32, limbs int8, other numbers float32, all contiguous.

Shapes: T tokens of the micro-batch, L limbs, P products of limbs (4 for two limbs, 9 for three), S positions, H head size,
R = G · S rows of a key-value head's group of G query heads, C key-value heads of all sequences. `grain` counts tokens.
`status` int32 [1] rises to the highest exponent that was met; above `rule.HIGHEST_EXPONENT` the training has failed.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from swarm_protocol.exact.rule import StepScalars


class Passes(Protocol):
    """A module with these functions."""

    name: str

    def finish(self, s: Tensor, a_e: Tensor, b_e: Tensor, out: Tensor, keep: float) -> None:
        """out [M, N] · keep + the value of integers s [P, M, N] with exponents of rows and columns."""

    def limbs(self, x: Tensor, planes: Tensor, e: Tensor, status: Tensor) -> None:
        """Rows of x [M, K] as planes [L, M, K] and e [M]."""

    def gradient_limbs(
        self,
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
        """dy [T, N] as limbs twice: by rows with 2^w_e [N] folded in, by columns of each grain with 2^x_e [T] folded in."""

    def norm_limbs(
        self, x: Tensor, gain: Tensor, eps: float, planes: Tensor, e: Tensor, r: Tensor, status: Tensor
    ) -> None:
        """Rows of RMSNorm(x [T, D]) as limbs, and r [T] = 1 / rms."""

    def norm_gradient(
        self,
        dy: Tensor,
        x: Tensor,
        r: Tensor,
        gain: Tensor,
        grain: int,
        dx: Tensor,
        gain_gradient: Tensor,
        keep: bool,
    ) -> None:
        """Add RMSNorm's gradient to dx [T, D], and the grains' sums to gain_gradient [D], which is set unless `keep`."""

    def swiglu_limbs(self, gate_up: Tensor, planes: Tensor, e: Tensor, status: Tensor) -> None:
        """Rows of silu(gate) · up as limbs; gate_up is [T, 2F]."""

    def swiglu_gradient(self, dy: Tensor, gate_up: Tensor) -> None:
        """Replace gate_up [T, 2F] by its gradient, from dy [T, F]."""

    def cross_entropy(self, logits: Tensor, targets: Tensor, share: float, losses: Tensor) -> None:
        """Losses [T]; replace logits [T, V] by the gradient of their sum times `share`."""

    def embedding_gradient(self, dx: Tensor, tokens: Tensor, out: Tensor, keep: bool, status: Tensor) -> None:
        """Add one grain's gradient, from dx [tokens of the grain, D], to out [V, D], which is zeroed first unless `keep`."""

    def heads(
        self,
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
        """Limbs of rotated queries [C, L, R, H] and keys [C, L, S, H] by rows, and of values [C, L, S, H] by columns."""

    def softmax_limbs(self, s: Tensor, q_e: Tensor, k_e: Tensor, scale: float, planes: Tensor, r: Tensor) -> None:
        """From products of a head's queries and keys [P, R, S]: causal weights [L, R, S], and r [R] = 1 / their sums."""

    def place_heads(self, s: Tensor, v_e: Tensor, r: Tensor, out: Tensor, column: int) -> None:
        """Finish weighted values [P, R, H], times r, into columns of out [S, D] from `column` on."""

    def attended_limbs(
        self,
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
        """Of a head's part of d_out [S, D]: limbs [L, R, H] by rows with 2^v_e folded in and by columns with r folded in.

        `correction` [R] is the sum of d_out · out over the head.
        """

    def softmax_gradient_limbs(
        self,
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
        """From products for the weights' gradient [P, R, S]: limbs of the scores' gradient by rows and by columns.

        The keys' scales are folded into the former, the queries' into the latter.
        """

    def place_gradients(
        self, d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, head: int, d_qkv: Tensor
    ) -> None:
        """Put d_q [R, H], d_k and d_v [S, H] of key-value head `head` into d_qkv [S, all heads · H], rotated back."""

    def sum_of_squares(self, x: Tensor) -> float:
        """Of a whole tensor in row-major order, by leaves."""

    def adamw(self, p: Tensor, g: Tensor, factor: float, m: Tensor, v: Tensor, s: StepScalars, decay: float) -> None:
        """One step on tensors of one shape; the gradient is g · factor."""

    def momentum(self, g: Tensor, factor: float, momentum: Tensor, mu: float, update: Tensor) -> None:
        """Muon's momentum, and the update that looks ahead by it."""

    def polynomial_limbs(
        self, gram: Tensor, square: Tensor, b: float, c: float, fold: Tensor, planes: Tensor, e: Tensor, status: Tensor
    ) -> None:
        """Rows of gram · b + square · c, all [R, R], as limbs, with 2^fold [R] folded in."""

    def descend(self, p: Tensor, direction: Tensor, decay: float, rate: float) -> None:
        """p · decay - direction · rate, in place."""
