"""The inner optimizers do what their papers say, and their state is one flat vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swarm_protocol.model import llama
from swarm_protocol.optimizers import Optimizer, clip_, learning_rate_factor, moment_sizes, orthogonalize
from swarm_protocol.spec import ModelSpec, OptimizerSpec

MODEL = ModelSpec(
    vocab_size=17,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=8,
)
SHAPES = llama.parameter_shapes(MODEL)
HUGE = 1e6  # a clipping norm that clips nothing here


def vectors(spec: OptimizerSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = MODEL.num_parameters
    parameters = torch.randn(size, generator=generator)
    gradients = torch.randn(size, generator=generator) * 0.01
    return parameters, gradients, torch.zeros(sum(moment_sizes(SHAPES, spec)))


def matrices(flat: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(llama.parameter_shapes(MODEL), llama.views(MODEL, flat), strict=True))


def test_adamw_agrees_with_torch() -> None:
    spec = OptimizerSpec(name="adamw", lr=0.01, warmup_steps=0, weight_decay=0.1, clip_norm=HUGE)
    parameters, gradients, moments = vectors(spec)
    theirs = [view.clone().requires_grad_() for view in llama.views(MODEL, parameters)]
    groups = [
        {"params": [p for p in theirs if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in theirs if p.ndim == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-6)
    ours = Optimizer(SHAPES, spec, parameters, gradients, moments)
    for step in range(4):
        gradients.copy_(torch.randn(gradients.shape, generator=torch.Generator().manual_seed(step)) * 0.1)
        for p, g in zip(theirs, llama.views(MODEL, gradients), strict=True):
            p.grad = g.clone()
        reference.step()
        ours.step(step)
    for p, expected in zip(llama.views(MODEL, parameters), theirs, strict=True):
        torch.testing.assert_close(p, expected.detach(), rtol=1e-5, atol=1e-6)


def test_muon_steps_along_the_orthogonalised_nesterov_momentum() -> None:
    spec = OptimizerSpec(lr=0.1, warmup_steps=0, clip_norm=HUGE, weight_decay=0.5)
    parameters, gradients, moments = vectors(spec)
    before = {name: view.clone() for name, view in matrices(parameters).items()}
    optimizer = Optimizer(SHAPES, spec, parameters, gradients, moments)
    momentum = {name: torch.zeros_like(view) for name, view in before.items()}
    for step in range(3):
        optimizer.step(step)
        for name, gradient in matrices(gradients).items():
            momentum[name] = 0.95 * momentum[name] + gradient
            if not name.startswith("model.layers.") or gradient.ndim == 1:
                continue
            update = gradient + 0.95 * momentum[name]
            rows, columns = update.shape
            wide = update if rows <= columns else update.T
            direction = orthogonalize(wide[None], 5)[0]
            direction = direction if rows <= columns else direction.T
            before[name] = before[name] * 0.95 - 0.1 * max(1, rows / columns) ** 0.5 * direction
    after = matrices(parameters)
    for name in (name for name in after if name.startswith("model.layers.") and after[name].ndim == 2):
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-5)


def test_muon_leaves_embeddings_and_gains_to_adamw() -> None:
    spec = OptimizerSpec(adamw_lr=0.01, warmup_steps=0, clip_norm=HUGE, eps=1e-8)
    parameters, gradients, moments = vectors(spec)
    before = parameters.clone()
    Optimizer(SHAPES, spec, parameters, gradients, moments).step(0)
    moved = matrices(before - parameters)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"):
        # The first step of Adam is the sign of the gradient.
        torch.testing.assert_close(moved[name], 0.01 * matrices(gradients)[name].sign(), rtol=1e-3, atol=1e-5)


def test_newton_schulz_brings_singular_values_near_one() -> None:
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(2))
    singular = torch.linalg.svdvals(orthogonalize(x, 5))
    assert float(singular.min()) > 0.5
    assert float(singular.max()) < 1.3


def test_a_gradient_of_zero_moves_nothing() -> None:
    spec = OptimizerSpec(warmup_steps=0)
    parameters, gradients, moments = vectors(spec)
    before = parameters.clone()
    Optimizer(SHAPES, spec, parameters, gradients.zero_(), moments).step(0)
    assert torch.equal(before, parameters)


def test_the_moments_are_momenta_then_first_then_second_moments() -> None:
    spec = OptimizerSpec(warmup_steps=0, clip_norm=HUGE)
    parameters, gradients, moments = vectors(spec)
    Optimizer(SHAPES, spec, parameters, gradients, moments).step(0)
    by_muon, by_adamw, _ = moment_sizes(SHAPES, spec)
    per_name = matrices(gradients)
    hidden = [g for name, g in per_name.items() if name.startswith("model.layers.") and g.ndim == 2]
    rest = [g for name, g in per_name.items() if not (name.startswith("model.layers.") and g.ndim == 2)]
    flat_hidden, flat_rest = (torch.cat([g.flatten() for g in some]) for some in (hidden, rest))
    assert torch.equal(moments[:by_muon], flat_hidden)
    torch.testing.assert_close(moments[by_muon : by_muon + by_adamw], flat_rest * 0.1)
    torch.testing.assert_close(moments[by_muon + by_adamw :], flat_rest.square() * 0.05)


@pytest.mark.parametrize(("name", "expected"), [("adamw", 2), ("muon", 1)])
def test_muon_keeps_half_the_state(name: str, expected: int) -> None:
    model = ModelSpec(num_hidden_layers=4)
    size = sum(moment_sizes(llama.parameter_shapes(model), OptimizerSpec(name=name)))  # type: ignore[arg-type]
    assert size / model.num_parameters == pytest.approx(expected, rel=0.06)


def test_the_learning_rate_warms_up_inside_the_round() -> None:
    spec = OptimizerSpec(warmup_steps=4)
    assert [learning_rate_factor(spec, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate_factor(OptimizerSpec(warmup_steps=0), 0) == 1.0


@pytest.mark.parametrize(("length", "expected"), [(0.5, 0.5), (1.0, 1.0), (8.0, 1.0), (0.0, 0.0)])
def test_clipping_bounds_the_norm_and_leaves_short_gradients_alone(length: float, expected: float) -> None:
    gradient = torch.from_numpy(np.full(16, length / 4, np.float32))
    clip_(gradient, 1.0)
    assert float(gradient.norm()) == pytest.approx(expected)
