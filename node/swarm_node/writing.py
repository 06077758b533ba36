"""`swarm-node sample`: what the newest checkpoint of a run writes after a prompt, token by token, as it is drawn."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from swarm_node.downloads import Download, download
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.http import persist
from swarm_protocol.tokenizing import Tokenizer, harmless

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Options:
    """`round` None is the newest checkpoint; `seed` None a new one each time."""

    url: str
    prompt: str
    cache: Path
    tokens: int = 200
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int | None = None
    round: int | None = None
    as_json: bool = False


def sample(options: Options) -> None:
    """Print the prompt and what comes after it; with `as_json` one object at the end instead.

    Raises:
        SwarmError
    """
    found = asyncio.run(_download(options))
    tokenizer = Tokenizer(found.tokenizer)
    sealed = found.sealed
    if not options.as_json:
        where = "from the cache" if found.cached else "downloaded"
        name = f"{harmless(found.spec.name)}, checkpoint {sealed.round} ({sealed.root.hex()[:12]})"
        sys.stderr.write(f"{name}, {where}, every byte verified\n")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    drawn: list[int] = []
    text = ""
    show = _silent if options.as_json else _show
    show(harmless(options.prompt))
    prompt = _prompt(tokenizer, options.prompt)
    for piece in tokenizer.pieces(_drawn(found, prompt, tokenizer.end, options, seed, drawn.append), prompt):
        text += piece
        show(harmless(piece))
    show("\n")
    if options.as_json:
        answer = {
            "run": found.spec.run_id.hex(),
            "round": sealed.round,
            "root": sealed.root.hex(),
            "prompt": options.prompt,
            "text": text,
            "tokens": drawn,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": seed,
        }
        print(json.dumps(answer))


async def _download(options: Options) -> Download:
    async with await persist(lambda: CoordinatorClient.connect(options.url), deadline_s=PATIENCE_S) as client:
        return await download(client, options.cache, options.round)


def _prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens to go on from: those of the text, or what comes before a document."""
    prompt = tokenizer.encode(text)
    if not prompt and tokenizer.end is None:
        raise ConfigurationError("this run's tokenizer has no token to begin a text with: give a --prompt")
    return prompt or [tokenizer.end or 0]


def _drawn(
    found: Download, prompt: list[int], end: int | None, options: Options, seed: int, note: Callable[[int], None]
) -> Iterator[int]:
    """The tokens as they are drawn, until there are enough or the document ends."""
    from swarm_protocol import sampling
    from swarm_protocol.model import llama

    if max(prompt) >= found.spec.model.vocab_size:
        raise ConfigurationError("the run's tokenizer has tokens that its model does not know")
    model = llama.build(found.spec.model)
    llama.load_flat(model, found.full_parameters())
    tokens = sampling.continuation(model, prompt, sampling.Draw(options.temperature, options.top_p, seed))
    for _ in range(options.tokens):
        token = next(tokens)
        if token == end:
            return
        note(token)
        yield token


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _silent(text: str) -> None:
    """Nothing is shown."""
