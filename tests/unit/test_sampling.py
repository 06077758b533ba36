"""Sampling reads a text once, draws what it is told to, and shows characters whole."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from swarm_protocol import sampling
from swarm_protocol.model import llama
from swarm_protocol.sampling import Draw, Reader, continuation
from swarm_protocol.spec import ModelSpec
from swarm_protocol.tokenizing import Tokenizer, harmless, tokenizer_json

TINY = ModelSpec(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=24,
    initializer_range=0.2,
    tie_word_embeddings=False,
)
TEXT = "naïve café — 日本語 \U0001f600 done"


@pytest.fixture
def model() -> llama.Llama:
    made = llama.build(TINY)
    llama.load_flat(made, llama.initial_parameters(TINY, 5))
    return made


def drawn(model: llama.Llama, prompt: list[int], count: int, **draw: Any) -> list[int]:
    return list(islice(continuation(model, prompt, Draw(**draw)), count))


def test_reading_piece_by_piece_gives_the_logits_of_reading_it_whole(
    model: llama.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_PIECE_TOKENS", 7)
    tokens = [int(token) for token in np.random.default_rng(3).integers(0, TINY.vocab_size, 24)]
    with torch.no_grad():
        whole = model(torch.tensor([tokens]))[0].double().numpy()
    reader = Reader(model)
    found = {stop: reader.read(tokens[start:stop]) for start, stop in ((0, 10), (10, 11), (11, 12), (12, 24))}
    assert max(float(np.abs(logits - whole[stop - 1]).max()) for stop, logits in found.items()) < 1e-5
    with pytest.raises(ValueError, match="room for 0"):
        reader.read([1])


def test_the_seed_decides_and_the_likeliest_token_needs_none(model: llama.Llama) -> None:
    prompt = [1, 2, 3]
    assert drawn(model, prompt, 20, seed=1) == drawn(model, prompt, 20, seed=1)
    assert drawn(model, prompt, 20, seed=1) != drawn(model, prompt, 20, seed=2)
    greedy = drawn(model, prompt, 10, temperature=0.0)
    assert greedy == drawn(model, prompt, 10, top_p=1e-6, seed=9) == drawn(model, prompt, 10, temperature=1e-4)
    with torch.no_grad():
        assert greedy[0] == int(model(torch.tensor([prompt]))[0, -1].argmax())


def test_top_p_draws_from_the_fewest_tokens_that_hold_it(model: llama.Llama) -> None:
    logits = Reader(model).read([1, 2, 3])
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares)
    fewest = int(np.searchsorted(np.cumsum(shares[best]), 0.5)) + 1
    chance = np.random.default_rng(1)
    firsts = {sampling._drawn(logits, Draw(temperature=1.0, top_p=0.5), chance) for _ in range(300)}
    assert firsts <= set(best[:fewest].tolist())
    assert len(firsts) > fewest // 2


def test_a_text_may_grow_beyond_the_models_positions(model: llama.Llama) -> None:
    assert len(drawn(model, list(range(50)), 100)) == 100
    short, long = list(range(26, 50)), list(range(50))
    assert drawn(model, short, 30, seed=4) == drawn(model, long, 30, seed=4)


def tokenizers() -> dict[str, Tokenizer]:
    return {"bytes": Tokenizer(None), "the same as a tokenizer.json": Tokenizer(tokenizer_json())}


@pytest.mark.parametrize("tokenizer", tokenizers().values(), ids=tokenizers())
def test_bytes_are_tokens_and_characters_are_shown_whole(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    assert tokens == list(TEXT.encode())
    assert tokenizer.decode(tokens) == TEXT
    pieces = list(tokenizer.pieces(tokens))
    assert "".join(pieces) == TEXT
    assert "日" in pieces
    unread = iter(tokens)
    assert next(tokenizer.pieces(unread)) == "n"
    assert list(unread) == tokens[1:]  # nothing waits for what comes later
    assert "".join(tokenizer.pieces([0xE2, 0x82])) == "\ufffd"
    assert "".join(tokenizer.pieces([0x80] * 40 + [65])).endswith("A")


def test_spaces_between_words_are_shown() -> None:
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {"▁all": 0, "▁that": 1, "▁is": 2, "?": 3}
    made = Model(models.WordLevel(vocab, unk_token="?"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = Tokenizer(made.to_str().encode())
    assert tokenizer.encode("all that is") == [0, 1, 2]
    assert "".join(tokenizer.pieces([0, 1, 2])) == "all that is"
    assert "".join(tokenizer.pieces([1, 2], [0])) == " that is"


def test_what_could_steer_a_terminal_is_not_shown() -> None:
    assert harmless("a\x1b[2Jb\x00\n\tc\x9b\ud800") == "a\ufffd[2Jb\ufffd\n\tc\ufffd\ufffd"
