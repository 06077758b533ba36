"""The inner optimizers: `muon` for the matrices of the decoder layers with AdamW for the rest, or `adamw` for everything.

Their state is fresh in every round, so that a contribution depends on public inputs only; the learning rate warms up
inside the round, which is what a fresh AdamW needs. The whole state is one flat float32 vector, `moments`: the momenta of
Muon's matrices in canonical order, then AdamW's first moments, then its second ones. Steps update parameters and moments
in place and are of the tolerant domain: the same bits on like hardware and software, close elsewhere.

Sources: Muon, Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon); AdamW, Loshchilov and Hutter 2019.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from swarm_protocol.model.llama import Shapes, named_views
from swarm_protocol.spec import OptimizerSpec

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic that maps singular values to about 1 (Jordan et al. 2024)."""


def _muon_names(shapes: Shapes, optimizer: OptimizerSpec) -> frozenset[str]:
    if optimizer.name != "muon":
        return frozenset()
    return frozenset(name for name, shape in shapes.items() if name.startswith("model.layers.") and len(shape) == 2)


def moment_sizes(shapes: Shapes, optimizer: OptimizerSpec) -> tuple[int, ...]:
    """Lengths of the three runs of the moments vector: Muon's momenta, AdamW's first moments, AdamW's second moments."""
    muon = _muon_names(shapes, optimizer)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    by_muon = sum(sizes[name] for name in muon)
    by_adamw = sum(sizes.values()) - by_muon
    return by_muon, by_adamw, by_adamw


def learning_rate_factor(optimizer: OptimizerSpec, step: int) -> float:
    """What the learning rates are multiplied by in step `step` of a round, counted from 0: a linear warm-up to 1."""
    return min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0


def clip_(gradients: Tensor, norm: float) -> None:
    """Scale a flat gradient in place to an L2 norm of at most `norm`."""
    gradients.mul_(norm / gradients.norm().clamp_min(norm))


def orthogonalize(x_MRC: Tensor, steps: int) -> Tensor:
    """Roughly the nearest (semi-)orthogonal matrix of each in a stack with R <= C, by Newton-Schulz in float32."""
    a, b, c = NEWTON_SCHULZ
    x_MRC = x_MRC / (torch.linalg.vector_norm(x_MRC, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram_MRR = x_MRC @ x_MRC.mT
        poly_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c)
        x_MRC = torch.baddbmm(x_MRC, poly_MRR, x_MRC, beta=a)
    return x_MRC


class Optimizer:
    """Steps over views of three flat vectors: parameters and gradients, both of tensors of `shapes`, and the moments."""

    def __init__(
        self, shapes: Shapes, optimizer: OptimizerSpec, parameters: Tensor, gradients: Tensor, moments: Tensor
    ) -> None:
        self.spec = optimizer
        self._gradients = gradients
        muon = _muon_names(shapes, optimizer)
        by_name = named_views(shapes, parameters), named_views(shapes, gradients)
        pairs = [(name, by_name[0][name], by_name[1][name]) for name in shapes]
        by_muon = [(p, g) for name, p, g in pairs if name in muon]
        by_adamw = [(p, g) for name, p, g in pairs if name not in muon]
        self._p, self._g = [p for p, _ in by_adamw], [g for _, g in by_adamw]
        momenta, first, second = torch.split(moments, list(moment_sizes(shapes, optimizer)))
        self._m, self._v = _like(first, self._p), _like(second, self._p)
        # Matrices of one shape, up to transposition, are orthogonalised as one stack: (parameter, gradient, momentum).
        stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        for (p, g), momentum in zip(by_muon, _like(momenta, [p for p, _ in by_muon]), strict=True):
            rows, columns = min(p.shape), max(p.shape)
            stacks[rows, columns].append((p, g, momentum))
        self._stacks = list(stacks.values())

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Clip the gradients, then step number `step` of the round, counted from 0."""
        clip_(self._gradients, self.spec.clip_norm)
        factor = learning_rate_factor(self.spec, step)
        self._adamw(step, factor * (self.spec.lr if self.spec.name == "adamw" else self.spec.adamw_lr))
        for stack in self._stacks:
            self._muon(stack, factor * self.spec.lr)

    def _muon(self, stack: Sequence[tuple[Tensor, Tensor, Tensor]], lr: float) -> None:
        mu = self.spec.momentum
        updates = []
        for _, g, momentum in stack:
            momentum.mul_(mu).add_(g)
            update = g + momentum * mu
            updates.append(update if update.shape[0] <= update.shape[1] else update.mT)
        directions = orthogonalize(torch.stack(updates), self.spec.newton_schulz_steps)
        for (p, _, _), direction in zip(stack, directions, strict=True):
            rows, columns = p.shape
            if self.spec.weight_decay:
                p.mul_(1.0 - lr * self.spec.weight_decay)
            p.sub_((direction if rows <= columns else direction.mT) * (lr * max(1.0, rows / columns) ** 0.5))

    def _adamw(self, step: int, lr: float) -> None:
        b1, b2 = self.spec.beta1, self.spec.beta2
        # Separate multiplications and additions: their fused forms round differently from one CPU to another.
        torch._foreach_mul_(self._m, b1)
        torch._foreach_add_(self._m, torch._foreach_mul(self._g, 1.0 - b1))
        squares = torch._foreach_mul(self._g, self._g)
        torch._foreach_mul_(squares, 1.0 - b2)
        torch._foreach_mul_(self._v, b2)
        torch._foreach_add_(self._v, squares)
        denominators = torch._foreach_div(self._v, 1.0 - b2 ** (step + 1))
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, self.spec.eps)
        updates = torch._foreach_div(self._m, denominators)
        torch._foreach_mul_(updates, lr / (1.0 - b1 ** (step + 1)))
        if self.spec.weight_decay and (matrices := [p for p in self._p if p.ndim == 2]):
            torch._foreach_mul_(matrices, 1.0 - lr * self.spec.weight_decay)
        torch._foreach_sub_(self._p, updates)


def _like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of `flat` with the shapes of `tensors`."""
    parts = torch.split(flat, [tensor.numel() for tensor in tensors]) if tensors else ()
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
