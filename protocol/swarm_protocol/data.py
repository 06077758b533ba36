"""Shards of tokens, the order in which their windows are trained on, and from (spec, plan, slot, step) to a batch.

A dataset is its manifest, whose hash the RunSpec seals, and blobs that are named by their hash (`corpus` makes both).
Everything here is in the exact domain: anybody recomputes in O(batch), with nothing stored, which tokens a slot sees.

A window is S + 1 consecutive tokens of one shard (S = `model.max_position_embeddings`): inputs, and targets shifted by
one. Windows of a shard share no input. Their order has two levels, shards permuted anew each epoch and windows permuted
inside each shard, so that a slot's round touches few shards; within an epoch every training window comes exactly once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

from swarm_protocol import encoding
from swarm_protocol.chunks import Buffer, content_hash
from swarm_protocol.errors import ConfigurationError, EncodingError, HashMismatchError, InvalidDataError
from swarm_protocol.seeds import Permutation
from swarm_protocol.spec import RunSpec

MAX_MANIFEST_BYTES = 1 << 24
MAX_OPEN_SHARDS = 32

Tokens = npt.NDArray[np.int64]

_VERSION = 1


class Shard(NamedTuple):
    """A blob of little-endian tokens, named by its content hash."""

    hash: bytes
    tokens: int


@dataclass(frozen=True)
class DatasetManifest:
    """A dataset: its tokenizer and its shards. All shards of a split but its last have exactly `shard_tokens` tokens.

    `tokenizer` is 'bytes', or the hash in hex of the tokenizer.json that is served with the shards.

    Raises:
        EncodingError: a field is out of bounds.
    """

    tokenizer: str
    vocab_size: int
    shard_tokens: int
    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]

    def __post_init__(self) -> None:
        if self.tokenizer != "bytes" and not _is_hash(self.tokenizer):
            raise EncodingError("a dataset's tokenizer is 'bytes' or a hash")
        if not 2 <= self.vocab_size <= 1 << 20:
            raise EncodingError(f"a vocabulary of {self.vocab_size}; from 2 to 2^20 are allowed")
        if not 1 << 10 <= self.shard_tokens <= 1 << 26:
            raise EncodingError(f"shards of {self.shard_tokens} tokens; from 2^10 to 2^26 are allowed")
        for split in (self.train, self.held_out):
            if not split or any(len(shard.hash) != 32 for shard in split):
                raise EncodingError("each split of a dataset has a shard or more, with hashes of 32 bytes")
            if any(shard.tokens != self.shard_tokens for shard in split[:-1]):
                raise EncodingError(f"all shards but the last have {self.shard_tokens} tokens")
            if not 1 <= split[-1].tokens <= self.shard_tokens:
                raise EncodingError(f"the last shard has from 1 to {self.shard_tokens} tokens")

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.vocab_size)

    @property
    def token_bytes(self) -> int:
        return self.dtype.itemsize

    @property
    def train_tokens(self) -> int:
        return sum(shard.tokens for shard in self.train)

    @cached_property
    def root(self) -> bytes:
        """The content hash of the encoding: what a RunSpec seals."""
        return content_hash(self.encode())

    def encode(self) -> bytes:
        """Canonical CBOR. A split travels as its number of tokens and its hashes in a row; the sizes follow from them."""
        return encoding.encode(
            {
                "v": _VERSION,
                "tokenizer": self.tokenizer,
                "vocab_size": self.vocab_size,
                "shard_tokens": self.shard_tokens,
                "train": _encode_split(self.train),
                "held_out": _encode_split(self.held_out),
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> DatasetManifest:
        """Raises `EncodingError`: not canonical, too long, of another version, or a field out of bounds."""
        value = encoding.decode(data, max_bytes=MAX_MANIFEST_BYTES, max_depth=3)
        names = {"v", "tokenizer", "vocab_size", "shard_tokens", "train", "held_out"}
        if not isinstance(value, dict) or set(value) != names or value["v"] != _VERSION:
            raise EncodingError("no dataset manifest that this version knows; upgrade swarm-node?")
        tokenizer, vocab_size, shard_tokens = value["tokenizer"], value["vocab_size"], value["shard_tokens"]
        if not (isinstance(tokenizer, str) and _is_int(vocab_size) and _is_int(shard_tokens)):
            raise EncodingError("a field of the dataset manifest has the wrong type")
        train, held_out = (_decode_split(value[name], shard_tokens) for name in ("train", "held_out"))
        return cls(tokenizer, vocab_size, shard_tokens, train, held_out)


class Seat(Protocol):
    """What the data order needs of a `records.Seat`."""

    @property
    def steps(self) -> int: ...


class Plan(Protocol):
    """What the data order needs of a `records.RoundPlan`."""

    @property
    def cursor(self) -> int: ...

    @property
    def roster(self) -> Sequence[Seat]: ...


class Dataset:
    """A manifest and a way to its shards. Every shard's hash is checked when it is opened; a few stay open."""

    def __init__(self, manifest: DatasetManifest, read: Callable[[bytes], Buffer]) -> None:
        """`read` returns the blob that has a given hash; its answer is not trusted."""
        self.manifest = manifest
        self._read = read
        self._open: OrderedDict[bytes, npt.NDArray[Any]] = OrderedDict()

    @classmethod
    def from_directory(cls, manifest: DatasetManifest, folder: Path) -> Dataset:
        """Memory-map shards from files that are named by their hash in hex.

        A shard that is not there raises `ConfigurationError` when it is first used.
        """

        def read(digest: bytes) -> Buffer:
            path = folder / digest.hex()
            try:
                return np.memmap(path, dtype=np.uint8, mode="r")
            except (OSError, ValueError) as error:  # ValueError: an empty file
                raise ConfigurationError(
                    f"the data shard {path} is missing or cannot be read ({error}); delete it and start again to fetch it"
                ) from error

        return cls(manifest, read)

    def windows(self, split: Sequence[Shard], shards: Tokens, windows: Tokens, sequence_length: int) -> Tokens:
        """The tokens of windows that are given by their shards and their numbers within them: int64 [n, S + 1].

        Raises:
            HashMismatchError: a shard is not the one that the manifest names.
            InvalidDataError: a token lies outside the vocabulary.
        """
        out = np.empty((len(shards), sequence_length + 1), dtype=np.int64)
        for row, (shard, window) in enumerate(zip(shards.tolist(), windows.tolist(), strict=True)):
            first = window * sequence_length
            out[row] = self._tokens(split[shard])[first : first + sequence_length + 1]
        if out.size and int(out.max()) >= self.manifest.vocab_size:
            raise InvalidDataError(
                "a data shard holds a token outside the vocabulary; the run owner has to make it anew"
            )
        return out

    def _tokens(self, shard: Shard) -> npt.NDArray[Any]:
        if shard.hash not in self._open:
            blob = np.frombuffer(self._read(shard.hash), dtype=np.uint8)
            if blob.size != shard.tokens * self.manifest.token_bytes or content_hash(blob) != shard.hash:
                raise HashMismatchError(
                    f"data shard {shard.hash.hex()} is damaged; delete it and start again to fetch it"
                )
            if len(self._open) >= MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[shard.hash] = blob.view(self.manifest.dtype)
        self._open.move_to_end(shard.hash)
        return self._open[shard.hash]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint8, uint16 or uint32, little-endian: the smallest that holds the vocabulary."""
    return np.dtype("<u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


def count_windows(split: Sequence[Shard], sequence_length: int) -> int:
    """Windows in a split: (n - 1) // S per shard of n tokens."""
    if not split:
        return 0
    full, last = _windows_per_shard(split, sequence_length)
    return (len(split) - 1) * full + last


def locate(manifest: DatasetManifest, run_seed: int, sequence_length: int, indices: Tokens) -> tuple[Tokens, Tokens]:
    """The training windows at `indices` of the run's data order: (shards, windows within them), int64 [n] each.

    Index g is place g mod W of epoch g // W, where W is the number of training windows.

    Raises:
        InvalidDataError: the dataset has no window of this length.
    """
    full, last = _windows_per_shard(manifest.train, sequence_length)
    epochs, places = np.divmod(indices, _train_windows(manifest, sequence_length))
    shards, windows = np.empty_like(places), np.empty_like(places)
    final_shard = len(manifest.train) - 1
    for epoch in np.unique(epochs).tolist():
        here = np.flatnonzero(epochs == epoch)
        order, short = _shard_order(manifest, run_seed, epoch)
        positions, offsets = _position(places[here], full, last, short)
        shards[here] = order(positions)
        for shard in np.unique(shards[here]).tolist():
            inside = shards[here] == shard
            count = last if shard == final_shard else full
            windows[here[inside]] = Permutation(count, run_seed, "window order", epoch, shard)(offsets[inside])
    return shards, windows


def windows_used(spec: RunSpec, plan: Plan) -> int:
    """Windows that a round hands out: the next round's cursor is this one's plus as many."""
    return spec.training.batch_sequences * sum(seat.steps for seat in plan.roster)


def slot_windows(spec: RunSpec, plan: Plan, slot: int) -> range:
    """The indices, in the data order, of the windows of a slot's whole round, in the order of its steps.

    Raises:
        ValueError: the roster has no such slot.
    """
    if not 0 <= slot < len(plan.roster):
        raise ValueError(f"slot {slot} of a roster of {len(plan.roster)}")
    per_step = spec.training.batch_sequences
    first = plan.cursor + per_step * sum(seat.steps for seat in plan.roster[:slot])
    return range(first, first + per_step * plan.roster[slot].steps)


def shards_of(spec: RunSpec, plan: Plan, slot: int, manifest: DatasetManifest) -> list[int]:
    """The training shards that a slot's round touches, in the order of their first use. O(shards), not O(windows).

    Raises:
        ValueError, InvalidDataError: as `slot_windows` and `locate`.
    """
    sequence_length = spec.model.max_position_embeddings
    full, last = _windows_per_shard(manifest.train, sequence_length)
    total = _train_windows(manifest, sequence_length)
    wanted = slot_windows(spec, plan, slot)
    shards: dict[int, None] = {}
    for epoch in range(wanted.start // total, (wanted.stop - 1) // total + 1):
        ends = np.array([max(wanted.start - epoch * total, 0), min(wanted.stop - epoch * total, total) - 1])
        order, short = _shard_order(manifest, spec.seed, epoch)
        positions, _ = _position(ends, full, last, short)
        between = np.arange(positions[0], positions[1] + 1)
        shards |= dict.fromkeys(order(between if last else between[between != short]).tolist())
    return list(shards)


def batch(spec: RunSpec, plan: Plan, slot: int, step: int, dataset: Dataset) -> Tokens:
    """What a slot trains on in one inner step: int64 [batch_sequences, S + 1], inputs and the targets shifted by one.

    Raises:
        ValueError: the plan has no such slot or step.
        InvalidDataError: as `Dataset.windows` and `locate`.
    """
    wanted = slot_windows(spec, plan, slot)
    if not 0 <= step < plan.roster[slot].steps:
        raise ValueError(f"step {step} of {plan.roster[slot].steps}")
    per_step, sequence_length = spec.training.batch_sequences, spec.model.max_position_embeddings
    indices = np.arange(wanted.start + step * per_step, wanted.start + (step + 1) * per_step, dtype=np.int64)
    shards, windows = locate(dataset.manifest, spec.seed, sequence_length, indices)
    return dataset.windows(dataset.manifest.train, shards, windows, sequence_length)


def held_out_batches(spec: RunSpec, dataset: Dataset) -> Iterator[Tokens]:
    """The windows that every checkpoint is evaluated on, evenly spaced over the held-out split, in micro-batches.

    Each is int64 [at most micro_sequences, S + 1]. There are `data.held_out_windows` in all, or as many as the split has.

    Raises:
        InvalidDataError: as `Dataset.windows`, or the split has no window of this length.
    """
    sequence_length, split = spec.model.max_position_embeddings, dataset.manifest.held_out
    full, _ = _windows_per_shard(split, sequence_length)
    total = count_windows(split, sequence_length)
    if not total:
        raise InvalidDataError(f"the held-out split has no window of {sequence_length + 1} tokens")
    wanted = min(spec.data.held_out_windows, total)
    chosen = np.arange(wanted, dtype=np.int64) * total // wanted
    for start in range(0, wanted, spec.training.micro_sequences):
        shards, windows = np.divmod(chosen[start : start + spec.training.micro_sequences], full)
        yield dataset.windows(split, shards, windows, sequence_length)


def _windows_per_shard(split: Sequence[Shard], sequence_length: int) -> tuple[int, int]:
    """Windows of every shard but the last, and of the last."""
    return (split[0].tokens - 1) // sequence_length, (split[-1].tokens - 1) // sequence_length


def _train_windows(manifest: DatasetManifest, sequence_length: int) -> int:
    total = count_windows(manifest.train, sequence_length)
    if not total:
        raise InvalidDataError(f"the dataset has no training window of {sequence_length + 1} tokens")
    return total


def _shard_order(manifest: DatasetManifest, run_seed: int, epoch: int) -> tuple[Permutation, int]:
    """An epoch's order of the shards, and at which position the last shard comes, which alone may be short."""
    order = Permutation(len(manifest.train), run_seed, "shard order", epoch)
    return order, int(order.inverse(np.array(len(manifest.train) - 1)))


def _position(places: Tokens, full: int, last: int, short: int) -> tuple[Tokens, Tokens]:
    """Positions in the order of shards, and offsets in them, of places in an epoch.

    Every position holds `full` windows, but for position `short`, which holds `last`.
    """
    start, end = short * full, short * full + last
    # Beyond the short position, count as if it were full.
    positions, offsets = np.divmod(np.where(places < end, places, places + (full - last)), full)
    inside = (places >= start) & (places < end)
    return np.where(inside, short, positions), np.where(inside, places - start, offsets)


def _encode_split(split: tuple[Shard, ...]) -> dict[str, object]:
    return {"tokens": sum(shard.tokens for shard in split), "hashes": b"".join(shard.hash for shard in split)}


def _decode_split(value: encoding.Value, shard_tokens: int) -> tuple[Shard, ...]:
    if not isinstance(value, dict) or set(value) != {"tokens", "hashes"}:
        raise EncodingError("a split of a dataset is a map of tokens and hashes")
    tokens, hashes = value["tokens"], value["hashes"]
    if not (_is_int(tokens) and isinstance(hashes, bytes)):
        raise EncodingError("a split of a dataset has a number of tokens and bytes of hashes")
    count = len(hashes) // 32
    if shard_tokens < 1 or not hashes or len(hashes) % 32 or -(-tokens // shard_tokens) != count:
        raise EncodingError(f"{len(hashes)} bytes of hashes for {tokens} tokens in shards of {shard_tokens}")
    sizes = [shard_tokens] * (count - 1) + [tokens - shard_tokens * (count - 1)]
    return tuple(Shard(hashes[32 * number : 32 * number + 32], size) for number, size in enumerate(sizes))


def _is_int(value: encoding.Value) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_hash(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
