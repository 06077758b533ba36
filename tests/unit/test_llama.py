"""The model is Hugging Face's Llama by name and by number, and starts from the same bits everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3

from swarm_protocol.errors import InvalidDataError
from swarm_protocol.model import llama
from swarm_protocol.spec import ModelSpec

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
}
VARIANTS = {
    "grouped query attention, tied": {},
    "grouped query attention, untied": {"tie_word_embeddings": False},
    "one key-value head": {"num_key_value_heads": 1},
    "as many key-value heads": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "another rope and eps": {"rope_theta": 500000.0, "rms_norm_eps": 1e-3},
}


def tokens(spec: ModelSpec, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, spec.vocab_size, shape))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_names_are_those_of_hugging_face(changes: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = ModelSpec(**TINY | changes)
    model = llama.build(spec)
    llama.load_flat(model, llama.initial_parameters(spec, 5))
    fields = set(ModelSpec.model_fields) - {"rope_theta"}
    theirs: Any = LlamaForCausalLM(
        LlamaConfig(
            **spec.model_dump(include=fields),
            rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        )
    )
    ours = model.state_dict()
    missing = theirs.load_state_dict(ours, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if spec.tie_word_embeddings else [])
    theirs.tie_weights()
    x = tokens(spec, 3, spec.max_position_embeddings)
    with torch.no_grad():
        difference = model(x) - theirs(x).logits
    assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_the_flat_vector_holds_every_parameter_once_in_definition_order(tied: bool) -> None:
    spec = ModelSpec(**TINY, tie_word_embeddings=tied)
    model = llama.build(spec)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == llama.parameter_shapes(spec)
    assert list(shapes) == list(llama.parameter_shapes(spec))
    assert llama.num_parameters(spec) == spec.num_parameters == model.flat.numel()


def test_a_flat_vector_survives_the_model() -> None:
    spec = ModelSpec(**TINY)
    model = llama.build(spec)
    flat = np.arange(spec.num_parameters, dtype=np.float32)
    llama.load_flat(model, flat)
    assert model.flat.numpy().tobytes() == flat.tobytes()
    assert float(model.model.embed_tokens.weight.detach()[1, 0]) == spec.hidden_size


@pytest.mark.parametrize("flat", [np.zeros(7, np.float32), np.zeros(ModelSpec(**TINY).num_parameters)])
def test_a_vector_of_another_length_or_type_is_refused(flat: Any) -> None:
    with pytest.raises(InvalidDataError, match="parameters"):
        llama.load_flat(llama.build(ModelSpec(**TINY)), flat)


def test_the_loss_of_equal_logits_is_the_logarithm_of_the_vocabulary() -> None:
    spec = ModelSpec(**TINY)
    assert llama.loss(llama.build(spec), tokens(spec, 2, 25)).item() == pytest.approx(math.log(spec.vocab_size))


def test_a_token_sees_only_what_comes_before() -> None:
    spec = ModelSpec(**TINY)
    model = llama.build(spec)
    llama.load_flat(model, llama.initial_parameters(spec, 1))
    x = tokens(spec, 1, 20)
    changed = x.clone()
    changed[0, 12] = (changed[0, 12] + 1) % spec.vocab_size
    with torch.no_grad():
        before, after = model(x), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


def test_initial_weights_have_the_declared_spread() -> None:
    spec = ModelSpec(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
    model = llama.build(spec)
    llama.load_flat(model, llama.initial_parameters(spec, 9))
    weights = dict(model.named_parameters())
    for name, parameter in weights.items():
        weight = parameter.detach()
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        expected = 0.02 / (2.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
        assert float(weight.std()) == pytest.approx(expected, rel=0.05), name
        assert abs(float(weight.mean())) < 0.05 * expected, name


def test_initial_weights_are_the_same_bits_everywhere(golden: Callable[[str, dict[str, object]], None]) -> None:
    found = {}
    for name, spec in {
        "four layers": ModelSpec(num_hidden_layers=4),
        "untied": ModelSpec(**TINY, tie_word_embeddings=False),
    }.items():
        flat = llama.initial_parameters(spec, 1)
        found[name] = {
            "blake3": blake3(flat.astype("<f4").tobytes()).hexdigest(),
            "first": [float(x).hex() for x in flat[:4]],
        }
    golden("initial_parameters", {**found})


def test_another_seed_gives_other_weights() -> None:
    spec = ModelSpec(**TINY)
    assert not np.array_equal(llama.initial_parameters(spec, 1), llama.initial_parameters(spec, 2))


def test_large_tensors_are_drawn_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(**TINY)
    monkeypatch.setattr(llama, "_DRAW_ELEMENTS", 1000)
    flat = llama.initial_parameters(spec, 1)
    embedding = flat[: spec.vocab_size * spec.hidden_size]
    assert not np.array_equal(embedding[:900], embedding[1000:1900])


def test_flops_count_six_per_multiplying_parameter_and_the_attention() -> None:
    tied, untied = (ModelSpec(**TINY, tie_word_embeddings=tied) for tied in (True, False))
    assert llama.flops_per_token(tied) == 6 * tied.num_parameters + 12 * 2 * 32 * 24
    assert llama.flops_per_token(untied) == llama.flops_per_token(tied)
