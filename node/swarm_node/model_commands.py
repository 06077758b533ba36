"""The commands for those who want the model: take it home, and see what it writes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    HF = "hf"
    SAFETENSORS = "safetensors"
    PEFT = "peft"


Url = Annotated[str, typer.Argument(help="The coordinator's address.")]
Round = Annotated[
    int | None, typer.Option("--round", min=0, help="What this round starts from.", show_default="the newest")
]
Cache = Annotated[
    Path | None, typer.Option(help="Where downloaded checkpoints are kept.", show_default="~/.cache/swarm-node")
]


def register(app: typer.Typer) -> None:
    """Add these commands to the program."""
    for command in (export, sample):
        app.command()(command)


def export(
    url: Url,
    folder: Annotated[Path, typer.Argument(help="A new folder.", metavar="DIR")],
    format: Annotated[
        Format,
        typer.Option(
            help="hf: what transformers loads; safetensors: the weights alone; peft: a run's adapters for peft."
        ),
    ] = Format.HF,
    merged: Annotated[
        bool | None,
        typer.Option(
            "--merged/--no-merged",
            help="Whether adapters are merged into the model.",
            show_default="as the format says: hf merged, the others not",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="peft: what the model below the adapters is called.", show_default="written to DIR/base"),
    ] = None,
    round_number: Round = None,
    shard_size: Annotated[str, typer.Option(help="The most that one file of weights holds.")] = "5GB",
    cache: Cache = None,
) -> None:
    """Download a checkpoint, check it, and write it as a folder that other software loads."""
    from swarm_node import downloads, exporting

    options = exporting.Options(
        url=url,
        folder=folder,
        cache=cache or downloads.default_cache(),
        format=format,
        round=round_number,
        shard_bytes=exporting.size_bytes(shard_size),
        merged=merged,
        base=base,
    )
    found = exporting.export(options)
    sealed = found.sealed
    typer.echo(f"{folder}: checkpoint {sealed.round} of {found.spec.name!r:.80}, {sealed.root.hex()}")
    if format is Format.HF:
        typer.echo(f'load it  AutoModelForCausalLM.from_pretrained("{folder}")')


def sample(
    url: Url,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens that have this share.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same one writes the same text.", show_default="a new one")
    ] = None,
    round_number: Round = None,
    cache: Cache = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
) -> None:
    """Let the newest checkpoint write: download it, check it, and print text as it comes."""
    from swarm_node import downloads, writing

    writing.sample(
        writing.Options(
            url=url,
            prompt=prompt,
            cache=cache or downloads.default_cache(),
            tokens=tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            round=round_number,
            as_json=as_json,
        )
    )
