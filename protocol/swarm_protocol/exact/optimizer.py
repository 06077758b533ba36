"""Clipping, AdamW and Muon in exact arithmetic: docs/numerics.md, section 5, with the state layout of `optimizers`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from swarm_protocol.exact import rule
from swarm_protocol.exact.passes import Passes
from swarm_protocol.exact.products import Products, Scratch
from swarm_protocol.exact.rule import StepScalars
from swarm_protocol.model.llama import Shapes, named_views
from swarm_protocol.optimizers import moment_sizes
from swarm_protocol.spec import OptimizerSpec
from swarm_protocol.training import NonFiniteError


class Optimizer:
    """Steps over views of three flat vectors on one device: parameters, gradients and moments."""

    def __init__(
        self,
        shapes: Shapes,
        optimizer: OptimizerSpec,
        parameters: Tensor,
        gradients: Tensor,
        moments: Tensor,
        products: Products,
        passes: Passes,
        scratch: Scratch,
        status: Tensor,
        *,
        limbs: int,
    ) -> None:
        self._spec, self._gradients, self._status, self._limbs = optimizer, gradients, status, limbs
        self._products, self._passes, self._scratch = products, passes, scratch
        momenta, first, second = torch.split(moments, list(moment_sizes(shapes, optimizer)))
        self._muon: list[tuple[Tensor, Tensor, Tensor]] = []
        self._adamw: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        taken = [0, 0]
        by_name = named_views(shapes, parameters), named_views(shapes, gradients)
        for name, shape in shapes.items():
            p, g = (views[name] for views in by_name)
            by_muon = optimizer.name == "muon" and len(shape) == 2 and name.startswith("model.layers.")
            kind = 0 if by_muon else 1
            part = slice(taken[kind], taken[kind] + math.prod(shape))
            taken[kind] = part.stop
            if by_muon:
                self._muon.append((p, g, momenta[part].view(shape)))
            else:
                self._adamw.append((p, g, first[part].view(shape), second[part].view(shape)))

    def step(self, step: int) -> None:
        """Clip the gradients, then step number `step` of the round, counted from 0.

        Raises:
            NonFiniteError: the norm of the gradients is not finite.
        """
        scalars = StepScalars.of(self._spec, step)
        with np.errstate(invalid="ignore", over="ignore"):
            norm = np.sqrt(np.float32(self._passes.sum_of_squares(self._gradients)))
        if not np.isfinite(norm):
            raise NonFiniteError(f"the gradients of step {step} are not finite; a lower learning rate may help")
        factor = float(np.float32(scalars.clip_norm) / np.maximum(norm, np.float32(scalars.clip_norm)))
        for p, g, m, v in self._adamw:
            decay = scalars.adamw_decay if p.ndim == 2 else 1.0
            self._passes.adamw(p, g, factor, m, v, scalars, decay)
        for p, g, momentum in self._muon:
            rows, columns = p.shape
            update = self._scratch.floats("update", rows, columns)
            self._passes.momentum(g, factor, momentum, scalars.momentum, update)
            norm = np.sqrt(np.float32(self._passes.sum_of_squares(update)))
            x = update if rows <= columns else update.mT.contiguous()
            self._orthogonalize(x, float(np.float32(1) / (norm + np.float32(rule.MUON_EPS))))
            direction = x if rows <= columns else x.mT.contiguous()
            self._passes.descend(p, direction, scalars.muon_decay, scalars.muon_rate(rows, columns))

    def _orthogonalize(self, x: Tensor, factor: float) -> None:
        """Newton-Schulz on x · factor [R, C], R <= C, in place."""
        a, b, c = rule.NEWTON_SCHULZ_F32
        (size, width), limbs, scratch, products = x.shape, self._limbs, self._scratch, self._products
        x_limbs = scratch.limbs("orthogonal", limbs, size, width)
        gram_limbs = scratch.limbs("gram", limbs, size, size)
        gram, square = scratch.floats("gram", size, size), scratch.floats("square", size, size)
        x.mul_(factor)
        for _ in range(self._spec.newton_schulz_steps):
            self._passes.limbs(x, x_limbs.planes, x_limbs.e, self._status)
            products(x_limbs.planes, x_limbs.e, x_limbs.planes.mT, x_limbs.e, gram)
            self._passes.limbs(gram, gram_limbs.planes, gram_limbs.e, self._status)
            products(gram_limbs.planes, gram_limbs.e, gram_limbs.planes.mT, gram_limbs.e, square)
            # The polynomial's limbs replace the Gram matrix's, which are used up.
            self._passes.polynomial_limbs(gram, square, b, c, x_limbs.e, gram_limbs.planes, gram_limbs.e, self._status)
            products(gram_limbs.planes, gram_limbs.e, x_limbs.planes, None, x, keep=a)
