"""Models as Hugging Face folders: `config.json` and safetensors, out and in; and adapters for peft. Weights keep their bits.

Out, weights are float32 under the names of `LlamaForCausalLM`, in shards with an index where they are large. In, float32,
bfloat16 and float16 become float32 exactly. Our Llama is the plain one: a folder whose model is anything else is refused, and
so is one whose weights are not in safetensors, since other formats are programs. Shapes are checked before memory is taken.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from swarm_protocol import tokenizing
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.spec import ModelSpec, TrainableSpec, explain

F32 = npt.NDArray[np.float32]

INSTALL = "pip install 'swarm-node[export]'"
SHARD_BYTES = 5_000_000_000
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_MAX_JSON_BYTES = 64 << 20
_FILE_NAME = re.compile(r"[\w][\w.-]*\.safetensors")
_DTYPES = ("F32", "BF16", "F16")
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
"""What a `LlamaConfig` has where its file says nothing."""


# config.json


def config_of(spec: ModelSpec, *, bos: int | None, eos: int | None) -> dict[str, Any]:
    """The `config.json` of a model whose tokenizer has these tokens at the ends of a text."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "rms_norm_eps": spec.rms_norm_eps,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "initializer_range": spec.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": None,
    }


def adapter_config_of(trainable: TrainableSpec, base: str) -> dict[str, Any]:
    """The `adapter_config.json` of adapters on the model that is called `base`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": trainable.r,
        "lora_alpha": trainable.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(trainable.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def read_config(folder: Path) -> ModelSpec:
    """The model of a folder's `config.json`.

    Raises:
        ConfigurationError: there is none, or its model has something that our Llama does not have.
    """
    config = _json(folder / "config.json")
    wrong = list(_differences(config))
    if wrong:
        raise ConfigurationError(f"{folder / 'config.json'}: {'; '.join(wrong)}. A run trains the plain Llama only")
    rope = config.get("rope_parameters") or {}
    values = {name: config.get(name) for name in ModelSpec.model_fields}
    values["rope_theta"] = rope.get("rope_theta", config.get("rope_theta"))
    values = {name: _DEFAULTS.get(name) if value is None else value for name, value in values.items()}
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    try:
        spec = ModelSpec.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(explain(error, str(folder / "config.json"))) from error
    if config.get("head_dim") not in (None, spec.head_dim):
        raise ConfigurationError(
            f"{folder / 'config.json'}: head_dim is {config['head_dim']!r:.20}, not hidden_size / num_attention_heads"
            f" = {spec.head_dim}. A run trains the plain Llama only"
        )
    return spec


def _differences(config: Mapping[str, Any]) -> Iterator[str]:
    """What of a config our Llama cannot do, each as a sentence."""
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if config.get("model_type") != "llama" or architectures != ["LlamaForCausalLM"]:
        yield f"the model is {config.get('model_type')!r:.40} with {architectures!r:.80}, not a LlamaForCausalLM"
    for name in _NEEDED:
        if config.get(name) is None:
            yield f"{name} is missing"
    if config.get("hidden_act", "silu") != "silu":
        yield f"hidden_act is {config['hidden_act']!r:.40}, not 'silu'"
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            yield f"{name} is set: its layers have biases"
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name)
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind not in (None, "default"):
            yield f"{name} asks for {kind!r:.40} rotary embeddings, not the default ones"
    rope = config.get("rope_parameters")
    for there in (config, rope if isinstance(rope, dict) else {}):
        if there.get("partial_rotary_factor") not in (None, 1, 1.0):
            yield "partial_rotary_factor is set: it turns only a part of each head"
    for name in ("sliding_window", "quantization_config"):
        if config.get(name) is not None:
            yield f"{name} is set"


def read_tokenizer(folder: Path) -> bytes | None:
    """The `tokenizer.json` of a folder; None where that is the tokenizer `bytes`, as an export has it.

    Raises:
        ConfigurationError: there is none, or it is too large.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ConfigurationError(
            f"{folder} has no tokenizer.json; load its tokenizer with AutoTokenizer and save it there with save_pretrained"
        )
    tokenizer = _json(path)
    return None if tokenizer == json.loads(tokenizing.tokenizer_json()) else path.read_bytes()


# Weights, out


def require_safetensors() -> None:
    """Raises `ConfigurationError` where the package for the weights is not here."""
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(f"weights in safetensors need the package safetensors: {INSTALL}") from error


def write_weights(folder: Path, tensors: Mapping[str, F32], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors, each float32, as `model.safetensors`; as several files with an index where they are larger than
    `shard_bytes` together. No more is in memory than a shard beyond what the tensors take themselves."""
    shards: list[dict[str, F32]] = [{}]
    size_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and size_bytes + tensor.nbytes > shard_bytes:
            shards.append({})
            size_bytes = 0
        shards[-1][name] = tensor
        size_bytes += tensor.nbytes
    if len(shards) == 1:
        _save(shards[0], folder / WEIGHTS)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    metadata = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n")


def write_adapters(folder: Path, tensors: Mapping[str, F32]) -> None:
    """Write adapters as peft names them."""
    renamed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    _save(renamed, folder / "adapter_model.safetensors")


def _save(tensors: Mapping[str, F32], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o644)  # the package lets nobody else read it


def named(shapes: Mapping[str, tuple[int, ...]], flat: F32) -> dict[str, F32]:
    """A flat vector as one view per tensor."""
    found, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        found[name] = flat[at : at + size].reshape(shape)
        at += size
    return found


# Weights, in


def read_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> F32:
    """The weights of a folder as one flat vector, float32, in the order of `shapes`. A head that is tied may be there twice.

    Raises:
        ConfigurationError: they are not in safetensors, not of this model, not floats of 16 or 32 bits, or not finite.
    """
    require_safetensors()
    from safetensors import SafetensorError, safe_open

    files = _weight_files(folder)
    where: dict[str, Path] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (it is no dictionary)
                    part = opened.get_slice(name)
                    _require_tensor(name, tuple(part.get_shape()), part.get_dtype(), shapes, where, file)
                    where[name] = file
        missing = [name for name in shapes if name not in where]
        if missing:
            raise ConfigurationError(f"{folder} lacks {len(missing)} tensors of its model, {missing[0]} first")
        flat = np.empty(sum(math.prod(shape) for shape in shapes.values()), np.float32)
        views = named(shapes, flat)
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in views:
                        views[name][...] = opened.get_tensor(name).float().numpy()
                        if not np.isfinite(views[name]).all():
                            raise ConfigurationError(f"{file}: {name} is not finite; the model is damaged")
        if _TIED in where and _TIED not in shapes:
            with safe_open(where[_TIED], framework="pt") as opened:
                if not np.array_equal(opened.get_tensor(_TIED).float().numpy(), views[_EMBEDDING]):
                    raise ConfigurationError(
                        f"{where[_TIED]}: {_TIED} is not the embedding, though config.json says tie_word_embeddings"
                    )
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{folder}: its safetensors cannot be read: {error}") from error
    return flat


_TIED, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def _require_tensor(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    shapes: Mapping[str, tuple[int, ...]],
    seen: Mapping[str, Path],
    file: Path,
) -> None:
    wanted = shapes.get(_EMBEDDING if name == _TIED and _TIED not in shapes else name)
    if name.endswith(".rotary_emb.inv_freq"):
        return  # old folders have the frequencies, which the config gives
    if wanted is None:
        raise ConfigurationError(f"{file} has {name:.200}, which our Llama does not have")
    if name in seen:
        raise ConfigurationError(f"{name} is in {seen[name].name} and in {file.name}; one of them is left over")
    if shape != wanted:
        raise ConfigurationError(f"{file}: {name} is {list(shape)}, and config.json makes it {list(wanted)}")
    if dtype not in _DTYPES:
        raise ConfigurationError(f"{file}: {name} is {dtype}; a run starts from {', '.join(_DTYPES)}")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order: those of the index, or the only one."""
    if (folder / INDEX).exists():
        names = _json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ConfigurationError(f"{folder / INDEX} has no weight_map")
        files = sorted({str(name) for name in names.values()})
        for name in files:
            if not _FILE_NAME.fullmatch(name) or not (folder / name).is_file():
                raise ConfigurationError(
                    f"{folder / INDEX} names {name!r:.80}, which is no safetensors file in {folder}"
                )
        return [folder / name for name in files]
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    hint = ""
    if others:
        hint = (
            f". {others[0]} is a pickle, which can run programs: have the one who made it save it again with"
            " save_pretrained, which writes safetensors"
        )
    raise ConfigurationError(f"{folder} has no {WEIGHTS}{hint}")


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ConfigurationError(f"{path} is too large for what it should be")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} is not a JSON object")
    return value
