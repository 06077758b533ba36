"""`swarm-node export`: a run's model as a folder that other software loads, whole or not at all.

    hf            config.json, weights, tokenizer, generation_config.json, README.md: what `from_pretrained` takes
    safetensors   the weights alone, and README.md: of what the run trains, or of all with its adapters merged
    peft          a run's adapters as what `PeftModel.from_pretrained` takes, README.md, and in base/ the model below them

The weights are the checkpoint's own bits, in float32. Names of files are fixed here; none comes from the network.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm_node.downloads import Download, download
from swarm_protocol import __version__, huggingface, tokenizing
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.fetch import Float32
from swarm_protocol.files import new_folder, require_new
from swarm_protocol.http import persist

PATIENCE_S = 60.0
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Options:
    """`round` None is the newest checkpoint; `shard_bytes` the most that a file of weights holds.

    `merged` None is what the format says: True for hf, False otherwise. `base` is the name of the model below the adapters
    (peft); None has it written beside them.
    """

    url: str
    folder: Path
    cache: Path
    format: str = "hf"
    round: int | None = None
    shard_bytes: int = huggingface.SHARD_BYTES
    merged: bool | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        if self.format == "hf" and self.merged is False:
            raise ConfigurationError("--format hf writes the merged model; for the adapters alone: --format peft")
        if self.format == "peft" and self.merged:
            raise ConfigurationError("--format peft writes the adapters alone; for the merged model: --format hf")
        if self.format != "peft" and self.base is not None:
            raise ConfigurationError("--base names the model below the adapters of --format peft")


def size_bytes(text: str) -> int:
    """A size such as 5GB or 200MB, in decimal units.

    Raises:
        ConfigurationError: it is none.
    """
    match = re.fullmatch(r"(\d{1,15})\s*([KMG]?B)?", text.strip().upper())
    if match is None or not int(match[1]):
        raise ConfigurationError(f"--shard-size takes a size such as 5GB or 200MB, not {text!r:.40}")
    return int(match[1]) * _UNITS["" if match[2] in (None, "B") else match[2]]


def export(options: Options) -> Download:
    """Write the folder.

    Raises:
        SwarmError: it is not written.
    """
    huggingface.require_safetensors()
    require_new(options.folder)
    found = asyncio.run(_download(options))
    with new_folder(options.folder) as folder:
        write(folder, found, options)
    return found


async def _download(options: Options) -> Download:
    async with await persist(lambda: CoordinatorClient.connect(options.url), deadline_s=PATIENCE_S) as client:
        return await download(client, options.cache, options.round)


def write(folder: Path, found: Download, options: Options) -> None:
    """Fill a folder with what `options.format` asks for."""
    from swarm_protocol import adapters
    from swarm_protocol.model.llama import parameter_shapes

    spec = found.spec
    match options.format:
        case "hf":
            _write_model(folder, found, found.full_parameters(), options)
        case "peft":
            _write_adapters(folder, found, options)
        case _:
            shapes, flat = adapters.trainable_shapes(spec.model, spec.trainable), found.checkpoint.parameters
            if options.merged:
                shapes, flat = parameter_shapes(spec.model), found.full_parameters()
            huggingface.write_weights(folder, huggingface.named(shapes, flat), shard_bytes=options.shard_bytes)
    (folder / "README.md").write_text(card(found, options), encoding="utf-8")


def _write_adapters(folder: Path, found: Download, options: Options) -> None:
    """What peft loads, and unless it has a name already, the model below."""
    from swarm_protocol import adapters

    spec = found.spec
    if spec.trainable.kind != "lora" or found.trunk is None:
        raise ConfigurationError(f"this run trains no adapters ({spec.trainable.kind}); export it with --format hf")
    tensors = huggingface.named(adapters.trainable_shapes(spec.model, spec.trainable), found.checkpoint.parameters)
    huggingface.write_adapters(folder, tensors)
    base = options.base or str(options.folder.absolute() / "base")
    _write_json(folder / "adapter_config.json", huggingface.adapter_config_of(spec.trainable, base))
    if options.base is None:
        (folder / "base").mkdir()
        _write_model(folder / "base", found, found.trunk, options)


def _write_model(folder: Path, found: Download, parameters: Float32, options: Options) -> None:
    """Everything that `from_pretrained` takes, with these weights."""
    from swarm_protocol.model.llama import parameter_shapes

    model = found.spec.model
    tensors = huggingface.named(parameter_shapes(model), parameters)
    huggingface.write_weights(folder, tensors, shard_bytes=options.shard_bytes)
    tokenizer = tokenizing.Tokenizer(found.tokenizer)
    special: dict[str, str] = {}
    bos = None
    if found.tokenizer is not None:
        inner = tokenizing.read(found.tokenizer)
        for role, names in (("bos_token", tokenizing.BEGINNING_OF_TEXT), ("eos_token", tokenizing.END_OF_TEXT)):
            name = tokenizing.special(inner, names)
            if name is not None:
                special[role] = name
        bos = inner.token_to_id(special["bos_token"]) if "bos_token" in special else None
    (folder / "tokenizer.json").write_bytes(tokenizing.tokenizer_json() if found.tokenizer is None else found.tokenizer)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            **special,
        },
    )
    _write_json(folder / "config.json", huggingface.config_of(model, bos=bos, eos=tokenizer.end))
    ends = {"bos_token_id": bos, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end}
    _write_json(folder / "generation_config.json", {name: token for name, token in ends.items() if token is not None})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def card(found: Download, options: Options) -> str:
    """The model card. What the run's owner chose to write, its name, is letters, digits and spaces by the spec's rule."""
    spec, sealed = found.spec, found.sealed
    run = spec.run_id.hex()
    name = re.sub(r"[^\w .:-]", "", spec.name)
    url = options.url.partition("/v1/runs/")[0].rstrip("/") + f"/v1/runs/{run}"
    parent = ""
    if spec.parent is not None:
        parent = f"| parent | round {spec.parent.round} of run `{spec.parent.run}`, checkpoint `{spec.parent.root}` |\n"
    trained = f"{spec.trainable.kind}, {spec.num_trainable:,} parameters"
    if spec.trainable.kind == "lora":
        where = ", ".join(spec.trainable.targets)
        trained += f", rank {spec.trainable.r}, alpha {spec.trainable.alpha}, on {where}"
    return f"""---
library_name: {"peft" if options.format == "peft" else "transformers"}
pipeline_tag: text-generation
tags: [swarm-node]
---

# {name}

A Llama model of {spec.model.num_parameters:,} parameters, trained by volunteers with swarm-node, whose every contribution
can be checked by replaying it.

| | |
| --- | --- |
| run | `{run}` |
| round | {sealed.round} of {spec.rounds.count} |
| checkpoint | `{sealed.root.hex()}` |
| trained | {trained} |
| trained on | {sealed.tokens:,} tokens were given out in these rounds |
| data | `{spec.data.root}` |
| numerics | {spec.numerics} |
{parent}| exported by | swarm-node {__version__}, format {options.format}, float32 |

The checkpoint is a BLAKE3 root over the weights and the outer momentum; `docs/protocol.md` of swarm-node defines it.
To check the run's log, and some of its contributions by replaying them:

```sh
swarm-node verify log {url}
swarm-node verify run {url} --sample 5
```

## Licence

Not stated. The run's owner decides on it, and what the training data allows counts as well.
"""
