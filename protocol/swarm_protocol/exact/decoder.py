"""The Llama decoder in exact arithmetic, forward and backward: docs/numerics.md, section 4, from top to bottom.

There is no autograd: the backward pass is written out, so that every tensor's limbs are made once and used wherever the
rule lets them be. A micro-batch is any number of whole grains. Weights' limbs are made once per step (`load`), activations'
limbs are kept from the forward pass for the backward one.

Shapes: T tokens of the micro-batch, D hidden, F intermediate, V vocabulary, S positions, H head size, C key-value heads of
all sequences, R rows (group, position) of one of them, L limbs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from swarm_protocol.exact import rule
from swarm_protocol.exact.passes import Passes
from swarm_protocol.exact.products import Limbs, Products, Scratch
from swarm_protocol.exact.reference import sum_by_halves
from swarm_protocol.model.llama import parameter_shapes
from swarm_protocol.spec import ModelSpec

Observe = Callable[[str, Tensor], None]

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class _Heads:
    """Attention of one layer as limbs; see `Passes.heads` and `Passes.softmax_limbs`."""

    q: Tensor
    q_e: Tensor
    k: Tensor
    k_e: Tensor
    v: Tensor
    v_e: Tensor
    weights: Tensor
    r: Tensor


@dataclass(frozen=True)
class _Layer:
    """What the backward pass needs of one layer's forward pass."""

    x: Tensor
    r1: Tensor
    normed1: Limbs
    heads: _Heads
    attended: Tensor
    attended_limbs: Limbs
    middle: Tensor
    r2: Tensor
    normed2: Limbs
    gate_up: Tensor
    activated: Limbs


class Decoder:
    """Gradients of the loss in `gradients`, from `parameters`, both flat float32 vectors on one device."""

    def __init__(
        self,
        model: ModelSpec,
        parameters: Tensor,
        gradients: Tensor,
        products: Products,
        passes: Passes,
        scratch: Scratch,
        status: Tensor,
        *,
        limbs: int,
        grain_sequences: int,
        observe: Observe | None = None,
    ) -> None:
        """`observe` is told the name of every operator and its result, in the order of the computation."""
        self._model, self._products, self._passes, self._scratch = model, products, passes, scratch
        self._head_limbs = rule.head_limbs(limbs)
        self._head_products = products.of(self._head_limbs)
        self._observe = observe or (lambda _name, _result: None)
        self._limbs, self._status = limbs, status
        self._positions = model.max_position_embeddings
        self._grain = grain_sequences * self._positions
        self._parameters, self._gradients = _Named(model, parameters), _Named(model, gradients)
        tables = rule.rotary_tables(model.rope_theta, model.head_dim, self._positions)
        self._cos, self._sin = (torch.from_numpy(table).to(parameters.device) for table in tables)
        self._scale = rule.attention_scale(model)
        self._head = EMBEDDING if model.tie_word_embeddings else HEAD
        self._weights: dict[str, Limbs] = {}

    def load(self) -> None:
        """Make the limbs of all weights, which have changed."""
        for key in self._parameters.matrices(self._head):
            matrix = self._parameters[key]
            weight = self._scratch.limbs(f"weight {key}", self._limbs, *matrix.shape)
            self._passes.limbs(matrix, weight.planes, weight.e, self._status)
            self._weights[key] = weight

    def backward(self, tokens: Tensor, divisor: int, *, first: bool) -> list[np.float32]:
        """Add the gradients of tokens int64 [B, S + 1] to those of earlier micro-batches; `first` begins anew.

        Returns every grain's share of the loss in nats, where `divisor` tokens share it. A tied embedding's gradient is
        complete only after `finish`.
        """
        inputs, targets = tokens[:, :-1].reshape(-1), tokens[:, 1:].reshape(-1)
        model, passes, count = self._model, self._passes, len(inputs)
        share, keep = rule.f32(1.0 / divisor), not first
        x = self._scratch.floats("embedded", count, model.hidden_size)
        torch.index_select(self._parameters[EMBEDDING], 0, inputs, out=x)
        self._observe("embedding", x)
        layers = []
        for index in range(model.num_hidden_layers):
            x, layer = self._layer(index, x)
            layers.append(layer)

        r, normed = self._norm("final", x, FINAL_NORM)
        logits = self._scratch.floats("logits", count, model.vocab_size)
        self._linear(normed, self._head, logits)
        self._observe("head", logits)
        losses = self._scratch.floats("losses", count)
        passes.cross_entropy(logits, targets, share, losses)
        self._observe("cross-entropy", losses)
        self._observe("cross-entropy, gradient", logits)
        dx = self._scratch.floats("dx", count, model.hidden_size)
        dx.zero_()
        dy = self._linear_gradient(logits, normed, self._head, keep)
        self._norm_gradient(dy, x, r, FINAL_NORM, dx, keep)
        self._observe("head and final norm, gradient", dx)
        for index in reversed(range(model.num_hidden_layers)):
            self._layer_gradient(index, layers[index], dx, keep)
        looked_up = self._looked_up()
        for start in range(0, count, self._grain):
            part = slice(start, start + self._grain)
            passes.embedding_gradient(dx[part], inputs[part], looked_up, keep or start > 0, self._status)
        self._observe("embedding, gradient of the weight", looked_up)
        found = losses.cpu().numpy()
        with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses a loss that is not finite
            return [
                np.float32(sum_by_halves(found[start : start + self._grain]) * np.float32(share))
                for start in range(0, count, self._grain)
            ]

    def finish(self) -> None:
        """After the step's last micro-batch: a tied embedding's gradient is the head's plus the look-up's."""
        if self._model.tie_word_embeddings:
            self._gradients[EMBEDDING].add_(self._looked_up())

    def _looked_up(self) -> Tensor:
        if not self._model.tie_word_embeddings:
            return self._gradients[EMBEDDING]
        return self._scratch.floats("looked up", self._model.vocab_size, self._model.hidden_size)

    # --- One layer

    def _layer(self, index: int, x: Tensor) -> tuple[Tensor, _Layer]:
        model, count, name = self._model, len(x), f"model.layers.{index}"
        floats, limbs = self._scratch.floats, self._limbs
        r1, normed1 = self._norm(f"{name} first", x, f"{name}.input_layernorm.weight")
        width = model.hidden_size + 2 * model.num_key_value_heads * model.head_dim
        qkv = self._linear(normed1, f"{name}.self_attn.qkv", floats("qkv", count, width))
        self._observe(f"{name}: q, k, v", qkv)
        heads = self._heads(name, qkv)
        attended = self._attend(heads, floats(f"{name} attended", count, model.hidden_size))
        self._observe(f"{name}: attention", attended)
        attended_limbs = self._scratch.limbs(f"{name} attended", limbs, count, model.hidden_size)
        self._passes.limbs(attended, attended_limbs.planes, attended_limbs.e, self._status)
        middle = floats(f"{name} middle", count, model.hidden_size)
        middle.copy_(x)
        self._linear(attended_limbs, f"{name}.self_attn.o_proj.weight", middle, keep=1.0)
        self._observe(f"{name}: o_proj", middle)

        r2, normed2 = self._norm(f"{name} second", middle, f"{name}.post_attention_layernorm.weight")
        gate_up = floats(f"{name} gate and up", count, 2 * model.intermediate_size)
        self._linear(normed2, f"{name}.mlp.gate_up", gate_up)
        self._observe(f"{name}: gate and up", gate_up)
        activated = self._scratch.limbs(f"{name} activated", limbs, count, model.intermediate_size)
        self._passes.swiglu_limbs(gate_up, activated.planes, activated.e, self._status)
        out = floats(f"{name} out", count, model.hidden_size)
        out.copy_(middle)
        self._linear(activated, f"{name}.mlp.down_proj.weight", out, keep=1.0)
        self._observe(f"{name}: down_proj", out)
        kept = _Layer(x, r1, normed1, heads, attended, attended_limbs, middle, r2, normed2, gate_up, activated)
        return out, kept

    def _layer_gradient(self, index: int, layer: _Layer, dx: Tensor, keep: bool) -> None:
        """From the gradient of the layer's output in dx to that of its input."""
        name = f"model.layers.{index}"
        d_activated = self._linear_gradient(dx, layer.activated, f"{name}.mlp.down_proj.weight", keep)
        self._observe(f"{name}: down_proj, gradient", d_activated)
        self._passes.swiglu_gradient(d_activated, layer.gate_up)
        self._observe(f"{name}: SwiGLU, gradient", layer.gate_up)
        dy = self._linear_gradient(layer.gate_up, layer.normed2, f"{name}.mlp.gate_up", keep)
        self._norm_gradient(dy, layer.middle, layer.r2, f"{name}.post_attention_layernorm.weight", dx, keep)
        self._observe(f"{name}: second norm, gradient", dx)
        d_attended = self._linear_gradient(dx, layer.attended_limbs, f"{name}.self_attn.o_proj.weight", keep)
        self._observe(f"{name}: o_proj, gradient", d_attended)
        d_qkv = self._attend_gradient(layer.heads, layer.attended, d_attended)
        self._observe(f"{name}: attention, gradient", d_qkv)
        dy = self._linear_gradient(d_qkv, layer.normed1, f"{name}.self_attn.qkv", keep)
        self._norm_gradient(dy, layer.x, layer.r1, f"{name}.input_layernorm.weight", dx, keep)
        self._observe(f"{name}: first norm, gradient", dx)

    # --- Linear layers and norms

    def _linear(self, x: Limbs, key: str, out: Tensor, *, keep: float = 0.0) -> Tensor:
        """out · keep + x · Wᵀ"""
        weight = self._weights[key]
        self._products(x.planes, x.e, weight.planes.mT, weight.e, out, keep=keep)
        return out

    def _linear_gradient(self, dy: Tensor, x: Limbs, key: str, keep: bool) -> Tensor:
        """The gradient of x [T, K], valid until the next call with the same K; the weight's goes to `gradients`."""
        count, width = dy.shape
        weight, gradient = self._weights[key], self._gradients[key]
        row_limbs, products = self._limbs, self._products
        if key == self._head:
            row_limbs, products = self._head_limbs, self._head_products
        rows = self._scratch.limbs("gradient rows", row_limbs, count, width)
        columns = self._scratch.int8("gradient columns", self._limbs, count, width)
        grains = -(-count // self._grain)
        columns_e = self._scratch.int32("gradient columns", grains, width)
        self._passes.gradient_limbs(
            dy, weight.e, x.e, self._grain, rows.planes, rows.e, columns, columns_e, self._status
        )
        for index in range(grains):
            part = slice(index * self._grain, (index + 1) * self._grain)
            kept = 1.0 if keep or index else 0.0
            self._products(columns[:, part].mT, columns_e[index], x.planes[:, part], None, gradient, keep=kept)
        self._observe(f"{key}: gradient of the weight", gradient)
        dx = self._scratch.floats("gradient of x", count, weight.planes.shape[2])
        products(rows.planes, rows.e, weight.planes, None, dx)
        return dx

    def _norm(self, name: str, x: Tensor, gain: str) -> tuple[Tensor, Limbs]:
        r, normed = (
            self._scratch.floats(f"{name} r", len(x)),
            self._scratch.limbs(f"{name} normed", self._limbs, *x.shape),
        )
        eps = rule.f32(self._model.rms_norm_eps)
        self._passes.norm_limbs(x, self._parameters[gain], eps, normed.planes, normed.e, r, self._status)
        return r, normed

    def _norm_gradient(self, dy: Tensor, x: Tensor, r: Tensor, gain: str, dx: Tensor, keep: bool) -> None:
        self._passes.norm_gradient(dy, x, r, self._parameters[gain], self._grain, dx, self._gradients[gain], keep)
        self._observe(f"{gain}: gradient of the weight", self._gradients[gain])

    # --- Attention, one key-value head of one sequence at a time

    def _heads(self, name: str, qkv: Tensor) -> _Heads:
        model, positions, limbs = self._model, self._positions, self._limbs
        size, group = model.head_dim, model.num_attention_heads // model.num_key_value_heads
        count, rows = len(qkv) // positions * model.num_key_value_heads, group * positions
        int8, int32 = self._scratch.int8, self._scratch.int32
        heads = _Heads(
            int8(f"{name} q", count, limbs, rows, size),
            int32(f"{name} q", count, rows),
            int8(f"{name} k", count, limbs, positions, size),
            int32(f"{name} k", count, positions),
            int8(f"{name} v", count, limbs, positions, size),
            int32(f"{name} v", count, size),
            int8(f"{name} weights", count, limbs, rows, positions),
            self._scratch.floats(f"{name} sums", count, rows),
        )
        self._passes.heads(
            *(qkv, self._cos, self._sin, heads.q, heads.q_e, heads.k, heads.k_e, heads.v, heads.v_e, self._status)
        )
        return heads

    def _place(self, c: int) -> tuple[slice, int, int]:
        """Of head c: the rows of its sequence, its number in the sequence, and the first column of its queries."""
        model = self._model
        sequence, head = divmod(c, model.num_key_value_heads)
        rows = slice(sequence * self._positions, (sequence + 1) * self._positions)
        return rows, head, head * (model.num_attention_heads // model.num_key_value_heads) * model.head_dim

    def _attend(self, heads: _Heads, out: Tensor) -> Tensor:
        for c in range(len(heads.q)):
            s = self._products.integers(heads.q[c], heads.k[c].mT)
            self._passes.softmax_limbs(s, heads.q_e[c], heads.k_e[c], self._scale, heads.weights[c], heads.r[c])
            rows, _, column = self._place(c)
            s = self._products.integers(heads.weights[c], heads.v[c])
            self._passes.place_heads(s, heads.v_e[c], heads.r[c], out[rows], column)
        return out

    def _attend_gradient(self, heads: _Heads, out: Tensor, d_out: Tensor) -> Tensor:
        limbs, scratch, products, passes = self._limbs, self._scratch, self._products, self._passes
        count, _, rows, size = heads.q.shape
        positions = self._positions
        d_qkv = scratch.floats("d_qkv", len(out), self._model.hidden_size + 2 * self._model.num_key_value_heads * size)
        by_rows, scores_rows = (
            scratch.limbs("out rows", limbs, rows, size),
            scratch.limbs("scores rows", limbs, rows, positions),
        )
        by_columns, by_columns_e = scratch.int8("out columns", limbs, rows, size), scratch.int32("out columns", size)
        scores_columns = scratch.int8("scores columns", limbs, rows, positions)
        scores_columns_e = scratch.int32("scores columns", positions)
        correction, zeros = scratch.floats("correction", rows), scratch.int32("zeros", positions)
        d_q, d_k, d_v = (
            scratch.floats(f"d_{name}", length, size)
            for name, length in (("q", rows), ("k", positions), ("v", positions))
        )
        for c in range(count):
            at, head, column = self._place(c)
            q, q_e, k, k_e = heads.q[c], heads.q_e[c], heads.k[c], heads.k_e[c]
            weights, r = heads.weights[c], heads.r[c]
            passes.attended_limbs(
                out[at],
                d_out[at],
                column,
                heads.v_e[c],
                r,
                by_rows.planes,
                by_rows.e,
                by_columns,
                by_columns_e,
                correction,
                self._status,
            )
            products(weights.mT, zeros, by_columns, by_columns_e, d_v)
            passes.softmax_gradient_limbs(
                products.integers(by_rows.planes, heads.v[c].mT),
                by_rows.e,
                weights,
                r,
                correction,
                self._scale,
                q_e,
                k_e,
                scores_rows.planes,
                scores_rows.e,
                scores_columns,
                scores_columns_e,
                self._status,
            )
            products(scores_rows.planes, scores_rows.e, k, None, d_q)
            products(scores_columns.mT, scores_columns_e, q, None, d_k)
            passes.place_gradients(d_q, d_k, d_v, self._cos, self._sin, head, d_qkv[at])
        return d_qkv


class _Named:
    """Views of a flat vector by name; q, k, v of a layer and its gate, up lie one after the other and are one matrix too."""

    def __init__(self, model: ModelSpec, flat: Tensor) -> None:
        self._views: dict[str, Tensor] = {}
        self._matrices: list[str] = []
        offset = 0
        shapes = parameter_shapes(model)
        for name, shape in shapes.items():
            rows = shape[0]
            key = name
            if name.endswith("q_proj.weight"):
                rows += 2 * shapes[name.replace("q_proj", "k_proj")][0]
                key = name.replace("q_proj.weight", "qkv")
            elif name.endswith("gate_proj.weight"):
                rows *= 2
                key = name.replace("gate_proj.weight", "gate_up")
            self._views[key] = flat[offset : offset + rows * math.prod(shape[1:])].view(rows, *shape[1:])
            self._views.setdefault(name, flat[offset : offset + math.prod(shape)].view(shape))
            if len(shape) == 2 and not name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
                self._matrices.append(key)
            offset += math.prod(shape)

    def __getitem__(self, key: str) -> Tensor:
        return self._views[key]

    def matrices(self, head: str) -> list[str]:
        """Keys of the matrices that multiply, `head` among them."""
        return [key for key in self._matrices if key != EMBEDDING or key == head]
