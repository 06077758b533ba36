"""Every operator of exact training and its gradient, against float64 autograd of what it stands for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from swarm_protocol.exact import reference, reference_step, rule, segment
from swarm_protocol.model import llama
from swarm_protocol.optimizers import Optimizer, moment_sizes
from swarm_protocol.spec import ModelSpec

Float32 = npt.NDArray[np.float32]

MODEL = ModelSpec(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=12,
)
ERROR = {2: 1.5e-3, 3: 1.5e-5}
"""Relative L2 that one operator may be off by, for each number of limbs."""

limb_counts = pytest.mark.parametrize("limbs", [2, 3])


def normal(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def off(found: Float32, expected: Tensor | npt.NDArray[np.float64]) -> float:
    expected = np.asarray(expected.detach().numpy() if isinstance(expected, Tensor) else expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def autograd(function: Callable[..., Tensor], upstream: Float32, *inputs: Float32) -> tuple[Tensor, list[Tensor]]:
    """The value in float64, and the gradients of its product with `upstream`."""
    leaves = [torch.from_numpy(x).double().requires_grad_() for x in inputs]
    value = function(*leaves)
    value.backward(torch.from_numpy(upstream).double())
    return value, [leaf.grad for leaf in leaves if leaf.grad is not None]


@limb_counts
def test_linear_layers(limbs: int) -> None:
    x, w, dy = normal(30, 24), normal(16, 24, seed=1) * np.float32(0.1), normal(30, 16, seed=2)
    x *= np.exp2(np.arange(30, dtype=np.float32) % 7)[:, None]  # scales that are folded, not lost
    w *= np.exp2(np.arange(16, dtype=np.float32) % 5)[:, None]
    y, (dx, dw) = autograd(functional.linear, dy, x, w)
    linear = reference.Linear(reference.operand(x, limbs), reference.operand(w, limbs), limbs)
    assert off(linear.forward(), y) < ERROR[limbs]
    assert off(linear.input_gradient(dy), dx) < ERROR[limbs]
    assert off(linear.weight_gradient(dy, 8), dw) < ERROR[limbs]


def test_rms_norm() -> None:
    x, gain, dy = normal(10, 24), 1 + normal(24, seed=1), normal(10, 24, seed=2)
    y, (dx, dg) = autograd(lambda x, g: functional.rms_norm(x, (24,), g, 1e-5), dy, x, gain)
    found, n, r = reference.rms_norm(x, gain, 1e-5)
    assert off(found, y) < 1e-6
    assert off(reference.rms_norm_gradient(dy, n, r, gain), dx) < 1e-6
    assert off(reference.sum_by_pairs(dy * n), dg) < 1e-6


def test_rotary_embedding() -> None:
    x, dy = normal(12, 8), normal(12, 8, seed=1)
    cos, sin = llama.rotary_tables(MODEL, "cpu")
    y, (dx,) = autograd(lambda x: llama.rotate(x, cos.double(), sin.double()), dy, x)
    c, s = rule.rotary_tables(MODEL.rope_theta, 8, 12)
    assert off(reference.rotate(x, c, s), y) < 1e-6
    assert off(reference.rotate(dy, c, -s), dx) < 1e-6


@limb_counts
def test_attention(limbs: int) -> None:
    group, positions, size = 3, 10, 8
    q, k, v = normal(group * positions, size) * 2, normal(positions, size, seed=1), normal(positions, size, seed=2)
    d_out = normal(group * positions, size, seed=3)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.view(group, positions, size)
        return functional.scaled_dot_product_attention(heads, k[None], v[None], is_causal=True).view(-1, size)

    out, gradients = autograd(attention, d_out, q, k, v)
    operands = (reference.operand(x, limbs) for x in (q, k, np.ascontiguousarray(v.T)))
    head = reference.Attention(*operands, float(np.float32(1) / np.sqrt(np.float32(size))), limbs)
    found = head.forward()
    assert off(found, out) < ERROR[limbs]
    for mine, theirs in zip(head.gradient(found, d_out), gradients, strict=True):
        assert off(mine, theirs) < 2 * ERROR[limbs]


def test_swiglu() -> None:
    gate, up, dy = normal(10, 16) * 8, normal(10, 16, seed=1), normal(10, 16, seed=2)
    y, (d_gate, d_up) = autograd(lambda g, u: functional.silu(g) * u, dy, gate, up)
    assert off(reference.swiglu(gate, up), y) < 1e-6
    found = reference.swiglu_gradient(dy, gate, up)
    assert off(found[0], d_gate) < 1e-6
    assert off(found[1], d_up) < 1e-6


def test_cross_entropy() -> None:
    logits, targets = normal(20, 40) * 5, np.arange(20) % 40
    loss, (gradient,) = autograd(
        lambda z: functional.cross_entropy(z, torch.from_numpy(targets)), np.ones((), np.float32), logits
    )
    losses, found = reference.cross_entropy(logits, targets, rule.f32(1 / 20))
    assert losses.mean() == pytest.approx(loss.item(), rel=1e-6)
    assert off(found, gradient) < 1e-6


def test_many_small_probabilities_are_not_lost_in_the_heads_gradient() -> None:
    tokens, vocabulary, width = 20, 2000, 32
    w = normal(vocabulary, width, seed=1) + np.float32(1)  # what is lost adds up: all rows have a direction in common
    x = normal(tokens, width)
    d_logits = np.full((tokens, vocabulary), 1e-5, np.float32)
    d_logits[:, 0] = -np.float32(1e-5) * (vocabulary - 1)
    head = reference.Linear(reference.operand(x, 2), reference.operand(w, 2), 2)
    expected = d_logits.astype(np.float64) @ w.astype(np.float64)
    assert off(head.input_gradient(d_logits, rule.head_limbs(2)), expected) < ERROR[2]
    d_logits[:, 1] = -np.float32(0.5)  # and a wrong answer that was sure of itself
    expected = d_logits.astype(np.float64) @ w.astype(np.float64)
    assert off(head.input_gradient(d_logits, rule.head_limbs(2)), expected) < ERROR[2]
    assert off(head.input_gradient(d_logits), expected) > 10 * ERROR[2]


def test_embedding() -> None:
    table, dx = normal(40, 8), normal(20, 8, seed=1)
    tokens = np.arange(20) % 7
    _, (gradient,) = autograd(lambda w: functional.embedding(torch.from_numpy(tokens), w), dx, table)
    assert off(reference.embedding_gradient(dx, tokens, 40), gradient) < 1e-6


@limb_counts
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_the_whole_decoder(limbs: int, tied: bool) -> None:
    model = MODEL.model_copy(update={"tie_word_embeddings": tied})
    flat = llama.initial_parameters(model, 3) * np.float32(3)
    tokens = np.random.default_rng(0).integers(0, 40, (4, 13))
    found, loss = reference_step.backward(
        model, reference_step.split(llama.parameter_shapes(model), flat), tokens, limbs=limbs, grain_sequences=2
    )
    native = llama.build(model).double()
    leaves = {}
    for (name, _), view in zip(
        llama.parameter_shapes(model).items(), llama.views(model, torch.from_numpy(flat).double()), strict=True
    ):
        owner, _, leaf = name.rpartition(".")
        leaves[name] = torch.nn.Parameter(view.clone())
        setattr(native.get_submodule(owner), leaf, leaves[name])
    native.rotary = tuple(table.double() for table in llama.rotary_tables(model, "cpu"))  # type: ignore[assignment]
    expected = llama.loss(native, torch.from_numpy(tokens))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel={2: 2e-4, 3: 1e-6}[limbs])
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert off(found[name], leaf.grad) < 3 * ERROR[limbs], name


@pytest.mark.parametrize(("name", "lr", "error"), [("adamw", 3e-3, 1e-5), ("muon", 0.03, 1e-3)])
def test_an_optimizer_step_is_the_native_one_up_to_rounding(name: str, lr: float, error: float) -> None:
    spec = segment.self_test_spec()
    optimizer = spec.training.optimizer.model_copy(update={"name": name, "lr": lr})
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"optimizer": optimizer})})
    shapes, size = llama.parameter_shapes(spec.model), llama.num_parameters(spec.model)
    p, g, moments = normal(size), normal(size, seed=1), np.zeros(sum(moment_sizes(shapes, optimizer)), np.float32)
    tensors = [torch.from_numpy(x.copy()) for x in (p, g, moments)]
    native = Optimizer(shapes, optimizer, *tensors)
    gradients = reference_step.split(shapes, g)
    before, p0 = moments, p
    for step in range(3):
        tensors[1].copy_(torch.from_numpy(g))
        native.step(step)
        p, moments = reference_step.optimize(spec, reference_step.split(shapes, p), moments, gradients, step, limbs=3)
    assert off(p - p0, tensors[0].double().numpy() - p0) < error
    assert off(moments - before, tensors[2].double().numpy()) < error
