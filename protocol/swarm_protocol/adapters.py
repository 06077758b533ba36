"""Training a part of a model: its gains, or adapters of low rank (LoRA), on a trunk that stays as it is.

What is trained is one flat vector, in the order of `trainable_shapes`: checkpoints, exchange, audits and the optimizer know
nothing else. A step merges it into the trunk (`Adapted.merge`), computes the gradient of all the model's parameters as ever,
and pulls that back (`Adapted.pull_back`): so what is trained is exactly what the merged export holds. Shapes and `initial`
belong to the exact domain; merging and pulling back to the run's numerics, which differ only in their products (`LowRank`).

Source: LoRA, Hu et al. 2021; names and initial values are those of the package peft.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from swarm_protocol.errors import InvalidDataError
from swarm_protocol.model import llama
from swarm_protocol.model.llama import Shapes
from swarm_protocol.model.shapes import adapted_matrices as adapted_matrices
from swarm_protocol.model.shapes import trainable_shapes as trainable_shapes
from swarm_protocol.spec import ModelSpec, RunSpec, TrainableSpec

Float32 = npt.NDArray[np.float32]

_COPIED_ELEMENTS = 1 << 22


def initial(model: ModelSpec, trainable: TrainableSpec, seed: int, trunk: Float32) -> Float32:
    """The trained vector that a run starts from, float32[num_trainable]; the same bits on every machine.

    Everything and gains are the trunk's own. Of adapters B is zero, so that they change nothing yet, and A is uniform within
    1/sqrt(inputs), peft's default.

    Raises:
        InvalidDataError: the trunk is not this model's.
    """
    _require(trunk, model.num_parameters, "the trunk")
    if trainable.kind == "all":
        return trunk.copy()
    if trainable.kind == "norms":
        places = _places(llama.parameter_shapes(model))
        return np.concatenate([trunk[places[name]] for name in trainable_shapes(model, trainable)])
    flat = np.zeros(model.num_trainable(trainable), np.float32)
    shapes = trainable_shapes(model, trainable)
    for index, (name, where) in enumerate(_places(shapes).items()):
        if name.endswith(".lora_A.weight"):
            width = 2.0 / math.sqrt(shapes[name][1])
            llama.draw_uniform(flat[where], width, seed, "initial adapters", index)
    return flat


def scale(trainable: TrainableSpec) -> float:
    """What an adapter's product counts, alpha / r, as one float32 division."""
    return float(np.float32(trainable.alpha) / np.float32(trainable.r))


def full_parameters(spec: RunSpec, parameters: Float32, trunk: Float32 | None) -> Float32:
    """All parameters of the model, float32[num_parameters], from a checkpoint's and the trunk; the same bits as in training.

    In native numerics that holds on the runtime that trained. Where everything is trained it is `parameters` itself.

    Raises:
        InvalidDataError: a vector that does not fit the spec, or no trunk where there has to be one.
    """
    if spec.trainable.kind == "all":
        _require(parameters, spec.num_trainable, "the parameters")
        return parameters
    low_rank: LowRank = Native()
    if spec.numerics == "exact":
        from swarm_protocol.exact.low_rank import portable  # which builds on this module

        low_rank = portable(spec.training.limbs)
    full = torch.zeros(spec.model.num_parameters)
    adapted = Adapted(spec.model, spec.trainable, full, torch.empty(0), low_rank)
    adapted.load(parameters, trunk)
    adapted.merge()
    merged: Float32 = full.numpy()
    return merged


class LowRank(Protocol):
    """How the products of adapters are made. Matrices are float32: w [O, I], b [O, R], a [R, I]."""

    def multiply(self, b: Tensor, a: Tensor, out: Tensor) -> None:
        """out [O, I] = b · a"""

    def pull_back(self, dw: Tensor, b: Tensor, a: Tensor, db: Tensor, da: Tensor) -> None:
        """db = dw · aᵀ and da = bᵀ · dw."""


class Native:
    """By torch's own kernels."""

    def multiply(self, b: Tensor, a: Tensor, out: Tensor) -> None:
        torch.mm(b, a, out=out)

    def pull_back(self, dw: Tensor, b: Tensor, a: Tensor, db: Tensor, da: Tensor) -> None:
        torch.mm(dw, a.mT, out=db)
        torch.mm(b.mT, dw, out=da)


class Adapted:
    """What is trained of a model, on one device: `parameters` and `gradients`, float32[num_trainable].

    Where that is everything they are the model's own vectors, and merging and pulling back do nothing.
    """

    def __init__(
        self,
        model: ModelSpec,
        trainable: TrainableSpec,
        full: Tensor,
        full_gradients: Tensor,
        low_rank: LowRank,
        observe: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        """`full` and `full_gradients` are the model's flat vectors; the latter may be empty where nothing is pulled back.

        `observe` is told every merged matrix, and every adapter's gradient.
        """
        self._observe = observe or (lambda _name, _result: None)
        self._kind, self._low_rank, self._full = trainable.kind, low_rank, full
        self._trunk_given: Float32 | None = None
        self._products: dict[torch.Size, Tensor] = {}
        self.parameters, self.gradients = full, full_gradients
        if trainable.kind == "all":
            return
        self._scale = scale(trainable)
        self._trunk = torch.zeros_like(full)
        self.parameters, self.gradients = (
            torch.zeros(model.num_trainable(trainable), device=full.device) for _ in range(2)
        )
        shapes = llama.parameter_shapes(model)
        mine = trainable_shapes(model, trainable)
        p, g = llama.named_views(mine, self.parameters), llama.named_views(mine, self.gradients)
        w, trunk = llama.named_views(shapes, full), llama.named_views(shapes, self._trunk)
        dw = llama.named_views(shapes, full_gradients) if full_gradients.numel() else w
        self._gains = [_Gain(p[name], g[name], w[name], dw[name]) for name in mine if name in shapes]
        self._adapters = [
            _Adapter(
                name,
                *(p[f"{name}.lora_{one}.weight"] for one in "BA"),
                *(g[f"{name}.lora_{one}.weight"] for one in "BA"),
                *(tensors[f"{name}.weight"] for tensors in (trunk, w, dw)),
            )
            for name in adapted_matrices(model, trainable)
        ]

    @torch.no_grad()
    def load(self, parameters: Float32, trunk: Float32 | None) -> None:
        """Take over trained parameters, and the trunk unless it is the array that was given before. `merge` comes next.

        Raises:
            InvalidDataError: a vector that does not fit the model, or no trunk where there has to be one.
        """
        _require(parameters, self.parameters.numel(), "the parameters")
        _fill(self.parameters, parameters)
        if self._kind == "all":
            if trunk is not None:
                raise InvalidDataError("a run that trains everything has no trunk")
        elif trunk is None:
            raise InvalidDataError(f"a run that trains {self._kind} alone needs its trunk")
        elif trunk is not self._trunk_given:
            _require(trunk, self._full.numel(), "the trunk")
            _fill(self._trunk, trunk)
            self._full.copy_(self._trunk)
            self._trunk_given = trunk

    @torch.no_grad()
    def load_full(self, full: Float32) -> None:
        """Put all of the model's parameters in place, as `full_parameters` made them; training begins with `load` again."""
        _require(full, self._full.numel(), "the parameters")
        _fill(self._full, full)
        self._trunk_given = None

    @torch.no_grad()
    def merge(self) -> None:
        """Make the model's parameters of the trunk and what is trained: gains in its place, w = trunk + (b · a) · scale."""
        if self._kind == "all":
            return
        for gain in self._gains:
            gain.full.copy_(gain.p)
        for one in self._adapters:
            product = self._scratch(one.w)
            self._low_rank.multiply(one.b, one.a, product)
            torch.add(one.trunk, product.mul_(self._scale), out=one.w)
            self._observe(f"{one.name}: merged", one.w)

    @torch.no_grad()
    def pull_back(self) -> None:
        """Make the gradient of what is trained of that of all parameters: db = dw · aᵀ · scale, da = bᵀ · dw · scale."""
        if self._kind == "all":
            return
        for gain in self._gains:
            gain.g.copy_(gain.full_gradient)
        for one in self._adapters:
            self._low_rank.pull_back(one.dw, one.b, one.a, one.db, one.da)
            one.db.mul_(self._scale)
            one.da.mul_(self._scale)
            self._observe(f"{one.name}: gradient of lora_B", one.db)
            self._observe(f"{one.name}: gradient of lora_A", one.da)

    def _scratch(self, like: Tensor) -> Tensor:
        """Memory of a matrix's shape, the same for all of that shape."""
        shape = like.shape
        if shape not in self._products:
            self._products[shape] = torch.empty(shape, device=like.device)
        return self._products[shape]


@dataclass(frozen=True)
class _Gain:
    p: Tensor
    g: Tensor
    full: Tensor
    full_gradient: Tensor


@dataclass(frozen=True)
class _Adapter:
    name: str
    b: Tensor
    a: Tensor
    db: Tensor
    da: Tensor
    trunk: Tensor
    w: Tensor
    dw: Tensor


def _places(shapes: Shapes) -> dict[str, slice]:
    """Where each tensor lies in the flat vector."""
    found, offset = {}, 0
    for name, shape in shapes.items():
        found[name] = slice(offset, offset + math.prod(shape))
        offset = found[name].stop
    return found


def _require(vector: Float32, size: int, what: str) -> None:
    if vector.dtype != np.float32 or vector.shape != (size,):
        raise InvalidDataError(f"{what} are {vector.dtype}{list(vector.shape)} where this model's are float32[{size}]")


def _fill(tensor: Tensor, array: Float32) -> None:
    """Copy an array, run by run: torch takes none that may not be written to, so that each run is copied twice."""
    for start in range(0, array.size, _COPIED_ELEMENTS):
        run = slice(start, start + _COPIED_ELEMENTS)
        tensor[run].copy_(torch.from_numpy(np.require(array[run], requirements=["C", "W"])))
