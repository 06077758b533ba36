"""From files to a dataset: documents in path order, a split by document, tokens, shards.

The run owner does this once; what it gives is sealed by hash, and everybody else uses it through `data`. The same files
give the same dataset on every machine. Files are memory-mapped, and no more than one shard is in memory at a time.

A document is a file. It belongs to the held-out split if the first eight bytes of its BLAKE3 hash, as a little-endian
number modulo 2^16, are below `held_out_fraction` times 2^16: copies of one document stay on one side. Where that leaves
a side with fewer bytes than a window has tokens, as it does for a single file, the corpus is cut at a place instead: the
last `held_out_fraction` of its bytes is held out, and a document across the cut becomes two.
"""

from __future__ import annotations

import codecs
import math
import os
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swarm_protocol import tokenizing
from swarm_protocol.chunks import content_hash
from swarm_protocol.data import MAX_MANIFEST_BYTES, DatasetManifest, Shard, count_windows, token_dtype
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.spec import DataConfig, ModelSpec

_PIECE_BYTES = 1 << 20
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """The bytes [start, end) of a file."""

    path: Path
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start

    def read(self) -> npt.NDArray[np.uint8]:
        """The bytes, memory-mapped.

        Raises:
            ConfigurationError: the file cannot be read.
        """
        try:
            return np.memmap(self.path, dtype=np.uint8, mode="r")[self.start : self.end]
        except (OSError, ValueError) as error:  # ValueError: it is empty by now
            raise ConfigurationError(f"{self.path} cannot be read: {error}") from error


def documents(paths: Sequence[Path]) -> Iterator[Document]:
    """The documents of files and folders, in the order of `paths`; in a folder by POSIX relative path.

    A file that is named is taken whatever it holds; of a folder, every file that is text: valid UTF-8 with no zero byte.
    Links to folders are not followed; names that start with a dot, and empty files, are passed over.

    Raises:
        ConfigurationError: a path is not there or cannot be read.
    """
    for path in paths:
        if path.is_dir():
            for inside in _files_in(path):
                document = _document(inside)
                if document is not None and _is_text(document.read()):
                    yield document
        elif path.is_file():
            document = _document(path)
            if document is not None:
                yield document
        else:
            raise ConfigurationError(f"the corpus {path} is not there; give files or folders with text")


def stdlib_corpus() -> list[Path]:
    """The `.py` sources of the running Python's standard library, without installed packages and tests, in path order.

    Raises:
        ConfigurationError: this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in _files_in(root, _NOT_LIBRARY) if path.suffix == ".py"]
    if not files:
        raise ConfigurationError(f"there are no sources of Python's library in {root}; give a corpus with --corpus")
    return files


def write_dataset(
    config: DataConfig, model: ModelSpec, paths: Sequence[Path], put: Callable[[bytes], None]
) -> DatasetManifest:
    """Cut a corpus into shards and hand each to `put`, also the tokenizer.json where there is one.

    Blobs are named by their content hash; the manifest, which is returned, is not put.

    Raises:
        ConfigurationError: no text, too little of it, a tokenizer that cannot be used or does not fit the model.
    """
    window = model.max_position_embeddings + 1
    if config.shard_tokens < window:
        raise ConfigurationError(
            f"data.shard_tokens is {config.shard_tokens}, less than a window of {window} tokens: raise it"
        )
    tokenizer = _tokenizer(config.tokenizer, model.vocab_size)
    found = list(documents(paths))
    if not found:
        raise ConfigurationError("the corpus has no text; give files or folders with text")
    splits = _split(found, config.held_out_fraction, window)
    if tokenizer.blob is not None:
        put(tokenizer.blob)
    dtype = token_dtype(model.vocab_size)
    train, held_out = (_write_shards(_tokens(part, tokenizer), config.shard_tokens, dtype, put) for part in splits)
    for name, part in (("training", train), ("held-out", held_out)):
        if not count_windows(part, model.max_position_embeddings):
            tokens = sum(shard.tokens for shard in part)
            raise ConfigurationError(
                f"the corpus gives {tokens} {name} tokens, less than a window of {window}: add text, "
                "change data.held_out_fraction, or lower model.max_position_embeddings"
            )
    manifest = DatasetManifest(tokenizer.name, model.vocab_size, config.shard_tokens, train, held_out)
    if len(manifest.encode()) > MAX_MANIFEST_BYTES:
        raise ConfigurationError(f"the corpus has {len(train) + len(held_out)} shards: raise data.shard_tokens")
    return manifest


def _files_in(folder: Path, without: Collection[str] = ()) -> list[Path]:
    """The files under a folder, by POSIX relative path, but for folders of the names `without` and hidden ones."""
    files = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        files += [Path(where, name) for name in names if not name.startswith(".")]
    return sorted((path for path in files if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())


def _document(path: Path) -> Document | None:
    size_bytes = path.stat().st_size
    return Document(path, 0, size_bytes) if size_bytes else None


def _is_text(data: npt.NDArray[np.uint8]) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, data.size, _PIECE_BYTES):
        piece = data[start : start + _PIECE_BYTES].tobytes()
        try:
            decoder.decode(piece, final=start + _PIECE_BYTES >= data.size)
        except UnicodeDecodeError:
            return False
        if b"\x00" in piece:
            return False
    return True


def _split(found: list[Document], fraction: float, least_bytes: int) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents; see the module for the rule."""
    train: list[Document] = []
    held_out: list[Document] = []
    for document in found:
        draw = int.from_bytes(content_hash(document.read())[:8], "little") % (1 << 16)
        (held_out if draw < fraction * (1 << 16) else train).append(document)
    if all(sum(document.size_bytes for document in side) >= least_bytes for side in (train, held_out)):
        return train, held_out
    total = sum(document.size_bytes for document in found)
    return _cut(found, total - math.ceil(fraction * total))


def _cut(found: list[Document], train_bytes: int) -> tuple[list[Document], list[Document]]:
    """Cut the corpus after `train_bytes`, or up to three bytes earlier so as to keep a character whole."""
    train: list[Document] = []
    held_out: list[Document] = []
    left = train_bytes
    for document in found:
        at = document.start + min(max(left, 0), document.size_bytes)
        if document.start < at < document.end:
            at = document.start + _character_start(document.read(), at - document.start)
        train.append(replace(document, end=at))
        held_out.append(replace(document, start=at))
        left -= document.size_bytes
    return [part for part in train if part.size_bytes], [part for part in held_out if part.size_bytes]


def _character_start(data: npt.NDArray[np.uint8], at: int) -> int:
    """The last place up to `at` where a UTF-8 character starts; `at` itself where the bytes are no UTF-8."""
    for back in range(min(at, 3) + 1):
        if int(data[at - back]) & 0xC0 != 0x80:
            return at - back
    return at


@dataclass(frozen=True)
class _Tokenizer:
    name: str
    separator: npt.NDArray[Any]
    encode: Callable[[bytes], npt.NDArray[Any]]
    blob: bytes | None = None


def _tokenizer(name: str, vocab_size: int) -> _Tokenizer:
    if name != "bytes":
        return _hugging_face(Path(name), vocab_size)
    if vocab_size < 256:
        raise ConfigurationError(f"model.vocab_size is {vocab_size}; the tokenizer 'bytes' needs at least 256")
    return _Tokenizer("bytes", np.zeros(1, dtype=np.uint8), lambda piece: np.frombuffer(piece, dtype=np.uint8))


def _hugging_face(path: Path, vocab_size: int) -> _Tokenizer:
    try:
        blob = path.read_bytes()
        model = tokenizing.read(blob)
    except OSError as error:
        raise ConfigurationError(f"data.tokenizer {path} cannot be read: {error.strerror}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"data.tokenizer {path}: {error}") from error
    largest = max(model.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise ConfigurationError(
            f"data.tokenizer {path} has tokens up to {largest}: model.vocab_size must be at least {largest + 1}"
        )

    def encode(piece: bytes) -> npt.NDArray[Any]:
        text = piece.decode("utf-8", errors="replace")
        return np.array(model.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    end = tokenizing.end_of_text(model)
    separator = encode(b"\n\n") if end is None else np.array([end], dtype=np.uint32)
    return _Tokenizer(content_hash(blob).hex(), separator, encode, blob)


def _tokens(part: Iterable[Document], tokenizer: _Tokenizer) -> Iterator[npt.NDArray[Any]]:
    """The tokens of documents, with a separator between two: a zero byte, the end-of-text token, or a blank line."""
    for number, document in enumerate(part):
        if number:
            yield tokenizer.separator
        for piece in _pieces(document.read()):
            yield tokenizer.encode(piece)


def _pieces(data: npt.NDArray[np.uint8]) -> Iterator[bytes]:
    """A document in pieces of up to 1 MiB, cut after the last line end, or else between two characters."""
    at = 0
    while at < data.size:
        end = min(at + _PIECE_BYTES, data.size)
        piece = data[at:end].tobytes()
        if end < data.size:
            line_end = piece.rfind(b"\n") + 1
            piece = piece[: line_end or _character_start(data, end) - at]
        yield piece
        at += len(piece)


def _write_shards(
    tokens: Iterable[npt.NDArray[Any]], shard_tokens: int, dtype: np.dtype[Any], put: Callable[[bytes], None]
) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    shard = np.empty(shard_tokens, dtype=dtype)
    filled = 0

    def close() -> None:
        blob = shard[:filled].tobytes()
        put(blob)
        shards.append(Shard(content_hash(blob), filled))

    for run in tokens:
        at = 0
        while at < run.size:
            taken = min(run.size - at, shard_tokens - filled)
            shard[filled : filled + taken] = run[at : at + taken]
            at, filled = at + taken, filled + taken
            if filled == shard_tokens:
                close()
                filled = 0
    if filled:
        close()
    return tuple(shards)
