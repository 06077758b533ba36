"""The `swarm-coordinator` command. Importing it loads neither torch nor hivemind: a command does, where it needs them."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated

import typer

from swarm_protocol.errors import SwarmError

app = typer.Typer(
    name="swarm-coordinator",
    help="Run a training swarm: make a run, and serve it to volunteers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Directory = Annotated[Path, typer.Argument(help="The run's directory.")]
Url = Annotated[str, typer.Option(help="The coordinator's address.")]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="A new directory for the run.")],
    corpus: Annotated[
        list[Path] | None,
        typer.Option(help="Text to train on, files or folders; may be given several times.", exists=True),
    ] = None,
    stdlib_corpus: Annotated[
        bool, typer.Option("--stdlib-corpus", help="Train on the sources of this Python's standard library.")
    ] = False,
    spec: Annotated[
        Path | None, typer.Option(help="The run's TOML; what it leaves out has a default.", exists=True)
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="What volunteers need to know to join.", envvar="SWARM_TOKEN")
    ] = None,
    auditors: Annotated[int, typer.Option(min=1, max=64, help="Auditor keys to make.")] = 2,
) -> None:
    """Make a run: cut the corpus, draw checkpoint 0, make the keys, and seal it all under a run id."""
    from swarm_coordinator import init as making
    from swarm_protocol import corpus as corpora
    from swarm_protocol.errors import ConfigurationError
    from swarm_protocol.identity import peer_id
    from swarm_protocol.spec import RunConfig

    if corpus and stdlib_corpus:
        raise ConfigurationError("--corpus and --stdlib-corpus exclude each other; give one of them")
    config = RunConfig() if spec is None else RunConfig.from_toml(spec)
    if not corpus:
        typer.echo("The corpus is the source code of this Python's standard library.")
    sealed = making.initialise(
        making.Options(directory, config, corpus or corpora.stdlib_corpus(), token=token, auditors=auditors)
    )
    key = bytes.fromhex(sealed.coordinator)
    typer.echo(f"run          {sealed.name} {sealed.run_id.hex()}")
    typer.echo(f"coordinator  {peer_id(key)}")
    typer.echo(f"key          {key.hex()}")
    typer.echo(f"model        {sealed.model.num_parameters:,} parameters, {sealed.data.train_tokens:,} training tokens")
    typer.echo(f"serve it     swarm-coordinator serve {directory}")
    invitation = f" --token {token}" if token else ""
    typer.echo(f"join it      swarm-node join http://127.0.0.1:8470{invitation} --trust {peer_id(key)}")


@app.command()
def serve(
    directory: Directory,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8470,
    no_workers: Annotated[
        bool, typer.Option("--no-workers", help="Start neither the checkpoint worker nor auditors.")
    ] = False,
) -> None:
    """Serve a run to volunteers, with its checkpoint worker and auditors, until Ctrl-C."""
    from swarm_coordinator.server import serve as serving

    _log()
    asyncio.run(serving(directory, host, port, workers=not no_workers))


@app.command(hidden=True)
def worker(directory: Directory, url: Url) -> None:
    """The checkpoint worker of a run; `serve` starts it."""
    from swarm_coordinator import worker as working

    _log()
    asyncio.run(_until_stopped(working.run(directory, url)))


@app.command(hidden=True)
def audit(directory: Directory, url: Url, key: Annotated[Path, typer.Option(help="The auditor's key file.")]) -> None:
    """An auditor of a run; `serve` starts one for each of its keys."""
    from swarm_coordinator import auditor

    _log()
    asyncio.run(_until_stopped(auditor.run(directory, url, key)))


async def _until_stopped(work: Coroutine[None, None, None]) -> None:
    """Run until SIGINT or SIGTERM, so that what was started is ended in order."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        logging.getLogger(__name__).info("stopped")


def _log() -> None:
    """Short lines on stderr."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    for name in ("uvicorn", "httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)


def main() -> None:
    """The console script: errors that we raise on purpose become one clear message and an exit code."""
    try:
        app()
    except SwarmError as error:
        sys.stderr.write(f"swarm-coordinator: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
