"""Which tokens a slot trains on: recomputable by anybody, each window once per epoch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol import data, encoding
from swarm_protocol.chunks import content_hash
from swarm_protocol.data import Dataset, DatasetManifest, Shard
from swarm_protocol.errors import ConfigurationError, EncodingError, HashMismatchError, InvalidDataError
from swarm_protocol.spec import DataSpec, ModelSpec, RunConfig, RunSpec, TrainingSpec

S = 16


@dataclass(frozen=True)
class Seat:
    steps: int


@dataclass(frozen=True)
class Plan:
    cursor: int
    roster: tuple[Seat, ...]


def _spec(
    *, vocab_size: int = 256, batch: int = 4, micro: int = 2, held_out_windows: int = 6, seed: int = 9
) -> RunSpec:
    config = RunConfig()
    return RunSpec(
        name="test", seed=seed, numerics="native", coordinator="0" * 64, checkpoint="0" * 64, beacon="0" * 64,
        model=ModelSpec(vocab_size=vocab_size, max_position_embeddings=S),
        data=DataSpec(root="0" * 64, tokenizer="bytes", train_tokens=1, held_out_windows=held_out_windows),
        training=TrainingSpec(batch_sequences=batch, micro_sequences=micro),
        exchange=config.exchange, outer=config.outer, rounds=config.rounds, audit=config.audit,
    )  # fmt: skip


def _split(tokens: int, vocab_size: int, salt: int) -> tuple[list[bytes], tuple[Shard, ...]]:
    words = np.frombuffer(blake3(salt.to_bytes(4, "little")).digest(4 * tokens), dtype="<u4") % vocab_size
    words = words.astype(data.token_dtype(vocab_size))
    blobs = [words[start : start + 1024].tobytes() for start in range(0, tokens, 1024)]
    width = words.dtype.itemsize
    return blobs, tuple(Shard(content_hash(blob), len(blob) // width) for blob in blobs)


def _dataset(train_tokens: int = 3500, held_out_tokens: int = 1500, vocab_size: int = 256) -> Dataset:
    blobs, train = _split(train_tokens, vocab_size, 1)
    more, held_out = _split(held_out_tokens, vocab_size, 2)
    manifest = DatasetManifest("bytes", vocab_size, 1024, train, held_out)
    return Dataset(manifest, {content_hash(blob): blob for blob in [*blobs, *more]}.__getitem__)


def _whole_epochs(manifest: DatasetManifest, epochs: int, seed: int = 9) -> list[list[tuple[int, int]]]:
    total = data.count_windows(manifest.train, S)
    shards, windows = data.locate(manifest, seed, S, np.arange(epochs * total))
    pairs = list(zip(shards.tolist(), windows.tolist(), strict=True))
    return [pairs[start : start + total] for start in range(0, len(pairs), total)]


# Order


@given(tokens=st.integers(S + 1, 9000), seed=st.integers(0, (1 << 63) - 1))
def test_every_window_comes_exactly_once_per_epoch(tokens: int, seed: int) -> None:
    shards = tuple(Shard(bytes(32), min(1024, tokens - start)) for start in range(0, tokens, 1024))
    manifest = DatasetManifest("bytes", 256, 1024, shards, shards)
    everything = [(number, window) for number, shard in enumerate(shards) for window in range((shard.tokens - 1) // S)]
    for epoch in _whole_epochs(manifest, 2, seed):
        assert sorted(epoch) == everything


def test_shards_come_one_after_the_other_in_a_new_order_each_epoch() -> None:
    manifest = _dataset(20 * 1024 + 100).manifest
    epochs = _whole_epochs(manifest, 3)
    orders = [list(dict.fromkeys(shard for shard, _ in epoch)) for epoch in epochs]
    for epoch, order in zip(epochs, orders, strict=True):
        changes = sum(one[0] != other[0] for one, other in itertools.pairwise(epoch))
        assert changes == len(manifest.train) - 1
        assert sorted(order) == list(range(21))
    assert len({tuple(order) for order in orders}) == 3


def test_windows_of_a_shard_are_in_another_order_in_each_shard_and_epoch() -> None:
    epochs = _whole_epochs(_dataset(4 * 1024).manifest, 2)
    orders = {tuple(window for shard, window in epoch if shard == number) for epoch in epochs for number in range(4)}
    assert len(orders) == 8


def test_another_seed_gives_another_order() -> None:
    manifest = _dataset().manifest
    assert _whole_epochs(manifest, 1, seed=1) != _whole_epochs(manifest, 1, seed=2)


def test_a_far_index_is_located_as_directly_as_a_near_one() -> None:
    manifest = _dataset().manifest
    far = (1 << 62) - 1
    shards, windows = data.locate(manifest, 9, S, np.array([far, far]))
    assert shards[0] == shards[1]
    assert 0 <= windows[0] < 64


# Batches


def test_a_batch_is_the_windows_that_were_located() -> None:
    dataset, spec = _dataset(), _spec()
    plan = Plan(cursor=150, roster=(Seat(3), Seat(5), Seat(2)))
    shards, windows = data.locate(dataset.manifest, spec.seed, S, np.arange(150 + 4 * 3 + 4 * 2, 150 + 4 * 3 + 4 * 3))
    batch = data.batch(spec, plan, 1, 2, dataset)
    assert batch.dtype == np.int64
    assert batch.shape == (4, S + 1)
    for row, shard, window in zip(batch, shards, windows, strict=True):
        blob = np.frombuffer(dataset._read(dataset.manifest.train[shard].hash), dtype=np.uint8)
        assert row.tolist() == blob[window * S : window * S + S + 1].tolist()


@pytest.mark.parametrize(("vocab_size", "token_bytes"), [(256, 1), (257, 2), (65536, 2), (65537, 4)])
def test_tokens_take_as_few_bytes_as_the_vocabulary_allows(vocab_size: int, token_bytes: int) -> None:
    dataset = _dataset(vocab_size=vocab_size)
    assert dataset.manifest.token_bytes == token_bytes
    batch = data.batch(_spec(vocab_size=vocab_size), Plan(0, (Seat(1),)), 0, 0, dataset)
    assert batch.max() < vocab_size
    assert batch.max() >= min(vocab_size, 1 << 8) // 2


@given(steps=st.lists(st.integers(1, 12), min_size=1, max_size=6), cursor=st.integers(0, 2000))
def test_slots_of_a_round_share_its_windows_without_a_gap_or_an_overlap(steps: list[int], cursor: int) -> None:
    spec, plan = _spec(), Plan(cursor, tuple(map(Seat, steps)))
    given_out = [index for slot in range(len(steps)) for index in data.slot_windows(spec, plan, slot)]
    assert given_out == list(range(cursor, cursor + data.windows_used(spec, plan)))


@given(tokens=st.integers(S + 1, 9000), cursor=st.integers(0, 3000), steps=st.integers(1, 60))
def test_the_shards_to_fetch_are_those_that_the_round_uses(tokens: int, cursor: int, steps: int) -> None:
    shards = tuple(Shard(bytes(32), min(1024, tokens - start)) for start in range(0, tokens, 1024))
    manifest = DatasetManifest("bytes", 256, 1024, shards, shards)
    spec, plan = _spec(), Plan(cursor, (Seat(3), Seat(steps)))
    used, _ = data.locate(manifest, spec.seed, S, np.array(data.slot_windows(spec, plan, 1)))
    assert data.shards_of(spec, plan, 1, manifest) == list(dict.fromkeys(used.tolist()))


def test_a_slot_or_step_that_the_plan_does_not_have_is_refused() -> None:
    dataset, spec, plan = _dataset(), _spec(), Plan(0, (Seat(2),))
    for slot, step in ((1, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(ValueError, match="of"):
            data.batch(spec, plan, slot, step, dataset)


def test_a_dataset_without_a_window_of_this_length_is_refused() -> None:
    dataset = _dataset(train_tokens=S, held_out_tokens=S)
    with pytest.raises(InvalidDataError, match="17 tokens"):
        data.batch(_spec(), Plan(0, (Seat(1),)), 0, 0, dataset)
    with pytest.raises(InvalidDataError, match="17 tokens"):
        next(data.held_out_batches(_spec(), dataset))


# Held-out windows


def test_evaluation_uses_the_same_evenly_spaced_windows_every_time() -> None:
    dataset, spec = _dataset(), _spec(held_out_windows=5, micro=2, batch=2)
    batches = list(data.held_out_batches(spec, dataset))
    assert [batch.shape for batch in batches] == [(2, S + 1), (2, S + 1), (1, S + 1)]
    windows = [(shard, window) for shard, count in enumerate((63, 29)) for window in range(count)]
    chosen = [windows[number * 92 // 5] for number in range(5)]
    for row, (shard, window) in zip(np.concatenate(batches), chosen, strict=True):
        blob = np.frombuffer(dataset._read(dataset.manifest.held_out[shard].hash), dtype=np.uint8)
        assert row.tolist() == blob[window * S : window * S + S + 1].tolist()


def test_a_small_held_out_split_is_used_whole() -> None:
    batches = list(data.held_out_batches(_spec(held_out_windows=64), _dataset(held_out_tokens=3 * S + 2)))
    assert sum(len(batch) for batch in batches) == 3


# Shards


def test_a_dataset_in_a_folder_is_mapped_and_gives_the_same_batches(tmp_path: Path) -> None:
    dataset, spec, plan = _dataset(vocab_size=1000), _spec(vocab_size=1000), Plan(0, (Seat(9),))
    for shard in (*dataset.manifest.train, *dataset.manifest.held_out):
        (tmp_path / shard.hash.hex()).write_bytes(dataset._read(shard.hash))
    mapped = Dataset.from_directory(dataset.manifest, tmp_path)
    for step in range(9):
        assert np.array_equal(data.batch(spec, plan, 0, step, mapped), data.batch(spec, plan, 0, step, dataset))


def test_a_damaged_shard_is_not_used(tmp_path: Path) -> None:
    dataset, spec, plan = _dataset(), _spec(), Plan(0, (Seat(1),))
    for shard in dataset.manifest.train:
        blob = bytes(dataset._read(shard.hash))
        (tmp_path / shard.hash.hex()).write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    with pytest.raises(HashMismatchError, match="damaged"):
        data.batch(spec, plan, 0, 0, Dataset.from_directory(dataset.manifest, tmp_path))
    for shard in dataset.manifest.train:
        (tmp_path / shard.hash.hex()).write_bytes(bytes(dataset._read(shard.hash))[:-1])
    with pytest.raises(HashMismatchError, match="damaged"):
        data.batch(spec, plan, 0, 0, Dataset.from_directory(dataset.manifest, tmp_path))


def test_a_missing_or_empty_shard_says_what_to_do(tmp_path: Path) -> None:
    dataset, spec, plan = _dataset(), _spec(), Plan(0, (Seat(1),))
    mapped = Dataset.from_directory(dataset.manifest, tmp_path)
    with pytest.raises(ConfigurationError, match="start again to fetch it"):
        data.batch(spec, plan, 0, 0, mapped)
    for shard in dataset.manifest.train:
        (tmp_path / shard.hash.hex()).touch()
    with pytest.raises(ConfigurationError, match="start again to fetch it"):
        data.batch(spec, plan, 0, 0, mapped)


def test_a_shard_is_read_and_hashed_once_while_it_is_open() -> None:
    reads: list[bytes] = []
    plain = _dataset()

    def read(digest: bytes) -> Any:
        reads.append(digest)
        return plain._read(digest)

    dataset = Dataset(plain.manifest, read)
    for step in range(50):
        data.batch(_spec(), Plan(0, (Seat(50),)), 0, step, dataset)
    assert len(reads) == len(set(reads)) == 4


def test_only_so_many_shards_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_OPEN_SHARDS", 2)
    dataset = _dataset(6 * 1024)
    for step in range(90):
        data.batch(_spec(), Plan(0, (Seat(90),)), 0, step, dataset)
        assert len(dataset._open) <= 2


def test_a_token_outside_the_vocabulary_never_reaches_the_model() -> None:
    dataset = _dataset(vocab_size=256)
    narrow = Dataset(dataclasses.replace(dataset.manifest, vocab_size=100), dataset._read)
    with pytest.raises(InvalidDataError, match="vocabulary"):
        data.batch(_spec(vocab_size=100), Plan(0, (Seat(1),)), 0, 0, narrow)


# Manifest


@pytest.mark.parametrize("tokens", [1, 1023, 1024, 1025, 5000])
def test_a_manifest_survives_the_wire(tokens: int) -> None:
    manifest = _dataset(train_tokens=tokens).manifest
    again = DatasetManifest.decode(manifest.encode())
    assert again == manifest
    assert again.root == content_hash(manifest.encode())
    assert again.train_tokens == tokens


def _wire(**changes: Any) -> bytes:
    value: Any = encoding.decode(_dataset().manifest.encode())
    for name, change in changes.items():
        if isinstance(change, dict):
            value[name].update(change)
        else:
            value[name] = change
    return encoding.encode(value)


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"more": 1},
        {"tokenizer": "words"},
        {"tokenizer": "A" * 64},
        {"tokenizer": 1},
        {"vocab_size": 1},
        {"vocab_size": (1 << 20) + 1},
        {"vocab_size": True},
        {"vocab_size": 256.5},
        {"shard_tokens": 0},
        {"shard_tokens": 1023},
        {"shard_tokens": -1024},
        {"shard_tokens": 1 << 27},
        {"train": 5},
        {"train": {"tokens": 0}},
        {"train": {"tokens": -5}},
        {"train": {"tokens": 3072}},
        {"train": {"tokens": 4097}},
        {"train": {"tokens": 1 << 63}},
        {"train": {"hashes": b""}},
        {"train": {"hashes": bytes(129)}},
        {"train": {"hashes": "text"}},
        {"train": {"extra": 1}},
        {"held_out": {"tokens": 0, "hashes": b""}},
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(EncodingError):
        DatasetManifest.decode(_wire(**changes))


@given(junk=st.binary(max_size=60))
def test_bytes_that_are_no_manifest_are_refused(junk: bytes) -> None:
    with pytest.raises(EncodingError):
        DatasetManifest.decode(junk)


def test_shards_in_the_middle_are_full() -> None:
    good = _dataset().manifest
    for train in ((), (Shard(bytes(32), 5), Shard(bytes(32), 5)), (Shard(bytes(31), 5),), (Shard(bytes(32), 0),)):
        with pytest.raises(EncodingError):
            dataclasses.replace(good, train=train)


def test_the_order_and_the_batches_are_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    dataset, spec = _dataset(), _spec()
    plan = Plan(cursor=210, roster=(Seat(3), Seat(5)))
    shards, windows = data.locate(dataset.manifest, 9, S, np.array([0, 62, 63, 64, 214, 215, 10**12]))
    batch = data.batch(spec, plan, 1, 4, dataset)
    held_out = np.concatenate(list(data.held_out_batches(spec, dataset)))
    golden(
        "data",
        {
            "manifest": dataset.manifest.encode().hex(),
            "manifest root": dataset.manifest.root.hex(),
            "located (shards, windows)": [shards.tolist(), windows.tolist()],
            "shards of slot 1": data.shards_of(spec, plan, 1, dataset.manifest),
            "batch of slot 1, step 4, as <i8": content_hash(batch.astype("<i8")).hex(),
            "held-out windows as <i8": content_hash(held_out.astype("<i8")).hex(),
        },
    )
