"""Runs that start from a model that is there: a Hugging Face folder, or another run's checkpoint, with its ancestors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swarm_coordinator import backup, origins, overview
from swarm_coordinator.init import Options, initialise
from swarm_coordinator.origins import from_hugging_face, from_run
from swarm_coordinator.run_directory import RunDirectory
from swarm_node import exporting
from swarm_protocol import ancestry, huggingface
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import manifest_of
from swarm_protocol.errors import ConfigurationError, InvalidDataError
from swarm_protocol.model import llama
from swarm_protocol.spec import ModelSpec, ParentSpec, RunConfig, RunSpec, run_id_of
from swarm_protocol.tokenizing import tokenizer_json

MODEL = ModelSpec(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_theta=500000.0,
    rms_norm_eps=1e-6,
    initializer_range=0.25,
)
FLAT = llama.initial_parameters(MODEL, 3)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("All that is gold does not glitter.\n" * 200)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with `MODEL` and the tokenizer `bytes`."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(huggingface.config_of(MODEL, bos=None, eos=0)))
    (made / "tokenizer.json").write_bytes(tokenizer_json())
    write(made, {})
    return made


def write(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """The weights of `MODEL`, in the dtypes of PyTorch, with some tensors changed, added or left out."""
    from safetensors.torch import save_file

    named = huggingface.named(llama.parameter_shapes(MODEL), FLAT)
    tensors = {name: torch.from_numpy(tensor.copy()) for name, tensor in named.items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / huggingface.WEIGHTS)


def configure(folder: Path, **changes: Any) -> None:
    value = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: item for name, item in value.items() if item != "absent"}))


def start(where: Path, corpus: Path, origin: origins.Origin, toml: str = "") -> RunSpec:
    return initialise(Options(where, RunConfig.from_toml(toml), [corpus], auditors=1, origin=origin))


def test_a_run_starts_with_the_folders_bits_and_its_tokenizer(tmp_path: Path, folder: Path, corpus: Path) -> None:
    spec = start(tmp_path / "run", corpus, from_hugging_face(folder))
    assert spec.checkpoint == Checkpoint.initial(FLAT).root.hex()
    assert (spec.model, spec.data.tokenizer, spec.parent) == (MODEL, "bytes", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_become_floats_exactly(dtype: torch.dtype, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    halves = {name: tensor.to(dtype) for name, tensor in load_file(folder / huggingface.WEIGHTS).items()}
    save_file(halves, folder / huggingface.WEIGHTS)
    wanted = np.concatenate([halves[name].to(torch.float64).numpy().ravel() for name in llama.parameter_shapes(MODEL)])
    assert np.array_equal(from_hugging_face(folder).parameters.astype(np.float64), wanted)


def test_shards_and_a_head_that_is_tied_and_there_twice_are_read(folder: Path) -> None:
    embedding = "model.embed_tokens.weight"
    write(folder, {"lm_head.weight": torch.from_numpy(FLAT[: 256 * 32].reshape(256, 32).copy())})
    assert from_hugging_face(folder).parameters.tobytes() == FLAT.tobytes()
    (folder / huggingface.WEIGHTS).unlink()
    huggingface.write_weights(folder, huggingface.named(llama.parameter_shapes(MODEL), FLAT), shard_bytes=40_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert from_hugging_face(folder).parameters.tobytes() == FLAT.tobytes()
    index = json.loads((folder / huggingface.INDEX).read_text())
    index["weight_map"][embedding] = "../model/model-00001-of-00002.safetensors"
    (folder / huggingface.INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match="no safetensors file in"):
        from_hugging_face(folder)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "not a LlamaForCausalLM"),
    "biases of attention": ({"attention_bias": True}, "attention_bias is set"),
    "biases of the MLP": ({"mlp_bias": True}, "mlp_bias is set"),
    "scaled positions": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' rotary"),
    "scaled positions, as transformers 5 writes": ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn' rotary"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "another head size": ({"head_dim": 16}, "head_dim is 16, not hidden_size / num_attention_heads = 8"),
    "a sliding window": ({"sliding_window": 32}, "sliding_window is set"),
    "quantised weights": ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
    "heads that are turned in part": ({"partial_rotary_factor": 0.5}, "only a part of each head"),
    "too many parameters": ({"vocab_size": 1 << 20, "hidden_size": 16384, "head_dim": None}, "at most"),
    "no size": ({"hidden_size": "absent"}, "hidden_size is missing"),
    "heads that do not fit": ({"num_key_value_heads": 3}, "must be a multiple"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_model_that_ours_cannot_be_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    configure(folder, **changes)
    with pytest.raises(ConfigurationError, match=message):
        from_hugging_face(folder)


def test_what_a_config_leaves_out_is_a_llamas_default(folder: Path) -> None:
    names = ("max_position_embeddings", "rope_theta", "rope_parameters", "rms_norm_eps", "num_key_value_heads")
    configure(folder, **dict.fromkeys(names, "absent"))
    found = huggingface.read_config(folder)
    assert (found.max_position_embeddings, found.rope_theta, found.rms_norm_eps) == (2048, 10000.0, 1e-6)
    assert found.num_key_value_heads == found.num_attention_heads


BAD_WEIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "one is missing": ({"model.norm.weight": None}, "lacks 1 tensors of its model, model.norm.weight first"),
    "one more": ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "which our Llama does not have"),
    "another shape": ({"model.norm.weight": torch.ones(31)}, r"is \[31\], and config.json makes it \[32\]"),
    "integers": ({"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "is I8; a run starts from"),
    "more bits than we have": ({"model.norm.weight": torch.ones(32, dtype=torch.float64)}, "is F64; a run"),
    "not finite": ({"model.norm.weight": torch.full((32,), torch.inf)}, "not finite"),
    "a head of its own": ({"lm_head.weight": torch.ones(256, 32)}, "is not the embedding"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_weights_that_are_not_the_models_are_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    write(folder, changes)
    with pytest.raises(ConfigurationError, match=message):
        from_hugging_face(folder)


def test_pickles_and_damaged_files_are_not_read(folder: Path) -> None:
    path = folder / huggingface.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        from_hugging_face(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match=r"pytorch_model\.bin is a pickle, which can run programs"):
        from_hugging_face(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match=r"no tokenizer\.json"):
        from_hugging_face(folder)


def test_the_toml_may_only_shorten_sequences(tmp_path: Path, folder: Path, corpus: Path) -> None:
    origin = from_hugging_face(folder)
    toml = "[model]\nhidden_size = 32\nmax_position_embeddings = 16"
    assert start(tmp_path / "short", corpus, origin, toml).model == MODEL.model_copy(
        update={"max_position_embeddings": 16}
    )
    for wrong, message in (
        ("[model]\nhidden_size = 64", "model.hidden_size is 64, but .* has 32: leave it out"),
        ("[model]\nmax_position_embeddings = 128", "goes to 64"),
        (f'[data]\ntokenizer = "{corpus}"', "is not the tokenizer of"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            start(tmp_path / "run", corpus, origin, wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt", "model", "short"]


def test_a_child_seals_its_parent_and_shows_all_ancestors(
    tmp_path: Path, folder: Path, corpus: Path, serving: Callable[..., AbstractAsyncContextManager[Any]]
) -> None:
    first = start(tmp_path / "first", corpus, from_hugging_face(folder))
    second = start(tmp_path / "second", corpus, from_run(str(tmp_path / "first"), None))
    assert second.parent is not None
    assert (second.parent.run, second.parent.round, second.parent.root) == (first.run_id.hex(), 0, first.checkpoint)
    assert second.checkpoint == first.checkpoint

    async def third() -> RunSpec:
        cast = SimpleNamespace(home=RunDirectory(tmp_path / "second"), clock=lambda: 1_800_000_000_000)
        async with serving(cast, listen=True) as api:
            origin = await asyncio.to_thread(from_run, str(api.http.base_url), 0)
            with pytest.raises(ConfigurationError, match="no checkpoint 1 yet"):
                await asyncio.to_thread(from_run, str(api.http.base_url), 1)
            return await asyncio.to_thread(start, tmp_path / "third", corpus, origin)

    spec = asyncio.run(third())
    assert spec.checkpoint == first.checkpoint

    async def shown() -> tuple[dict[str, Any], list[bytes]]:
        home = RunDirectory(tmp_path / "third")
        async with serving(SimpleNamespace(home=home, clock=lambda: 1_800_000_000_000)) as api:
            path = f"/v1/runs/{spec.run_id.hex()}"
            answer = (await api.http.get(f"{path}/ancestors")).json()
            assert (await api.http.get(path)).json()["ancestors"] == answer["ancestors"]
            blobs = [await api.http.get(f"{path}/chunks/{one['spec']}") for one in answer["ancestors"]]
            return answer, [blob.content for blob in blobs]

    answer, blobs = asyncio.run(shown())
    names = [(one["run_id"], one["round"], one["root"]) for one in answer["ancestors"]]
    assert names == [(one.run_id.hex(), 0, first.checkpoint) for one in (second, first)]
    assert [run_id_of(blob) for blob in blobs] == [second.run_id, first.run_id]
    page = overview.page(overview.of_directory(RunDirectory(tmp_path / "third")))
    assert f"parent       demo {second.run_id.hex()}, checkpoint 0\nbefore that  demo {first.run_id.hex()}" in page
    backup.backup(RunDirectory(tmp_path / "third"), tmp_path / "backup.tar", objects=True)
    backup.restore(tmp_path / "backup.tar", tmp_path / "restored")
    assert RunDirectory(tmp_path / "restored").ancestors() == RunDirectory(tmp_path / "third").ancestors()


def test_adapters_are_trained_on_the_folders_model_and_a_child_starts_from_the_merged_one(
    tmp_path: Path, folder: Path, corpus: Path
) -> None:
    toml = 'trainable = "lora"\n[training.optimizer]\nname = "adamw"'
    spec = start(tmp_path / "adapters", corpus, from_hugging_face(folder), toml)
    assert spec.trunk == manifest_of(FLAT).root.hex()
    assert spec.num_trainable < MODEL.num_parameters
    child = start(tmp_path / "child", corpus, from_run(str(tmp_path / "adapters"), None))
    assert child.checkpoint == Checkpoint.initial(FLAT).root.hex()  # the adapters that a run starts with change nothing
    assert child.parent is not None
    assert child.parent.root == spec.checkpoint


def test_a_chain_of_ancestors_is_checked_link_by_link(run_spec: RunSpec) -> None:
    child = RunSpec.model_validate({**run_spec.model_dump(), "parent": parent_of(run_spec).model_dump()})
    grandchild = parent_of(child)
    found = ancestry.chain(grandchild, [child.encode(), run_spec.encode()])
    assert [one.run for one in found] == [child.run_id, run_spec.run_id]
    assert ancestry.of(child, ancestry.encode(found[1:])) == found[1:]
    for specs, message in (
        ([child.encode()], "is missing"),
        ([run_spec.encode()], "does not hash to its id"),
        ([child.encode(), run_spec.encode(), b""], "more specs than"),
        ([b"junk"], "does not hash"),
    ):
        with pytest.raises(InvalidDataError, match=message):
            ancestry.chain(grandchild, specs)
    assert ancestry.chain(None, []) == ()


def parent_of(spec: RunSpec) -> ParentSpec:
    return ParentSpec(run=spec.run_id.hex(), round=2, root=spec.checkpoint)


def test_a_run_that_was_exported_starts_again_from_the_same_root(
    tmp_path: Path, folder: Path, corpus: Path, serving: Callable[..., AbstractAsyncContextManager[Any]]
) -> None:
    first = start(tmp_path / "first", corpus, from_hugging_face(folder))

    async def export() -> None:
        cast = SimpleNamespace(home=RunDirectory(tmp_path / "first"), clock=lambda: 1_800_000_000_000)
        async with serving(cast, listen=True) as api:
            options = exporting.Options(str(api.http.base_url), tmp_path / "out", tmp_path / "cache")
            await asyncio.to_thread(exporting.export, options)

    asyncio.run(export())
    again = start(tmp_path / "again", corpus, from_hugging_face(tmp_path / "out"))
    assert (again.checkpoint, again.model, again.data) == (first.checkpoint, first.model, first.data)
