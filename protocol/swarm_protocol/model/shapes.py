"""Names and shapes of a model's parameters, and of what is trained of them. Nothing here computes or loads torch."""

from __future__ import annotations

from swarm_protocol.spec import ModelSpec, TrainableSpec


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


def adapted_matrices(model: ModelSpec, trainable: TrainableSpec) -> list[str]:
    """Names of the matrices that have adapters, without `.weight`, in canonical order; none unless the kind is `lora`."""
    if trainable.kind != "lora":
        return []
    names = (name.removesuffix(".weight") for name in parameter_shapes(model))
    return [name for name in names if name.rpartition(".")[2] in trainable.targets]


def trainable_shapes(model: ModelSpec, trainable: TrainableSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that is trained, in canonical order: the layout of the trained vector.

    Adapters have peft's names without its prefix `base_model.model.`; A is [r, inputs] and B is [outputs, r].
    """
    shapes = parameter_shapes(model)
    match trainable.kind:
        case "all":
            return shapes
        case "norms":
            return {name: shape for name, shape in shapes.items() if len(shape) == 1}
        case "lora":
            found: dict[str, tuple[int, ...]] = {}
            for name in adapted_matrices(model, trainable):
                outputs, inputs = shapes[f"{name}.weight"]
                found[f"{name}.lora_A.weight"] = (trainable.r, inputs)
                found[f"{name}.lora_B.weight"] = (outputs, trainable.r)
            return found
