"""What a model writes: one token after another, each drawn from the model's distribution. Tolerant domain.

Keys and values of earlier tokens are kept, so that a token costs one pass over itself. Where the model's positions are used
up, the newer half of them is read again, as if the text began there. On one machine, the same seed draws the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the name everybody reads)

from swarm_protocol import training
from swarm_protocol.model import llama
from swarm_protocol.model.llama import Attention, DecoderLayer, Llama

_PIECE_TOKENS = 1024
"""A long prompt is read in pieces: attention takes memory by their length times all that was read before."""


@dataclass(frozen=True)
class Draw:
    """How a token is drawn: at a temperature, 0 for the likeliest one; from the likeliest tokens with the share `top_p`."""

    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0


class Reader:
    """A model that reads a text piece by piece: the distribution of the next token, with what was read before in mind."""

    def __init__(self, model: Llama) -> None:
        self._model = model
        spec = model.spec
        shape = (spec.num_hidden_layers, 2, 1, spec.num_key_value_heads, spec.max_position_embeddings, spec.head_dim)
        self._seen = torch.zeros(shape, device=model.flat.device)
        self.room = spec.max_position_embeddings

    def read(self, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
        """Logits, float64[V], of the token after these.

        Raises:
            ValueError: none, or more than there is room for.
        """
        if not 0 < len(tokens) <= self.room:
            raise ValueError(f"{len(tokens)} tokens where there is room for {self.room}")
        for start in range(0, len(tokens), _PIECE_TOKENS):
            logits_V = self._read(tokens[start : start + _PIECE_TOKENS])
        found: npt.NDArray[np.float64] = logits_V.double().cpu().numpy()
        return found

    def _read(self, tokens: Sequence[int]) -> Tensor:
        model = self._model
        start = model.spec.max_position_embeddings - self.room
        stop = start + len(tokens)
        cos_SH, sin_SH = (table[start:stop] for table in model.rotary)
        with training.deterministic(), torch.no_grad():
            x_BSD = model.model.embed_tokens(torch.tensor([list(tokens)], device=model.flat.device))
            for layer, seen in zip(cast(Iterable[DecoderLayer], model.model.layers), self._seen, strict=True):
                x_BSD = x_BSD + _attend(layer.self_attn, layer.input_layernorm(x_BSD), cos_SH, sin_SH, seen, start)
                x_BSD = x_BSD + layer.mlp(layer.post_attention_layernorm(x_BSD))
            head_VD = model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
            logits_V = F.linear(model.model.norm(x_BSD[0, -1]), head_VD)
        self.room -= len(tokens)
        return logits_V


def _attend(attention: Attention, x_BSD: Tensor, cos_SH: Tensor, sin_SH: Tensor, seen: Tensor, start: int) -> Tensor:
    """`Attention.forward` of the positions from `start` on; `seen` has keys and values of earlier ones, and gets these."""
    stop = start + x_BSD.shape[1]
    heads = (*x_BSD.shape[:2], -1, attention.head_dim)
    q_BNSH = llama.rotate(attention.q_proj(x_BSD).view(heads).transpose(1, 2), cos_SH, sin_SH)
    seen[0, :, :, start:stop] = llama.rotate(attention.k_proj(x_BSD).view(heads).transpose(1, 2), cos_SH, sin_SH)
    seen[1, :, :, start:stop] = attention.v_proj(x_BSD).view(heads).transpose(1, 2)
    k_BNSH, v_BNSH = (
        past_BKSH[:, :, :stop].repeat_interleave(attention.group, dim=1) for past_BKSH in (seen[0], seen[1])
    )
    earlier_ST = torch.ones(stop - start, stop, dtype=torch.bool, device=x_BSD.device).tril(start)
    y_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, attn_mask=earlier_ST)
    found: Tensor = attention.o_proj(y_BNSH.transpose(1, 2).reshape(x_BSD.shape))
    return found


def continuation(model: Llama, prompt: Sequence[int], draw: Draw) -> Iterator[int]:
    """Tokens after a prompt of at least one, without end, each computed when it is asked for."""
    length = model.spec.max_position_embeddings
    chance = np.random.default_rng(draw.seed)
    tokens = list(prompt[-length:])
    reader, unread = Reader(model), tokens
    while True:
        token = _drawn(reader.read(unread), draw, chance)
        yield token
        tokens, unread = [*tokens[1 - length :], token], [token]
        if not reader.room:
            reader, unread = Reader(model), tokens[-(length // 2) :]


def _drawn(logits_V: npt.NDArray[np.float64], draw: Draw, chance: np.random.Generator) -> int:
    if draw.temperature == 0.0:
        return int(logits_V.argmax())
    weights = np.exp((logits_V - logits_V.max()) / draw.temperature)
    weights /= weights.sum()
    if draw.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        kept = order[: int(np.searchsorted(np.cumsum(weights[order]), draw.top_p)) + 1]
        rest = np.zeros_like(weights)
        rest[kept] = weights[kept]
        weights = rest / rest.sum()
    return int(chance.choice(weights.size, p=weights))
