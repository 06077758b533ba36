"""A run's model taken home: transformers loads it, its weights are the checkpoint's bits, and its logits are ours."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swarm_coordinator.app import create_app
from swarm_coordinator.init import Options as NewRun
from swarm_coordinator.init import initialise
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.service import open_service
from swarm_node import downloads, exporting, writing
from swarm_node.downloads import Download
from swarm_protocol import huggingface
from swarm_protocol.adapters import trainable_shapes
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.files import new_folder
from swarm_protocol.model import llama
from swarm_protocol.spec import RunConfig, RunSpec

LINE = "All that is gold does not glitter, naïve café.\n"
TOML = """
name = "tiny"
[model]
vocab_size = {vocab_size}
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 64
rope_theta = 500000.0
tie_word_embeddings = {tied}
initializer_range = 0.2
[data]
tokenizer = "{tokenizer}"
"""
LORA = """
[trainable]
kind = "lora"
r = 4
alpha = 8
targets = ["q_proj", "v_proj", "down_proj"]
[training.optimizer]
name = "adamw"
"""
TOLERANCE = 1e-5
"""On logits of about 1: transformers' kernels round in another order."""


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with merges and two special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([LINE], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> dict[str, Path]:
    """Runs that nobody has joined: their directories by name."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = folder / "corpus.txt"
    corpus.write_text(LINE * 400)
    kinds = {
        "tied": {"tied": "true", "vocab_size": 256, "tokenizer": "bytes"},
        "untied": {"tied": "false", "vocab_size": 256, "tokenizer": "bytes"},
        "with a tokenizer": {"tied": "true", "vocab_size": 300, "tokenizer": tokenizer_file},
    }
    toml = {name: TOML.format(**settings) for name, settings in kinds.items()}
    toml["lora"] = toml["untied"] + LORA
    toml["lora, native"] = 'numerics = "native"' + toml["lora"]
    for name, text in toml.items():
        config = RunConfig.from_toml(text)
        initialise(NewRun(folder / name, config, [corpus], auditors=1))
    return {name: folder / name for name in toml}


@pytest.fixture(scope="module")
def addresses(
    runs: dict[str, Path], listening: Callable[..., AbstractAsyncContextManager[str]]
) -> Iterator[dict[str, str]]:
    """The addresses of these runs, by name, at a coordinator in another thread."""
    there: queue.Queue[dict[str, str]] = queue.Queue()
    over = threading.Event()

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            opened = [open_service(RunDirectory(home), lambda: 1_800_000_000_000) for home in runs.values()]
            services = [await stack.enter_async_context(one) for one in opened]
            url = await stack.enter_async_context(listening(create_app(*services)))
            named = zip(runs, services, strict=True)
            there.put({name: f"{url}/v1/runs/{service.spec.run_id.hex()}" for name, service in named})
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        yield there.get(timeout=60)
    finally:
        over.set()
        thread.join(timeout=60)


@pytest.fixture
def export(tmp_path: Path, addresses: dict[str, str]) -> Callable[..., Download]:
    """Exports a run to a new folder below `tmp_path`."""

    def take_home(run: str = "tied", name: str = "model", **options: Any) -> Download:
        return exporting.export(exporting.Options(addresses[run], tmp_path / name, tmp_path / "cache", **options))

    return take_home


def their_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def their_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def assert_same_model(theirs: Any, spec: RunSpec, parameters: Any) -> None:
    """Equal weights, bit by bit, and equal logits within `TOLERANCE`."""
    weights = dict(theirs.named_parameters())
    for name, tensor in huggingface.named(llama.parameter_shapes(spec.model), parameters).items():
        assert weights.pop(name).detach().numpy().tobytes() == tensor.tobytes(), name
    assert not weights
    assert logits_apart(theirs, spec, parameters) < TOLERANCE


def logits_apart(theirs: Any, spec: RunSpec, parameters: Any) -> float:
    """How far the logits of another model are from ours with these parameters, at most; ours are about 1."""
    ours = llama.build(spec.model)
    llama.load_flat(ours, parameters)
    tokens = torch.from_numpy(np.random.default_rng(3).integers(0, spec.model.vocab_size, (2, 64)))
    with torch.no_grad():
        logits = ours(tokens)
        difference = float((logits - theirs(tokens).logits).abs().max())
    assert 0.1 < float(logits.abs().max()) < 10.0
    return difference


@pytest.mark.parametrize("run", ["tied", "untied"])
def test_transformers_loads_the_model_with_our_bits_and_our_logits(
    run: str, tmp_path: Path, export: Callable[..., Download]
) -> None:
    found = export(run)
    spec = found.spec
    assert Checkpoint.initial(found.checkpoint.parameters).root.hex() == spec.checkpoint
    assert_same_model(their_model(tmp_path / "model"), spec, found.checkpoint.parameters)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert huggingface.read_config(tmp_path / "model") == spec.model
    their_model(tmp_path / "model").save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert huggingface.read_config(tmp_path / "theirs") == spec.model
    shapes = llama.parameter_shapes(spec.model)
    assert huggingface.read_weights(tmp_path / "theirs", shapes).tobytes() == found.checkpoint.parameters.tobytes()


def test_the_tokenizer_of_bytes_is_loaded_as_one(tmp_path: Path, export: Callable[..., Download]) -> None:
    export()
    theirs = their_tokenizer(tmp_path / "model")
    text = "naïve  'll\n\n Ā \x00 日本 \U0001f600 end "
    assert theirs(text)["input_ids"] == list(text.encode())
    assert theirs.decode(list(text.encode())) == text


def test_a_tokenizer_file_is_taken_home_with_its_ends(
    tmp_path: Path, tokenizer_file: Path, export: Callable[..., Download]
) -> None:
    from tokenizers import Tokenizer

    export("with a tokenizer")
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    theirs, ours = their_tokenizer(tmp_path / "model"), Tokenizer.from_file(str(tokenizer_file))
    assert theirs(LINE)["input_ids"] == ours.encode(LINE).ids
    assert (theirs.bos_token, theirs.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    model = their_model(tmp_path / "model")
    assert (model.config.bos_token_id, model.config.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert model.generation_config.eos_token_id == theirs.eos_token_id


def test_large_weights_are_cut_into_shards_with_an_index(tmp_path: Path, export: Callable[..., Download]) -> None:
    found = export(shard_bytes=40_000)
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 44_000 for path in shards)
    index = json.loads((tmp_path / "model" / huggingface.INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * found.spec.model.num_parameters
    assert_same_model(their_model(tmp_path / "model"), found.spec, found.checkpoint.parameters)


def test_the_weights_alone_are_float32_under_their_names(tmp_path: Path, export: Callable[..., Download]) -> None:
    from safetensors.numpy import load_file

    found = export(format="safetensors")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["README.md", "model.safetensors"]
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == llama.parameter_shapes(found.spec.model)
    assert sum(tensor.nbytes for tensor in tensors.values()) == found.checkpoint.parameters.nbytes


def with_adapters(found: Download) -> Download:
    """The same with adapters that change something: those that a run starts with are zero."""
    trained = np.random.default_rng(5).normal(0.0, 0.1, found.spec.num_trainable).astype(np.float32)
    return replace(found, checkpoint=replace(found.checkpoint, parameters=trained))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize(("run", "tolerance"), [("lora", 2e-3), ("lora, native", TOLERANCE)])
def test_peft_loads_the_adapters_with_our_logits(
    run: str, tolerance: float, tmp_path: Path, export: Callable[..., Download]
) -> None:
    from peft import PeftModel

    found = with_adapters(export(run, "merged"))
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == ["model.safetensors"]
    for name in ("peft", "hf"):
        options = exporting.Options("http://localhost", tmp_path / name, tmp_path, format=name)
        with new_folder(options.folder) as folder:
            exporting.write(folder, found, options)
    full = found.full_parameters()
    assert_same_model(their_model(tmp_path / "hf"), found.spec, full)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "peft" / "base")
    base = their_model(tmp_path / "peft" / "base")
    assert_same_model(base, found.spec, found.trunk)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    assert logits_apart(theirs, found.spec, full) < tolerance
    assert logits_apart(theirs, found.spec, found.trunk) > 0.05
    weights = {name.replace(".default", ""): tensor for name, tensor in theirs.named_parameters() if "lora" in name}
    ours = huggingface.named(trainable_shapes(found.spec.model, found.spec.trainable), found.checkpoint.parameters)
    assert {name.removeprefix("base_model.model.") for name in weights} == set(ours)
    for name, tensor in ours.items():
        assert weights[f"base_model.model.{name}"].detach().numpy().tobytes() == tensor.tobytes()


def test_adapters_are_exported_alone_and_by_what_their_base_is_called(
    tmp_path: Path, export: Callable[..., Download]
) -> None:
    from safetensors.numpy import load_file

    found = export("lora", "alone", format="safetensors")
    tensors = load_file(tmp_path / "alone" / "model.safetensors")
    assert set(tensors) == set(trainable_shapes(found.spec.model, found.spec.trainable))
    export("lora", "merged", format="safetensors", merged=True)
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(llama.parameter_shapes(found.spec.model))
    export("lora", "named", format="peft", base="somebody/llama")
    assert sorted(path.name for path in (tmp_path / "named").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert "somebody/llama" in (tmp_path / "named" / "adapter_config.json").read_text()
    with pytest.raises(ConfigurationError, match="trains no adapters"):
        export("tied", "none", format="peft")
    for wrong in ({"format": "hf", "merged": False}, {"format": "peft", "merged": True}, {"base": "x"}):
        with pytest.raises(ConfigurationError, match="--"):
            exporting.Options("http://localhost", tmp_path, tmp_path, **wrong)


def test_the_card_says_what_it_is_and_how_to_check_it(tmp_path: Path, export: Callable[..., Download]) -> None:
    spec = export().spec
    card = (tmp_path / "model" / "README.md").read_text()
    for word in (spec.run_id.hex(), spec.checkpoint, spec.data.root, "swarm-node verify run http://", "round | 0 of 6"):
        assert word in card


def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, export: Callable[..., Download], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "card", fail)
    with pytest.raises(ConfigurationError, match="No space left"):
        export()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(ConfigurationError, match="not empty"):
        export()
    with pytest.raises(ConfigurationError, match="no checkpoint 1 yet"):
        export(name="other", round=1)


def test_a_checkpoint_is_fetched_once_and_again_where_it_is_damaged(
    tmp_path: Path, export: Callable[..., Download]
) -> None:
    assert [export(name=f"model-{number}").cached for number in range(2)] == [False, True]
    (path,) = (tmp_path / "cache").glob("*/checkpoint-*")
    data = bytearray(path.read_bytes())
    data[1234] ^= 1
    path.write_bytes(data)
    assert [export(name=f"model-{number}").cached for number in (3, 4)] == [False, True]
    with downloads._alone(path.parent), pytest.raises(ConfigurationError, match="another swarm-node downloads"):
        export(name="model-5")


def test_sizes_of_shards_are_read_as_people_write_them() -> None:
    assert [exporting.size_bytes(text) for text in ("5GB", "200 mb", "7", "3kb", "10B")] == [
        5_000_000_000, 200_000_000, 7, 3000, 10,
    ]  # fmt: skip
    for text in ("", "0", "GB", "-1GB", "1.5GB"):
        with pytest.raises(ConfigurationError, match="--shard-size"):
            exporting.size_bytes(text)


def test_the_model_writes_the_same_with_the_same_seed(
    tmp_path: Path, runs: dict[str, Path], addresses: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = RunDirectory(runs["tied"]).spec()

    def sample(**options: Any) -> str:
        wanted = {"prompt": "All that", "tokens": 12, "seed": 5} | options
        writing.sample(writing.Options(addresses["tied"], cache=tmp_path / "cache", **wanted))
        return capsys.readouterr().out

    shown = sample()
    assert shown.startswith("All that")
    assert shown == sample()
    assert shown != sample(seed=6)
    answer = json.loads(sample(as_json=True))
    assert (answer["run"], answer["root"], answer["round"]) == (spec.run_id.hex(), spec.checkpoint, 0)
    assert len(answer["tokens"]) <= 12
    assert "All that" + writing.harmless(answer["text"]) + "\n" == shown
    assert sample(prompt="", tokens=1).endswith("\n")


def test_the_cache_keeps_the_checkpoints_used_last(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / f"checkpoint-{number}"
        path.touch()
        downloads._forget(tmp_path, path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
