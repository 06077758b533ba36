"""The trunk of a run that trains a part: made by init, kept in the store, and downloaded once by whoever needs it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from swarm_coordinator.evaluating import Bench
from swarm_coordinator.init import Options, initialise
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.store import Store
from swarm_protocol import adapters, fetch, training
from swarm_protocol.chunks import StateManifest, content_hash
from swarm_protocol.errors import HashMismatchError
from swarm_protocol.model import llama
from swarm_protocol.spec import RunConfig, RunSpec

TOML = """
name = "tiny"
trainable = { kind = "lora", r = 2 }
[model]
hidden_size = 8
intermediate_size = 8
num_hidden_layers = 1
num_attention_heads = 1
num_key_value_heads = 1
max_position_embeddings = 16
[training.optimizer]
name = "adamw"
"""


@dataclass
class Source:
    """What `fetch` asks a coordinator, answered from a store."""

    spec: RunSpec
    store: Store
    asked: list[bytes] = field(default_factory=list)
    damaged: bool = False

    async def state_manifest(self, root: bytes) -> StateManifest:
        raw = self.store.get_checkpoint(root)
        assert raw is not None
        return StateManifest.decode(raw, max_size_bytes=1 << 30)

    async def chunk(self, digest: bytes, **_: object) -> bytes:
        self.asked.append(digest)
        found = self.store.get(digest)
        assert found is not None
        if self.damaged or content_hash(found) != digest:
            raise HashMismatchError("other bytes")
        return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("run")
    corpus = folder / "corpus.txt"
    corpus.write_text("All that is gold does not glitter.\n" * 400)
    home = RunDirectory(folder / "run")
    spec = initialise(Options(home.root, RunConfig.from_toml(TOML), [corpus], auditors=1))
    return Source(spec, Store(home.objects_url()))


@pytest.fixture(autouse=True)
def nobody_holds_one(source: Source) -> None:
    fetch._trunks.clear()
    source.asked.clear()
    source.damaged = False


def the_trunk(source: Source, folder: Path) -> fetch.Float32:
    found = asyncio.run(fetch.trunk(source, folder))  # type: ignore[arg-type]
    assert found is not None
    return found


def test_init_keeps_the_model_as_the_trunk_and_the_adapters_as_checkpoint_0(source: Source, tmp_path: Path) -> None:
    spec = source.spec
    trunk = llama.initial_parameters(spec.model, spec.seed)
    assert the_trunk(source, tmp_path).tobytes() == trunk.tobytes()
    start = asyncio.run(fetch.checkpoint(source, 0, bytes.fromhex(spec.checkpoint)))  # type: ignore[arg-type]
    assert start.parameters.tobytes() == adapters.initial(spec.model, spec.trainable, spec.seed, trunk).tobytes()
    assert not start.momentum.any()


def test_the_trunk_is_downloaded_once_and_shared_within_a_process(source: Source, tmp_path: Path) -> None:
    first = the_trunk(source, tmp_path)
    assert source.asked
    source.asked.clear()
    assert the_trunk(source, tmp_path / "elsewhere") is first
    fetch._trunks.clear()
    assert np.array_equal(the_trunk(source, tmp_path), first)
    assert not source.asked
    assert not first.flags.writeable


def test_two_who_ask_at_once_download_it_once(source: Source, tmp_path: Path) -> None:
    async def both() -> list[fetch.Float32 | None]:
        return await asyncio.gather(*(fetch.trunk(source, tmp_path) for _ in range(2)))  # type: ignore[arg-type]

    first, second = asyncio.run(both())
    assert first is second
    assert len(source.asked) == len(set(source.asked))


def test_a_damaged_trunk_on_disk_is_downloaded_again_and_a_damaged_chunk_refused(
    source: Source, tmp_path: Path
) -> None:
    expected = the_trunk(source, tmp_path).copy()
    (file,) = tmp_path.glob("trunk-*")
    for wrong in (file.read_bytes()[:-4], file.read_bytes()[:-1], file.read_bytes()[:-1] + b"\x7f", b""):
        fetch._trunks.clear()
        file.write_bytes(wrong)
        assert np.array_equal(the_trunk(source, tmp_path), expected)
    file.unlink()
    fetch._trunks.clear()
    source.damaged = True
    with pytest.raises(HashMismatchError):
        the_trunk(source, tmp_path)
    assert not file.exists()


def test_a_checkpoint_of_adapters_is_evaluated_on_the_trunk(source: Source) -> None:
    spec = source.spec
    bench = Bench(spec, source.store)
    found = bench.measure(bytes.fromhex(spec.checkpoint), sample=True)
    assert found.sample
    whole = spec.model_copy(update={"trainable": spec.trainable.model_copy(update={"kind": "all"}), "trunk": None})
    trunk = llama.initial_parameters(spec.model, spec.seed)
    assert found.loss == training.evaluate(whole, trunk, bench._batches)
