"""The products of adapters in exact arithmetic: docs/numerics.md, section 6.

Each operand is scaled along the axis that is summed, or its scales are folded into the other one, as in the linear layers;
the limbs of a weight's gradient serve both of its products. No pass is needed that the decoder does not have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swarm_protocol.exact import eager
from swarm_protocol.exact.passes import Passes
from swarm_protocol.exact.products import Limbs, Products, Scratch, multiply_float, power_of_two


class ExactLowRank:
    """Implements `adapters.LowRank`. `status` rises as in `Passes`."""

    def __init__(self, products: Products, passes: Passes, scratch: Scratch, status: Tensor, *, limbs: int) -> None:
        self._products, self._passes, self._scratch = products, passes, scratch
        self._status, self._limbs = status, limbs

    def multiply(self, b: Tensor, a: Tensor, out: Tensor) -> None:
        """product(rows of b · 2^e_a, a)"""
        a_limbs = self._of("adapter a", a)
        folded = self._scratch.floats("adapter b folded", *b.shape)
        torch.mul(b, power_of_two(a_limbs.e), out=folded)
        rows = self._of("adapter b", folded)
        self._products(rows.planes, rows.e, a_limbs.planes, None, out)

    def pull_back(self, dw: Tensor, b: Tensor, a: Tensor, db: Tensor, da: Tensor) -> None:
        """db = product(dw, aᵀ) and da = product(rows of bᵀ · 2^e_dw, dw), with dw and a scaled by rows."""
        dw_limbs, a_limbs = self._of("adapter dw", dw), self._of("adapter a", a)
        self._products(dw_limbs.planes, dw_limbs.e, a_limbs.planes.mT, a_limbs.e, db)
        folded = self._scratch.floats("adapter b transposed", b.shape[1], b.shape[0])
        torch.mul(b.mT, power_of_two(dw_limbs.e), out=folded)
        rows = self._of("adapter b transposed", folded)
        self._products(rows.planes, rows.e, dw_limbs.planes, None, da)

    def _of(self, name: str, x: Tensor) -> Limbs:
        found = self._scratch.limbs(name, self._limbs, *x.shape)
        self._passes.limbs(x, found.planes, found.e, self._status)
        return found


def portable(limbs: int) -> ExactLowRank:
    """On the CPU by torch alone, without a self-test or a compiler: for merging once."""
    cpu = torch.device("cpu")
    scratch = Scratch(cpu)
    products = Products(eager, multiply_float, limbs, scratch)
    return ExactLowRank(products, eager, scratch, torch.zeros(1, dtype=torch.int32), limbs=limbs)
