"""From text to a run's tokens and back, for those who talk to its model: `bytes`, or a Hugging Face tokenizer.json.

`tokenizer_json` is the tokenizer `bytes` as such a file, for other software: a byte-level BPE without merges, whose ids are
the bytes. Text that a model writes is from a stranger: `harmless` takes out what could steer a terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from swarm_protocol.errors import ConfigurationError

INSTALL = "pip install 'swarm-node[tokenizers]'"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
BEGINNING_OF_TEXT = ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]")

_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER_TOKENS = 4
_CONTEXT_TOKENS = 8


class Tokenizer:
    """`end` is the token between two documents, None where the tokenizer has none."""

    def __init__(self, blob: bytes | None) -> None:
        """The tokenizer in a tokenizer.json; `bytes` where that is None.

        Raises:
            ConfigurationError: it is no such file, or the package for it is not here.
        """
        self._model: Any = None if blob is None else read(blob)
        self.end: int | None = 0 if self._model is None else end_of_text(self._model)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without any that the tokenizer would put around it."""
        data = text.encode("utf-8", "surrogateescape")
        if self._model is None:
            return list(data)
        return list(self._model.encode(data.decode("utf-8", "replace"), add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is no text in it becomes U+FFFD."""
        if self._model is None:
            return bytes(token for token in tokens if token < 256).decode(errors="replace")
        return str(self._model.decode(list(tokens)))

    def pieces(self, tokens: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """The text of tokens as they come; a character that is spread over several of them comes with the last.

        Args:
            after: the tokens before these; a tokenizer may drop the space at the start of a text, and here is none.
        """
        shown = list(after[-_CONTEXT_TOKENS:])
        pending: list[int] = []
        for token in tokens:
            pending.append(token)
            before, text = self.decode(shown), self.decode(shown + pending)
            if text.endswith(_UNFINISHED) and len(pending) < _LONGEST_CHARACTER_TOKENS:
                continue
            yield text[len(before) :]
            shown, pending = [*shown, *pending][-_CONTEXT_TOKENS:], []
        if pending:
            yield self.decode(shown + pending)[len(self.decode(shown)) :]


def read(blob: bytes) -> Any:
    """A tokenizer.json as the `Tokenizer` of the package tokenizers.

    Raises:
        ConfigurationError: it is no such file, or the package is not here.
    """
    try:
        from tokenizers import Tokenizer as Model
    except ImportError as error:
        raise ConfigurationError(f"a tokenizer.json needs the package tokenizers: {INSTALL}") from error
    try:
        return Model.from_str(blob.decode())
    except Exception as error:  # the package raises nothing narrower for a file that it cannot use
        raise ConfigurationError(f"this is no tokenizer.json: {error}") from error


def end_of_text(model: Any) -> int | None:
    """The token of a `tokenizers.Tokenizer` that ends a document, by its name."""
    return next((token for token in map(model.token_to_id, END_OF_TEXT) if token is not None), None)


def special(model: Any, names: Sequence[str]) -> str | None:
    """The first of these names that is a special token of a `tokenizers.Tokenizer`: text never encodes to it."""
    there = {token.content for token in model.get_added_tokens_decoder().values() if token.special}
    return next((name for name in names if name in there), None)


def tokenizer_json() -> bytes:
    """The tokenizer `bytes` as a tokenizer.json."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {letter: byte for byte, letter in enumerate(_byte_letters())},
        "merges": [],
    }
    whole: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": model,
    }
    return json.dumps(whole, indent=2, ensure_ascii=False).encode() + b"\n"


def harmless(text: str) -> str:
    """The text as it may be shown: no control characters but line ends and tabs."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else _UNFINISHED for letter in text)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
