"""Products of limbs, by whichever arithmetic is fastest here: all of them compute the same integers.

int8 products go through `torch._int_mm`, exact in int32. Float32 products are exact too as long as no sum passes 2^24: a
limb product is at most 2^12, so runs of 4096 along K are summed as integers. Which is used changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm_protocol.exact import rule
from swarm_protocol.exact.passes import Passes

Multiply = Callable[[Tensor, Tensor, Tensor], None]
"""(a int8 [M, K], b int8 [K, N], out int32 [M, N]): any strides in, contiguous out, K at most `rule.K_CUT`."""

_ROWS_AT_ONCE = 512
"""Rows of a product that are finished together, so that their integers are still in the cache. Changes no bit."""

_FLOAT_RUN = 1 << 12


def multiply_int8(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.is_cuda:
        rows, columns = padded_for_cuda(a, b)
        if (len(rows), columns.shape[1]) == out.shape:
            torch._int_mm(rows, columns, out=out)
        else:
            out.copy_(torch._int_mm(rows, columns)[: out.shape[0], : out.shape[1]])
    elif 1 in a.shape or 1 in b.shape:  # torch 2.13 takes such a matrix's strides for those of a transpose
        multiply_float(a, b, out)
    else:
        torch._int_mm(a, b, out=out)


def padded_for_cuda(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a [M, K] and b [K, N] as cuBLAS's int8 kernels take them: a by rows, b by columns, with zeros to multiples of 8.

    And more than 16 rows. The product of the two is that of a and b in its first M rows and N columns.
    """
    return _with_zeros(a, max(24, len(a))), _with_zeros(b.mT, b.shape[1]).mT


def _with_zeros(x: Tensor, rows: int) -> Tensor:
    """At least `rows` rows, by rows, with both sizes multiples of 8; x itself where it is that already."""
    rows, columns = (-(-size // 8) * 8 for size in (rows, x.shape[1]))
    if x.shape == (rows, columns):
        return x.contiguous()
    padded = x.new_zeros(rows, columns)
    padded[: len(x), : x.shape[1]] = x
    return padded


def multiply_float(a: Tensor, b: Tensor, out: Tensor) -> None:
    out.copy_(a[:, :_FLOAT_RUN].float() @ b[:_FLOAT_RUN].float())
    for start in range(_FLOAT_RUN, a.shape[1], _FLOAT_RUN):
        run = slice(start, start + _FLOAT_RUN)
        out.add_((a[:, run].float() @ b[run].float()).int())


@dataclass(frozen=True)
class Limbs:
    """A matrix as `planes` int8 [L, M, K], most significant first, with one exponent per row, `e` int32 [M]."""

    planes: Tensor
    e: Tensor

    def rows(self, part: slice) -> Limbs:
        return Limbs(self.planes[:, part], self.e[part])


class Scratch:
    """Named tensors that live as long as their owner: allocated once per shape, never cleared."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}
        self._integers = torch.empty(0, dtype=torch.int32, device=device)

    def floats(self, name: str, *shape: int) -> Tensor:
        return self._get(name, shape, torch.float32)

    def limbs(self, name: str, count: int, rows: int, width: int) -> Limbs:
        return Limbs(self.int8(name, count, rows, width), self.int32(name, rows))

    def int8(self, name: str, *shape: int) -> Tensor:
        return self._get(name, shape, torch.int8)

    def int32(self, name: str, *shape: int) -> Tensor:
        return self._get(name, shape, torch.int32)

    def integers(self, count: int, rows: int, columns: int) -> Tensor:
        """`count` int32 matrices; the same memory whatever the shape."""
        size = count * rows * columns
        if self._integers.numel() < size:
            self._integers = torch.empty(size, dtype=torch.int32, device=self.device)
        return self._integers[:size].view(count, rows, columns)

    def _get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        key = name, shape, dtype
        if key not in self._tensors:
            self._tensors[key] = torch.zeros(shape, dtype=dtype, device=self.device)
        return self._tensors[key]


class Products:
    """Products of limbs of one count, on one backend. Right operands may have fewer: their lowest limbs are zero then."""

    def __init__(self, passes: Passes, multiply: Multiply, limbs: int, scratch: Scratch) -> None:
        self._passes, self._multiply, self._scratch = passes, multiply, scratch
        self._limbs = limbs
        self._pairs = rule.limb_pairs(limbs)
        self._unscale = rule.product_bits(limbs)

    def of(self, limbs: int) -> Products:
        """The same with so many limbs."""
        return self if limbs == self._limbs else Products(self._passes, self._multiply, limbs, self._scratch)

    def integers(self, a: Tensor, b: Tensor) -> Tensor:
        """Every needed product of limbs of a [L, M, K] and b [L, K, N]: int32 [pairs, M, N], valid until the next call."""
        out = self._scratch.integers(len(self._pairs), a.shape[1], b.shape[2])
        left, right = a.unbind(), b.unbind()  # once, since every view costs a microsecond
        for (i, j), s in zip(self._pairs, out.unbind(), strict=True):
            if j < len(right):
                self._multiply(left[i], right[j], s)
            else:
                s.zero_()
        return out

    def __call__(
        self, a: Tensor, a_e: Tensor, b: Tensor, b_e: Tensor | None, out: Tensor, *, keep: float = 0.0
    ) -> None:
        """out · keep + a · b, for out float32 [M, N]; a is [L, M, K], b [L, K, N]; without `b_e` its exponents are 0."""
        if b_e is None:
            b_e = self._scratch.int32("zeros", b.shape[2])
        if a.shape[2] > rule.K_CUT:
            self._cut(a, a_e, b, b_e, out, keep)
            return
        for start in range(0, a.shape[1], _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            self._passes.finish(self.integers(a[:, rows], b), a_e[rows], b_e, out[rows], keep)

    def _cut(self, a: Tensor, a_e: Tensor, b: Tensor, b_e: Tensor, out: Tensor, keep: float) -> None:
        """The same for a long K: values of its runs are added in order, and scaled once."""
        total = torch.empty_like(out)
        unscaled = torch.full_like(a_e, self._unscale), torch.zeros_like(b_e)
        for start in range(0, a.shape[2], rule.K_CUT):
            run = slice(start, start + rule.K_CUT)
            self._passes.finish(self.integers(a[..., run], b[:, run]), *unscaled, total, 1.0 if start else 0.0)
        total.mul_(power_of_two(a_e[:, None] + b_e[None, :] - self._unscale))
        out.copy_(total if keep == 0.0 else out * keep + total)


def power_of_two(e: Tensor) -> Tensor:
    """2^e as float32, with e clamped to the exponents of normal numbers."""
    return ((e.clamp(-126, 127) + 127) << 23).view(torch.float32)
