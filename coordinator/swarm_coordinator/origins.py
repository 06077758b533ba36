"""Starting a run from a model that is there: a Hugging Face folder, or another run's checkpoint.

Either gives all parameters, in the canonical order, and the tokenizer that goes with them. What `run.toml` says of the model
has to agree with it, but for the sequence length, which may be shorter: positions are rotary, and no parameter depends on it.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.store import Store
from swarm_protocol import ancestry
from swarm_protocol.ancestry import Ancestor
from swarm_protocol.chunks import StateManifest, content_hash
from swarm_protocol.client import MAX_CHUNK_BYTES, CoordinatorClient
from swarm_protocol.errors import ConfigurationError, HashMismatchError, InvalidDataError
from swarm_protocol.http import persist
from swarm_protocol.spec import ModelSpec, ParentSpec, RunConfig, RunSpec

F32 = npt.NDArray[np.float32]

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Origin:
    """`parameters` is float32[num_parameters]; `tokenizer` a tokenizer.json, None for `bytes`; `where` is for messages.

    `parent` and `ancestors`, nearest first, are those of a run.
    """

    where: str
    model: ModelSpec
    parameters: F32
    tokenizer: bytes | None
    parent: ParentSpec | None = None
    ancestors: tuple[Ancestor, ...] = ()

    def fit(self, config: RunConfig, folder: Path) -> RunConfig:
        """The config of a run that starts from here; the tokenizer, if there is a file of one, is put into `folder`.

        Raises:
            ConfigurationError: the config asks for another model, or another tokenizer.
        """
        model = config.model
        said = {name: getattr(model, name) for name in model.model_fields_set}
        length = said.pop("max_position_embeddings", self.model.max_position_embeddings)
        for name, value in said.items():
            if value != getattr(self.model, name):
                raise ConfigurationError(
                    f"model.{name} is {value}, but {self.where} has {getattr(self.model, name)}: leave it out"
                )
        if length > self.model.max_position_embeddings:
            raise ConfigurationError(
                f"model.max_position_embeddings is {length}, but {self.where} goes to {self.model.max_position_embeddings}"
            )
        named = config.data.tokenizer if "tokenizer" in config.data.model_fields_set else None
        if named is not None and _blob(named) != self.tokenizer:
            raise ConfigurationError(f"data.tokenizer is not the tokenizer of {self.where}: leave it out")
        tokenizer = "bytes"
        if self.tokenizer is not None:
            path = folder / "tokenizer.json"
            path.write_bytes(self.tokenizer)
            tokenizer = str(path)
        changed: dict[str, Any] = {
            "model": self.model.model_copy(update={"max_position_embeddings": length}),
            "data": config.data.model_copy(update={"tokenizer": tokenizer}),
        }
        return config.model_copy(update=changed)


def from_hugging_face(folder: Path) -> Origin:
    """A folder with a LlamaForCausalLM: config.json, safetensors, tokenizer.json.

    Raises:
        ConfigurationError: something is missing, or the model is not one that a run can train.
    """
    from swarm_protocol import huggingface
    from swarm_protocol.model.llama import parameter_shapes

    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is no folder; --from-hf takes one with config.json and model.safetensors")
    model = huggingface.read_config(folder)
    tokenizer = huggingface.read_tokenizer(folder)
    parameters = huggingface.read_weights(folder, parameter_shapes(model))
    return Origin(str(folder), model, parameters, tokenizer)


def from_run(where: str, round_number: int | None) -> Origin:
    """A checkpoint of another run, at its coordinator's address or in its directory; the newest unless a round is named.

    Raises:
        SwarmError: it is not there, or not what was sealed.
    """
    if where.startswith(("http://", "https://")):
        return asyncio.run(_from_address(where, round_number))
    return _from_directory(RunDirectory(Path(where)), round_number)


async def _from_address(url: str, round_number: int | None) -> Origin:
    from swarm_protocol import fetch
    from swarm_protocol.catching_up import CatchUp
    from swarm_protocol.sealed import sealed

    async with await persist(lambda: CoordinatorClient.connect(url), deadline_s=PATIENCE_S) as client:
        found = await sealed(client, round_number)
        with tempfile.TemporaryDirectory(prefix="swarm-init-") as scratch:
            trunk = await fetch.trunk(client, Path(scratch))
        checkpoint = await CatchUp(client).checkpoint(found.round, found.root)
        name = client.spec.data.tokenizer
        tokenizer = None if name == "bytes" else await client.chunk(bytes.fromhex(name), max_bytes=MAX_CHUNK_BYTES)
        specs = await _specs(client)
    return _of_run(client.spec, checkpoint.parameters, trunk, found.round, found.root, tokenizer, specs)


async def _specs(client: CoordinatorClient) -> tuple[bytes, ...]:
    """The encoded specs of a run's ancestors, nearest first, as its coordinator has them."""
    if client.spec.parent is None:
        return ()
    answer = await client.json("/ancestors")
    try:
        names = [bytes.fromhex(entry["spec"]) for entry in answer["ancestors"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidDataError("the coordinator's list of ancestors is no list of specs") from error
    if len(names) > ancestry.MAX_ANCESTORS:
        raise InvalidDataError(f"the coordinator names {len(names)} ancestors")
    return tuple([await client.chunk(name) for name in names])


def _from_directory(home: RunDirectory, round_number: int | None) -> Origin:
    from swarm_coordinator import overview

    spec, store = home.spec(), Store(home.objects_url())
    number, root = overview.sealed_checkpoint(home, round_number)
    trained = _state(store, root, 8 * spec.num_trainable)[: spec.num_trainable]
    trunk = None if spec.trunk is None else _state(store, bytes.fromhex(spec.trunk), 4 * spec.model.num_parameters)
    tokenizer = None if spec.data.tokenizer == "bytes" else _stored(store, bytes.fromhex(spec.data.tokenizer))
    specs = tuple(ancestor.spec for ancestor in home.ancestors())
    return _of_run(spec, trained, trunk, number, root, tokenizer, specs)


def _of_run(
    spec: RunSpec,
    trained: F32,
    trunk: F32 | None,
    number: int,
    root: bytes,
    tokenizer: bytes | None,
    specs: tuple[bytes, ...],
) -> Origin:
    from swarm_protocol import adapters

    parameters = adapters.full_parameters(spec, trained, trunk)
    where = f"checkpoint {number} of run {spec.run_id.hex()[:12]}"
    parent = ParentSpec(run=spec.run_id.hex(), round=number, root=root.hex())
    ancestors = ancestry.chain(parent, (spec.encode(), *specs))
    return Origin(where, spec.model, parameters, tokenizer, parent, ancestors)


def _state(store: Store, root: bytes, size_bytes: int) -> F32:
    raw = store.get_checkpoint(root)
    if raw is None:
        raise ConfigurationError(f"checkpoint {root.hex()} is not kept whole; serve the run, and give its address")
    manifest = StateManifest.decode(raw, max_size_bytes=size_bytes)
    if manifest.root != root or manifest.size_bytes != size_bytes:
        raise HashMismatchError(f"checkpoint {root.hex()} is damaged; restore it from a backup")
    data = bytearray(size_bytes)
    at = 0
    for index, digest in enumerate(manifest.hashes):
        chunk = _stored(store, digest)
        manifest.verify_chunk(index, chunk)
        data[at : at + len(chunk)] = chunk
        at += len(chunk)
    return np.frombuffer(data, "<f4").astype(np.float32, copy=False)


def _stored(store: Store, digest: bytes) -> bytes:
    found = store.get(digest)
    if found is None or content_hash(found) != digest:
        raise ConfigurationError(f"the blob {digest.hex()} is not in the object store whole; restore it from a backup")
    return found


def _blob(tokenizer: str) -> bytes | None:
    """The file that data.tokenizer names; None for `bytes`."""
    if tokenizer == "bytes":
        return None
    try:
        return Path(tokenizer).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"data.tokenizer {tokenizer} cannot be read: {error.strerror}") from error
