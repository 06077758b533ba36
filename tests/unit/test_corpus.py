"""From files to a dataset: the same files give the same shards everywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from swarm_protocol import corpus, data
from swarm_protocol.chunks import content_hash
from swarm_protocol.data import Dataset, DatasetManifest, Shard
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.spec import DataConfig, ModelSpec

MODEL = ModelSpec(max_position_embeddings=8)


class Blobs(dict[bytes, bytes]):
    """Where shards are put, by hash."""

    def put(self, blob: bytes) -> None:
        self[content_hash(blob)] = blob

    def text(self, split: tuple[Shard, ...]) -> bytes:
        return b"".join(self[shard.hash] for shard in split)


def _write(
    paths: list[Path], *, model: ModelSpec = MODEL, tokenizer: str = "bytes", shard_tokens: int = 1024,
    fraction: float = 0.1,
) -> tuple[DatasetManifest, Blobs]:  # fmt: skip
    blobs = Blobs()
    config = DataConfig(tokenizer=tokenizer, shard_tokens=shard_tokens, held_out_fraction=fraction)
    return corpus.write_dataset(config, model, paths, blobs.put), blobs


def _folder(tmp_path: Path, count: int = 60) -> Path:
    folder = tmp_path / "corpus"
    for number in range(count):
        path = folder / f"{number % 7}" / f"{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Document {number}. " * (5 + number))
    return folder


def _names(paths: list[Path]) -> list[str]:
    return [document.path.name for document in corpus.documents(paths)]


# Documents


def test_a_folder_is_read_in_the_order_of_posix_relative_paths(tmp_path: Path) -> None:
    for name in ("b/1", "a/2", "a-b", "a/10", "B", "ä"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [document.path.relative_to(tmp_path).as_posix() for document in corpus.documents([tmp_path])]
    assert found == ["B", "a-b", "a/10", "a/2", "b/1", "ä"]


def test_paths_are_read_in_the_order_in_which_they_are_named(tmp_path: Path) -> None:
    for name in ("z", "a"):
        (tmp_path / name).write_text(name)
    assert _names([tmp_path / "z", tmp_path / "a"]) == ["z", "a"]


def test_a_folder_gives_its_text_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("grüße\n" * 300_000)  # longer than a piece, with characters across its edge
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "zero").write_bytes(b"text\x00")
    (tmp_path / "cut").write_bytes("ü".encode()[:1])
    (tmp_path / "empty").touch()
    (tmp_path / ".hidden").write_text("text")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert _names([tmp_path]) == ["text"]
    assert _names([tmp_path / "binary", tmp_path / ".hidden"]) == ["binary", ".hidden"]


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere is not there"):
        _names([tmp_path / "nowhere"])


def test_the_default_corpus_is_the_standard_library_without_tests() -> None:
    files = corpus.stdlib_corpus()
    names = {path.name for path in files}
    assert {"argparse.py", "tarfile.py", "typing.py"} <= names
    assert all(path.suffix == ".py" for path in files)
    root = Path(os.__file__).parent
    parts = {part for path in files for part in path.relative_to(root).parts}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    assert sum(path.stat().st_size for path in files) > 10_000_000
    relative = [path.relative_to(root).as_posix() for path in files]
    assert relative == sorted(relative)


def test_a_python_without_sources_asks_for_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ConfigurationError, match="--corpus"):
        corpus.stdlib_corpus()


# Shards


def test_shards_hold_the_documents_with_a_zero_byte_between(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    manifest, blobs = _write([folder])
    documents = blobs.text(manifest.train).split(b"\x00") + blobs.text(manifest.held_out).split(b"\x00")
    files = [path.read_bytes() for path in sorted(folder.rglob("*.txt"), key=Path.as_posix)]
    assert sorted(documents) == sorted(files)
    train = set(blobs.text(manifest.train).split(b"\x00"))
    assert blobs.text(manifest.train).split(b"\x00") == [text for text in files if text in train]
    assert {shard.tokens for shard in manifest.train[:-1]} == {1024}
    assert data.count_windows(manifest.train, 8) > 0


def test_a_document_is_held_out_by_its_content_alone(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    manifest, blobs = _write([folder])
    held_out = set(blobs.text(manifest.held_out).split(b"\x00"))
    for path in folder.rglob("*.txt"):
        text = path.read_bytes()
        draw = int.from_bytes(content_hash(text)[:8], "little") % 65536
        assert (text in held_out) == (draw < 0.1 * 65536)
    assert 1 <= len(held_out) <= 15


def test_copies_of_a_document_are_on_one_side(tmp_path: Path) -> None:
    first, second = _folder(tmp_path / "one"), _folder(tmp_path / "two")
    manifest, blobs = _write([first, second])
    sides = [set(blobs.text(split).split(b"\x00")) for split in (manifest.train, manifest.held_out)]
    assert not sides[0] & sides[1]


def test_a_single_file_is_cut_near_its_end(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    text = ("Es war einmal ein König. " * 400).encode()
    file.write_bytes(text)
    manifest, blobs = _write([file])
    train, held_out = blobs.text(manifest.train), blobs.text(manifest.held_out)
    assert train + held_out == text
    assert 0 <= len(held_out) - len(text) / 10 < 4
    assert train.decode() + held_out.decode() == text.decode()


@pytest.mark.parametrize("extra", range(3))
def test_the_cut_keeps_characters_whole(tmp_path: Path, extra: int) -> None:
    file = tmp_path / "wide.txt"
    file.write_text("x" * extra + "€" * 200)
    manifest, blobs = _write([file])
    assert blobs.text(manifest.train).decode() + blobs.text(manifest.held_out).decode() == file.read_text()


def test_a_few_documents_none_of_which_was_drawn_are_cut_at_a_place(tmp_path: Path) -> None:
    texts = [b"a" * 500, b"b" * 350, b"c" * 150]
    assert all(int.from_bytes(content_hash(text)[:8], "little") % 65536 >= 0.2 * 65536 for text in texts)
    for number, text in enumerate(texts):
        (tmp_path / str(number)).write_bytes(text)
    manifest, blobs = _write([tmp_path], fraction=0.2)
    assert blobs.text(manifest.train) == b"a" * 500 + b"\x00" + b"b" * 300
    assert blobs.text(manifest.held_out) == b"b" * 50 + b"\x00" + b"c" * 150


def test_a_corpus_beyond_a_piece_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "large.txt"
    file.write_bytes(b"a line of text\n" * 200_000 + b"no line end" * 200_000)
    manifest, blobs = _write([file], shard_tokens=1 << 20, fraction=0.25)
    assert blobs.text(manifest.train) + blobs.text(manifest.held_out) == file.read_bytes()
    assert len(manifest.train) == -(-manifest.train_tokens // (1 << 20))


def test_a_wide_vocabulary_takes_two_bytes_per_token(tmp_path: Path) -> None:
    manifest, blobs = _write([_folder(tmp_path)], model=ModelSpec(vocab_size=300, max_position_embeddings=8))
    tokens = np.frombuffer(blobs.text(manifest.train), dtype="<u2")
    assert len(tokens) == manifest.train_tokens
    assert tokens[:8].tolist() == list(b"Document")


def test_the_same_files_give_the_same_dataset(tmp_path: Path, golden: Callable[[str, dict[str, object]], None]) -> None:
    first, _ = _write([_folder(tmp_path / "one")])
    second, _ = _write([_folder(tmp_path / "two")])
    assert first.root == second.root
    golden("data", {"root of a small corpus": first.root.hex()})


# What is refused


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for paths in ([], [tmp_path], [tmp_path / "empty"]):
        with pytest.raises(ConfigurationError, match="no text"):
            _write(paths)


def test_too_little_text_is_refused_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("x" * 50)
    with pytest.raises(ConfigurationError, match=r"5 held-out tokens, less than a window of 9: add text"):
        _write([file])
    file.write_text("x")
    with pytest.raises(ConfigurationError, match=r"0 training tokens"):
        _write([file])


def test_a_shard_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.shard_tokens"):
        _write([_folder(tmp_path)], model=ModelSpec(max_position_embeddings=1024))


def test_bytes_need_a_vocabulary_of_256(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="at least 256"):
        _write([_folder(tmp_path)], model=ModelSpec(vocab_size=255, max_position_embeddings=8))


# Tokenizers


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[UNK]": 0, "Document": 1, ".": 2, "</s>": 5} | {str(number): 10 + number for number in range(60)}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    return path


def test_a_tokenizer_file_travels_with_the_data_and_is_named_by_its_hash(tmp_path: Path, tokenizer: Path) -> None:
    manifest, blobs = _write([_folder(tmp_path)], tokenizer=str(tokenizer))
    assert blobs[bytes.fromhex(manifest.tokenizer)] == tokenizer.read_bytes()
    tokens = np.frombuffer(blobs.text(manifest.train), dtype=np.uint8)
    first = tokens[: tokens.tolist().index(5)]
    assert first[:3].tolist() == [1, first[1], 2]
    assert np.array_equal(first, np.tile(first[:3], len(first) // 3))
    batch = Dataset(manifest, blobs.__getitem__).windows(manifest.train, np.array([0]), np.array([0]), 8)
    assert batch[0, 0] == 1


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.vocab_size must be at least 70"):
        _write([_folder(tmp_path)], tokenizer=str(tokenizer), model=ModelSpec(vocab_size=64, max_position_embeddings=8))


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        _write([_folder(tmp_path)], tokenizer=str(tmp_path / "nowhere.json"))
    tokenizer.write_text("{}")
    with pytest.raises(ConfigurationError, match=r"no tokenizer\.json"):
        _write([_folder(tmp_path)], tokenizer=str(tokenizer))


def test_without_the_package_a_tokenizer_file_names_the_extra(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigurationError, match=r"swarm-node\[tokenizers\]"):
        _write([_folder(tmp_path)], tokenizer=str(tokenizer))
