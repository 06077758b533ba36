"""Names and shapes of a model's parameters, without anything that computes: whoever needs no more loads no torch."""

from __future__ import annotations

from swarm_protocol.spec import ModelSpec


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in canonical order: the layout of the flat vector."""
    d, f, v = spec.hidden_size, spec.intermediate_size, spec.vocab_size
    kv = spec.num_key_value_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    for index in range(spec.num_hidden_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.self_attn.q_proj.weight"] = (d, d)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv, d)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (kv, d)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, d)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (f, d)
        shapes[f"{layer}.mlp.up_proj.weight"] = (f, d)
        shapes[f"{layer}.mlp.down_proj.weight"] = (d, f)
        shapes[f"{layer}.input_layernorm.weight"] = (d,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (v, d)
    return shapes
