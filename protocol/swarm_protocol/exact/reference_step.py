"""The reference's whole training step: the decoder of docs/numerics.md both ways, adapters, clipping, AdamW and Muon."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from swarm_protocol.adapters import trainable_shapes
from swarm_protocol.exact import rule
from swarm_protocol.exact.reference import (
    Attention,
    F,
    Float32,
    Linear,
    Operand,
    cross_entropy,
    embedding_gradient,
    in_grains,
    operand,
    product,
    rms_norm,
    rms_norm_gradient,
    rotate,
    sum_by_halves,
    sum_by_pairs,
    sum_of_squares,
    swiglu,
    swiglu_gradient,
    times_operand,
)
from swarm_protocol.exact.rule import StepScalars
from swarm_protocol.model.llama import Shapes, parameter_shapes
from swarm_protocol.optimizers import moment_sizes
from swarm_protocol.spec import ModelSpec, RunSpec, TrainableSpec

Tensors = dict[str, Float32]


def step(
    spec: RunSpec,
    parameters: Float32,
    moments: Float32,
    step: int,
    tokens: npt.NDArray[np.int64],
    *,
    trunk: Float32 | None = None,
    limbs: int = 2,
    grain_sequences: int | None = None,
) -> tuple[Float32, Float32, float]:
    """Inner step number `step` of a round: new parameters and moments, both flat, and the loss in nats per token.

    `parameters` are what is trained; where that is not everything, the rest is the trunk's, float32[num_parameters].
    """
    grain = grain_sequences or rule.default_grain(spec.model)
    by_name = split(trainable_shapes(spec.model, spec.trainable), parameters)
    full = by_name
    if trunk is not None:
        full = merge(spec.trainable, split(parameter_shapes(spec.model), trunk), by_name, limbs=limbs)
    gradients, loss = backward(spec.model, full, tokens, limbs=limbs, grain_sequences=grain)
    if trunk is not None:
        gradients = pull_back(spec.trainable, by_name, gradients, limbs=limbs)
    return *optimize(spec, by_name, moments, gradients, step, limbs=limbs), loss


def backward(
    model: ModelSpec, parameters: Tensors, tokens: npt.NDArray[np.int64], *, limbs: int, grain_sequences: int
) -> tuple[Tensors, float]:
    """Gradients by name, and the mean loss, of tokens [B, S + 1]."""
    p, grads = parameters, dict[str, Float32]()
    inputs, targets = tokens[:, :-1].reshape(-1), tokens[:, 1:].reshape(-1)
    positions, grain = tokens.shape[1] - 1, grain_sequences * (tokens.shape[1] - 1)
    share = rule.f32(1.0 / len(targets))
    head_name = "model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"

    def gain_gradient(dy: Float32, n: Float32) -> Float32:
        return in_grains(lambda rows: sum_by_pairs((dy * n)[rows]), len(dy), grain)

    x = p["model.embed_tokens.weight"][inputs]
    saved = []
    for index in range(model.num_hidden_layers):
        layer = f"model.layers.{index}"
        y, n1, r1 = rms_norm(x, p[f"{layer}.input_layernorm.weight"], model.rms_norm_eps)
        qkv = Linear(
            operand(y, limbs), operand(_stacked(p, layer, "self_attn", "q_proj", "k_proj", "v_proj"), limbs), limbs
        )
        heads = _heads(model, qkv.forward(), positions, limbs)
        attended = _merge(model, [head.forward() for head in heads], positions)
        o = Linear(operand(attended, limbs), operand(p[f"{layer}.self_attn.o_proj.weight"], limbs), limbs)
        x = x + o.forward()
        y, n2, r2 = rms_norm(x, p[f"{layer}.post_attention_layernorm.weight"], model.rms_norm_eps)
        gate_up = Linear(operand(y, limbs), operand(_stacked(p, layer, "mlp", "gate_proj", "up_proj"), limbs), limbs)
        gate, up = np.split(gate_up.forward(), 2, axis=1)
        down = Linear(operand(swiglu(gate, up), limbs), operand(p[f"{layer}.mlp.down_proj.weight"], limbs), limbs)
        x = x + down.forward()
        saved.append((layer, n1, r1, qkv, heads, attended, o, n2, r2, gate_up, gate, up, down))
    y, n, r = rms_norm(x, p["model.norm.weight"], model.rms_norm_eps)
    head = Linear(operand(y, limbs), operand(p[head_name], limbs), limbs)
    losses, d_logits = cross_entropy(head.forward(), targets, share)
    total = F(0)
    for start in range(0, len(losses), grain):
        total = F(total + sum_by_halves(losses[start : start + grain]) * F(share))

    head_gradient = head.weight_gradient(d_logits, grain)
    dy = head.input_gradient(d_logits, rule.head_limbs(limbs))
    grads["model.norm.weight"] = gain_gradient(dy, n)
    dx = rms_norm_gradient(dy, n, r, p["model.norm.weight"])
    for layer, n1, r1, qkv, heads, attended, o, n2, r2, gate_up, gate, up, down in reversed(saved):
        grads[f"{layer}.mlp.down_proj.weight"] = down.weight_gradient(dx, grain)
        d_gate_up = np.concatenate(swiglu_gradient(down.input_gradient(dx), gate, up), axis=1)
        _unstack(grads, layer, "mlp", gate_up.weight_gradient(d_gate_up, grain), p, "gate_proj", "up_proj")
        dy = gate_up.input_gradient(d_gate_up)
        name = f"{layer}.post_attention_layernorm.weight"
        grads[name] = gain_gradient(dy, n2)
        dx = dx + rms_norm_gradient(dy, n2, r2, p[name])
        grads[f"{layer}.self_attn.o_proj.weight"] = o.weight_gradient(dx, grain)
        d_qkv = _heads_gradient(model, heads, attended, o.input_gradient(dx), positions)
        _unstack(grads, layer, "self_attn", qkv.weight_gradient(d_qkv, grain), p, "q_proj", "k_proj", "v_proj")
        dy = qkv.input_gradient(d_qkv)
        name = f"{layer}.input_layernorm.weight"
        grads[name] = gain_gradient(dy, n1)
        dx = dx + rms_norm_gradient(dy, n1, r1, p[name])
    looked_up = in_grains(lambda rows: embedding_gradient(dx[rows], inputs[rows], model.vocab_size), len(dx), grain)
    if model.tie_word_embeddings:
        grads[head_name] = head_gradient + looked_up
    else:
        grads[head_name], grads["model.embed_tokens.weight"] = head_gradient, looked_up
    return grads, float(total)


def _stacked(p: Tensors, layer: str, block: str, *names: str) -> Float32:
    return np.concatenate([p[f"{layer}.{block}.{name}.weight"] for name in names])


def _unstack(grads: Tensors, layer: str, block: str, gradient: Float32, p: Tensors, *names: str) -> None:
    for name in names:
        full = f"{layer}.{block}.{name}.weight"
        grads[full], gradient = gradient[: len(p[full])], gradient[len(p[full]) :]


def _columns(model: ModelSpec, kv_head: int) -> tuple[list[slice], slice, slice]:
    """Where one key-value head's queries (one slice per head of its group), keys and values lie in a row of q, k, v."""
    size, kv_heads, heads = model.head_dim, model.num_key_value_heads, model.num_attention_heads
    group = heads // kv_heads

    def at(index: int) -> slice:
        return slice(index * size, (index + 1) * size)

    return [at(kv_head * group + g) for g in range(group)], at(heads + kv_head), at(heads + kv_heads + kv_head)


def _heads(model: ModelSpec, qkv: Float32, positions: int, limbs: int) -> list[Attention]:
    cos, sin = rule.rotary_tables(model.rope_theta, model.head_dim, model.max_position_embeddings)
    cos, sin = cos[:positions], sin[:positions]
    found = []
    for start in range(0, len(qkv), positions):
        rows = qkv[start : start + positions]
        for kv_head in range(model.num_key_value_heads):
            queries, key, value = _columns(model, kv_head)
            q = np.concatenate([rotate(rows[:, at], cos, sin) for at in queries])
            k, v = rotate(rows[:, key], cos, sin), np.ascontiguousarray(rows[:, value].T)
            scale = rule.attention_scale(model)
            found.append(Attention(operand(q, limbs), operand(k, limbs), operand(v, limbs), scale, limbs))
    return found


def _merge(model: ModelSpec, heads: list[Float32], positions: int) -> Float32:
    """Heads' [G·S, H] back to rows [T, D]."""
    sequences = len(heads) // model.num_key_value_heads
    merged = np.empty((sequences * positions, model.hidden_size), np.float32)
    for index, head in enumerate(heads):
        sequence, kv_head = divmod(index, model.num_key_value_heads)
        for at, part in zip(_columns(model, kv_head)[0], np.split(head, len(head) // positions), strict=True):
            merged[sequence * positions : (sequence + 1) * positions, at] = part
    return merged


def _heads_gradient(
    model: ModelSpec, heads: list[Attention], attended: Float32, d_attended: Float32, positions: int
) -> Float32:
    cos, sin = rule.rotary_tables(model.rope_theta, model.head_dim, model.max_position_embeddings)
    cos, sin = cos[:positions], sin[:positions]
    width = model.hidden_size + 2 * model.num_key_value_heads * model.head_dim
    d_qkv = np.empty((len(attended), width), np.float32)
    for index, head in enumerate(heads):
        sequence, kv_head = divmod(index, model.num_key_value_heads)
        rows = slice(sequence * positions, (sequence + 1) * positions)
        queries, key, value = _columns(model, kv_head)
        out, d_out = (np.concatenate([x[rows, at] for at in queries]) for x in (attended, d_attended))
        d_q, d_k, d_v = head.gradient(out, d_out)
        for at, part in zip(queries, np.split(d_q, len(queries)), strict=True):
            d_qkv[rows, at] = rotate(part, cos, -sin)
        d_qkv[rows, key], d_qkv[rows, value] = rotate(d_k, cos, -sin), d_v
    return d_qkv


# --- What is trained


def merge(trainable: TrainableSpec, trunk: Tensors, trained: Tensors, *, limbs: int) -> Tensors:
    """All parameters by name: gains replaced, or w = trunk + (b · a) · alpha / r."""
    if trainable.kind == "norms":
        return trunk | trained
    merged, counts = dict(trunk), F(trainable.alpha) / F(trainable.r)
    for matrix, a, b in _adapters(trained):
        a_rows = operand(a, limbs)
        merged[matrix] = trunk[matrix] + times_operand(b * a_rows.scales[None, :], a_rows, limbs) * counts
    return merged


def pull_back(trainable: TrainableSpec, trained: Tensors, gradients: Tensors, *, limbs: int) -> Tensors:
    """The gradients of what is trained, by name, from those of all parameters."""
    if trainable.kind == "norms":
        return {name: gradients[name] for name in trained}
    found, counts = Tensors(), F(trainable.alpha) / F(trainable.r)
    for matrix, a, b in _adapters(trained):
        name = matrix.removesuffix(".weight")
        dw, a_rows = operand(gradients[matrix], limbs), operand(a, limbs)
        db = product(dw.limbs(limbs), dw.e, [limb.T for limb in a_rows.limbs(limbs)], a_rows.e)
        found[f"{name}.lora_A.weight"] = times_operand(b.T * dw.scales[None, :], dw, limbs) * counts
        found[f"{name}.lora_B.weight"] = db * counts
    return found


def _adapters(trained: Tensors) -> Iterator[tuple[str, Float32, Float32]]:
    """Per adapter: the name of its matrix, a [r, inputs] and b [outputs, r]."""
    for name, a in trained.items():
        if name.endswith(".lora_A.weight"):
            matrix = name.removesuffix(".lora_A.weight")
            yield f"{matrix}.weight", a, trained[f"{matrix}.lora_B.weight"]


# --- Optimizer


def optimize(
    spec: RunSpec, parameters: Tensors, moments: Float32, gradients: Tensors, step: int, *, limbs: int
) -> tuple[Float32, Float32]:
    """Clip, then Muon for the matrices of the layers where the spec says so, and AdamW for the rest."""
    optimizer = spec.training.optimizer
    scalars = StepScalars.of(optimizer, step)
    shapes = trainable_shapes(spec.model, spec.trainable)
    flat = np.concatenate([gradients[name].reshape(-1) for name in shapes])
    norm = np.sqrt(sum_of_squares(flat))
    factor = F(scalars.clip_norm) / np.maximum(norm, F(scalars.clip_norm))
    sizes = moment_sizes(shapes, optimizer)
    momenta, first, second = np.split(moments, [sizes[0], sizes[0] + sizes[1]])
    new: list[list[Float32]] = [[], [], [], []]
    for name, shape in shapes.items():
        p, g = parameters[name], gradients[name] * factor
        if optimizer.name == "muon" and len(shape) == 2 and name.startswith("model.layers."):
            momentum, momenta = momenta[: p.size].reshape(shape), momenta[p.size :]
            p, momentum = muon(p, g, momentum, scalars, optimizer.newton_schulz_steps, limbs)
            new[1].append(momentum)
        else:
            m, first = first[: p.size].reshape(shape), first[p.size :]
            v, second = second[: p.size].reshape(shape), second[p.size :]
            p, m, v = adamw(p, g, m, v, scalars)
            new[2].append(m)
            new[3].append(v)
        new[0].append(p)
    flats = [np.concatenate([np.zeros(0, np.float32), *(x.reshape(-1) for x in part)]) for part in new]
    return flats[0], np.concatenate(flats[1:])


def adamw(p: Float32, g: Float32, m: Float32, v: Float32, s: StepScalars) -> tuple[Float32, Float32, Float32]:
    m = m * F(s.beta1) + g * F(s.rest1)
    v = v * F(s.beta2) + (g * g) * F(s.rest2)
    update = (m / (np.sqrt(v * F(s.correction2)) + F(s.eps))) * F(s.adamw_lr)
    if p.ndim == 2:
        p = p * F(s.adamw_decay)
    return p - update, m, v


def muon(p: Float32, g: Float32, momentum: Float32, s: StepScalars, steps: int, limbs: int) -> tuple[Float32, Float32]:
    momentum = momentum * F(s.momentum) + g
    update = g + momentum * F(s.momentum)
    rows, columns = p.shape
    x = orthogonalize(
        update if rows <= columns else np.ascontiguousarray(update.T), np.sqrt(sum_of_squares(update)), steps, limbs
    )
    p = p * F(s.muon_decay)
    return p - (x if rows <= columns else x.T) * F(s.muon_rate(rows, columns)), momentum


def orthogonalize(x: Float32, norm: np.float32, steps: int, limbs: int) -> Float32:
    """Newton-Schulz on x [R, C] with R <= C, of Frobenius norm `norm`."""
    a, b, c = (F(value) for value in rule.NEWTON_SCHULZ_F32)
    x = x * (F(1) / (norm + F(rule.MUON_EPS)))
    for _ in range(steps):
        x_rows = operand(x, limbs)
        gram = times_itself(x_rows, limbs)
        poly = gram * b + times_itself(operand(gram, limbs), limbs) * c
        x = x * a + times_operand(poly * x_rows.scales[None, :], x_rows, limbs)
    return x


def times_itself(a: Operand, limbs: int) -> Float32:
    """a · aᵀ"""
    digits = a.limbs(limbs)
    return product(digits, a.e, [limb.T for limb in digits], a.e)


def split(shapes: Shapes, flat: Float32) -> Tensors:
    found, offset = {}, 0
    for name, shape in shapes.items():
        found[name] = flat[offset : offset + math.prod(shape)].reshape(shape)
        offset += math.prod(shape)
    return found
