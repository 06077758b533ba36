"""A Llama decoder in one file: the mathematics and the parameter names of Hugging Face's `LlamaForCausalLM`.

RMSNorm before attention and MLP, rotary embeddings (the rotate-half layout), SwiGLU, grouped-query attention, tied
embeddings by choice, no biases and no dropout. Everything is float32.

All parameters are views of one flat vector, in the order in which the modules define them (`parameter_shapes`): that
vector is what checkpoints, pseudo-gradients and state roots are made of. The forward and backward passes belong to the
tolerant domain; `initial_parameters` and everything about shapes to the exact one.

Shape suffixes: B sequences, S positions, V vocabulary, D hidden size, F intermediate size, N query heads, K key-value
heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name everybody reads)

from swarm_protocol import seeds
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.model.shapes import parameter_shapes as parameter_shapes  # part of this module's surface
from swarm_protocol.spec import ModelSpec

Shapes = Mapping[str, tuple[int, ...]]
"""Name and shape of tensors, in the order in which they lie in a flat vector."""

_DRAW_ELEMENTS = 1 << 20
"""Initial weights are drawn in runs of this many elements, one counter each, so that no tensor's raw draws are held whole."""


def num_parameters(spec: ModelSpec) -> int:
    """Elements of the flat vector."""
    return sum(math.prod(shape) for shape in parameter_shapes(spec).values())


def flops_per_token(spec: ModelSpec) -> int:
    """Training FLOPs per token, forward and backward: 6 per parameter that multiplies, and the attention scores.

    Source: PaLM (Chowdhery et al. 2022), appendix B, 6N + 12·L·D·S. The embedding look-up multiplies nothing, but where
    it is tied it is the head as well.
    """
    multiplying = num_parameters(spec) - (0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size)
    attention = 12 * spec.num_hidden_layers * spec.hidden_size * spec.max_position_embeddings
    return 6 * multiplying + attention


def initial_parameters(spec: ModelSpec, seed: int) -> npt.NDArray[np.float32]:
    """The flat vector that training starts from, float32[num_parameters]; the same bits on every machine.

    Matrices are uniform with mean 0 and standard deviation `initializer_range`; those that write into the residual
    stream (`o_proj`, `down_proj`) are smaller by sqrt(2·layers), as in GPT-2. Gains are 1.
    """
    flat = np.empty(num_parameters(spec), np.float32)
    offset = 0
    for index, (name, shape) in enumerate(parameter_shapes(spec).items()):
        values = flat[offset : offset + math.prod(shape)]
        offset += values.size
        if len(shape) == 1:
            values[:] = 1.0
            continue
        width = spec.initializer_range * math.sqrt(12.0)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            width /= math.sqrt(2.0 * spec.num_hidden_layers)
        draw_uniform(values, width, seed, "initial parameters", index)
    return flat


def draw_uniform(out: npt.NDArray[np.float32], width: float, seed: int, purpose: str, tensor: int) -> None:
    """Fill a flat vector uniformly within [-width / 2, width / 2): the draws of a purpose's tensor number `tensor`."""
    for draw, start in enumerate(range(0, out.size, _DRAW_ELEMENTS)):
        part = out[start : start + _DRAW_ELEMENTS]
        raw = seeds.raw(seed, purpose, 0, tensor, draw, part.size)
        np.multiply(seeds.uniform_f32(raw), np.float32(width), out=part)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_BSD: Tensor) -> Tensor:
        return F.rms_norm(x_BSD, self.weight.shape, self.weight, self.eps)


def rotate(x_BNSH: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), pairing element i with i + H/2."""
    first, second = x_BNSH.chunk(2, dim=-1)
    return x_BNSH * cos_SH + torch.cat((-second, first), dim=-1) * sin_SH


def rotary_tables(spec: ModelSpec, device: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every angle, each float32 [max_position_embeddings, H].

    The transcendentals are taken in float64 and rounded once, so that machines differ in hardly any entry.
    """
    size = spec.head_dim
    frequencies = np.array([spec.rope_theta ** -(i / size) for i in range(0, size, 2)]).astype(np.float32)
    angles = np.outer(np.arange(spec.max_position_embeddings, dtype=np.float32), np.concatenate([frequencies] * 2))
    wide = angles.astype(np.float64)
    cos, sin = (torch.from_numpy(table(wide).astype(np.float32)) for table in (np.cos, np.sin))
    return cos.to(device), sin.to(device)


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        d, kv = spec.hidden_size, spec.num_key_value_heads * spec.head_dim
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.head_dim = spec.head_dim
        self.group = spec.num_attention_heads // spec.num_key_value_heads

    def forward(self, x_BSD: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        q_BNSH = rotate(self.q_proj(x_BSD).view(heads).transpose(1, 2), cos_SH, sin_SH)
        k_BKSH = rotate(self.k_proj(x_BSD).view(heads).transpose(1, 2), cos_SH, sin_SH)
        v_BKSH = self.v_proj(x_BSD).view(heads).transpose(1, 2)
        k_BNSH, v_BNSH = self._repeat(k_BKSH), self._repeat(v_BKSH)
        y_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True)
        return cast(Tensor, self.o_proj(y_BNSH.transpose(1, 2).reshape(x_BSD.shape)))

    def _repeat(self, x_BKSH: Tensor) -> Tensor:
        """Each key-value head serves `group` query heads. Not `enable_gqa`: its CUDA kernels differ from the rest."""
        if self.group == 1:
            return x_BKSH
        b, k, s, h = x_BKSH.shape
        return x_BKSH[:, :, None].expand(b, k, self.group, s, h).reshape(b, k * self.group, s, h)


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD)))


class DecoderLayer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.self_attn = Attention(spec)
        self.mlp = MLP(spec)
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(self, x_BSD: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos_SH, sin_SH)
        return cast(Tensor, x_BSD + self.mlp(self.post_attention_layernorm(x_BSD)))


class Decoder(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.num_hidden_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(self, tokens_BS: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
        x_BSD = self.embed_tokens(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, cos_SH, sin_SH)
        return cast(Tensor, self.norm(x_BSD))


class Llama(nn.Module):
    """Made by `build`. `flat` is the float32 vector that every parameter is a view of; do not move the module."""

    flat: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Decoder(spec)
        self.lm_head = None if spec.tie_word_embeddings else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.rotary: tuple[Tensor, Tensor]

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits, float32 [B, S, V], of int64 tokens; S is at most `max_position_embeddings`."""
        length = tokens_BS.shape[1]
        x_BSD = self.model(tokens_BS, self.rotary[0][:length], self.rotary[1][:length])
        head_VD = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(x_BSD, head_VD)


def build(spec: ModelSpec, *, device: str = "cpu") -> Llama:
    """A model on `device`, all parameters zero until `load_flat`."""
    with torch.device("meta"):
        model = Llama(spec)
    model.rotary = rotary_tables(spec, device)
    # Kernels may round differently on memory that is aligned differently: torch's own allocations all start alike.
    model.flat = torch.zeros(num_parameters(spec), device=device)
    for (name, _), view in zip(parameter_shapes(spec).items(), views(spec, model.flat), strict=True):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(view))
    return model


def views(spec: ModelSpec, flat: Tensor) -> list[Tensor]:
    """The flat vector as one view per parameter, in canonical order."""
    return list(named_views(parameter_shapes(spec), flat).values())


def named_views(shapes: Shapes, flat: Tensor) -> dict[str, Tensor]:
    """A flat vector as one view per tensor, which lie in it one after the other."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def load_flat(model: Llama, flat: npt.NDArray[np.float32]) -> None:
    """Copy a flat vector into the model.

    Raises:
        InvalidDataError: wrong length or type.
    """
    if flat.dtype != np.float32 or flat.shape != tuple(model.flat.shape):
        raise InvalidDataError(
            f"{flat.dtype}{list(flat.shape)} given where this model has float32[{model.flat.numel()}] parameters"
        )
    with torch.no_grad():
        model.flat.copy_(torch.from_numpy(np.require(flat, requirements=["C", "W"])))


def loss(model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of predicting `tokens[:, 1:]`, int64 [B, S + 1]; a scalar."""
    logits_BSV = model(tokens[:, :-1])
    return F.cross_entropy(logits_BSV.flatten(0, 1), tokens[:, 1:].reshape(-1))
