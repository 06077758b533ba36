"""The `swarm-coordinator` command. Importing it loads neither torch nor hivemind: a command does, where it needs them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from swarm_coordinator import logs, owner_commands
from swarm_protocol import processes
from swarm_protocol.errors import SwarmError

app = typer.Typer(
    name="swarm-coordinator",
    help="Run a training swarm: make a run, and serve it to volunteers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

LOG_FORMAT = "SWARM_COORDINATOR_LOG_FORMAT"


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


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
    tolerances: Annotated[
        Path | None, typer.Option(help="Tolerances for native numerics, made by `calibrate`.", exists=True)
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME.", show_default="in DIR")
    ] = None,
    objects: Annotated[
        str | None, typer.Option(help="s3://BUCKET/PREFIX or file:///PATH.", show_default="in DIR")
    ] = None,
    admission: Annotated[
        str | None,
        typer.Option(help="Who may register: open, token, invite, allow-list.", show_default="token if one is given"),
    ] = None,
    from_hf: Annotated[
        Path | None, typer.Option(help="Start from this Hugging Face folder: config.json, safetensors, tokenizer.json.")
    ] = None,
    parent: Annotated[
        str | None, typer.Option(help="Start from a checkpoint of another run: its address, or its directory.")
    ] = None,
    parent_round: Annotated[
        int | None, typer.Option(min=0, help="Which: what this round starts from.", show_default="the newest")
    ] = None,
) -> None:
    """Make a run: cut the corpus, draw checkpoint 0, make the keys, and seal it all under a run id."""
    from swarm_coordinator import init as making
    from swarm_coordinator import origins
    from swarm_coordinator.config import CoordinatorConfig
    from swarm_protocol import corpus as corpora
    from swarm_protocol.errors import ConfigurationError
    from swarm_protocol.identity import peer_id
    from swarm_protocol.spec import RunConfig

    if corpus and stdlib_corpus:
        raise ConfigurationError("--corpus and --stdlib-corpus exclude each other; give one of them")
    if from_hf is not None and parent is not None:
        raise ConfigurationError("--from-hf and --parent exclude each other; give one of them")
    if parent_round is not None and parent is None:
        raise ConfigurationError("--parent-round goes with --parent")
    config = RunConfig() if spec is None else RunConfig.from_toml(spec)
    serving = CoordinatorConfig().changed("database", url=database).changed("objects", url=objects)
    serving = serving.changed("admission", mode=admission or ("token" if token else "open"))
    if not corpus:
        typer.echo("The corpus is the source code of this Python's standard library.")
    origin = None
    if from_hf is not None:
        origin = origins.from_hugging_face(from_hf)
    elif parent is not None:
        origin = origins.from_run(parent, parent_round)
    texts = corpus or corpora.stdlib_corpus()
    sealed = making.initialise(making.Options(directory, config, texts, token, auditors, tolerances, serving, origin))
    key = bytes.fromhex(sealed.coordinator)
    typer.echo(f"run          {sealed.name} {sealed.run_id.hex()}")
    typer.echo(f"coordinator  {peer_id(key)}")
    typer.echo(f"key          {key.hex()}")
    typer.echo(f"model        {sealed.model.num_parameters:,} parameters, {sealed.data.train_tokens:,} training tokens")
    if sealed.trainable.kind != "all":
        typer.echo(f"trained      {sealed.num_trainable:,} of them ({sealed.trainable.kind})")
    if origin is not None:
        typer.echo(f"starts from  {origin.where}")
    typer.echo(f"serve it     swarm-coordinator serve {directory}")
    invitation = f" --token {token}" if token else ""
    typer.echo(f"join it      swarm-node join http://127.0.0.1:8470{invitation} --trust {peer_id(key)}")


@app.command()
def calibrate(
    config: Annotated[
        Path | None, typer.Argument(help="The run's TOML; without one, the defaults.", exists=True)
    ] = None,
    out: Annotated[Path, typer.Option(help="The tolerance file to write.")] = Path("tolerances.json"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Three runtimes and one contribution: to see that it works.")
    ] = False,
) -> None:
    """Measure how far apart honest runtimes and cheats are, and write the tolerances that `init --tolerances` takes."""
    from swarm_coordinator import calibrate as calibrating
    from swarm_protocol.spec import RunConfig

    recipe = RunConfig(numerics="native") if config is None else RunConfig.from_toml(config)
    found = calibrating.calibrate(recipe, out, calibrating.QUICK if quick else calibrating.THOROUGH, typer.echo)
    for precision, measured in found.precisions.items():
        for name, distance in sorted(measured.honest.items(), key=lambda item: item[1]):
            typer.echo(f"{precision}  {distance:9.2e}  honest, {name}")
        for name, distance in sorted(measured.cheats.items(), key=lambda item: item[1]):
            typer.echo(f"{precision}  {distance:9.2e}  {name}")
        typer.echo(
            f"{precision}: {measured.margin_orders} orders of magnitude between honest noise and the mildest cheat"
        )
    typer.echo(f"written to {out}; use it with: swarm-coordinator init DIR --tolerances {out}")


@app.command()
def serve(
    directories: Annotated[
        list[Path], typer.Argument(help="The run's directory; several runs may be served together.")
    ],
    host: Annotated[
        str | None,
        typer.Option(help="The address to listen on; 0.0.0.0 for all of this machine's.", show_default="127.0.0.1"),
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 for any free one.", show_default="8470")] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="A PEM file with the certificate and its chain: serve https.", exists=True)
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key, a PEM file.", exists=True)] = None,
    no_workers: Annotated[
        bool, typer.Option("--no-workers", help="Start neither the checkpoint worker nor auditors.")
    ] = False,
    one_of_several: Annotated[bool, typer.Option("--one-of-several", hidden=True)] = False,
    log_format: Annotated[
        LogFormat | None, typer.Option(help="Lines for people, or an object of JSON for each.")
    ] = None,
) -> None:
    """Serve a run to volunteers, with its checkpoint worker and auditors, until Ctrl-C.

    The run's coordinator.toml says how; these options come before it. Of several runs, the first one's says where and how to
    listen, and each one's where its database and its objects are.
    """
    import uvloop

    from swarm_coordinator.run_directory import RunDirectory
    from swarm_coordinator.server import Part, prepare_process
    from swarm_coordinator.server import serve as serving

    config = RunDirectory(directories[0]).config()
    config = config.changed("server", host=host, port=port, tls_certificate=tls_certificate, tls_key=tls_key)
    config = config.changed("log", format=log_format)
    os.environ[LOG_FORMAT] = config.log.format  # for the workers that we start
    logs.configure(config.log)
    prepare_process()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serving(directories, config, Part(not no_workers, one_of_several)))


@app.command(hidden=True)
def worker(
    directory: Directory,
    url: Url,
    host: Annotated[str | None, typer.Option(help="Where nodes reach the coordinator.")] = None,
) -> None:
    """The checkpoint worker of a run; `serve` starts it."""
    from swarm_coordinator import worker as working
    from swarm_coordinator.run_directory import RunDirectory

    logs.configure(RunDirectory(directory).config().log)
    asyncio.run(_until_stopped(working.run(directory, url, host)))


@app.command(hidden=True)
def gossip(directory: Directory, url: Url) -> None:
    """The gossip of a run; `serve` starts it where coordinator.toml says where to listen."""
    from swarm_coordinator import gossiping
    from swarm_coordinator.run_directory import RunDirectory

    logs.configure(RunDirectory(directory).config().log)
    asyncio.run(_until_stopped(gossiping.run(directory, url)))


@app.command()
def audit(
    where: Annotated[str, typer.Argument(help="The run's directory, or the coordinator's address.")],
    url: Annotated[str | None, typer.Option(help="The coordinator's address, where a directory was given.")] = None,
    key: Annotated[Path | None, typer.Option(help="The auditor's key file; made if it does not exist.")] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads.")] = 1,
) -> None:
    """Audit a run, on any machine; `serve` starts an auditor for each key in its own directory.

    An auditor elsewhere has a key of its own, which the run owner has to appoint: swarm-coordinator appoint DIR KEY.
    """
    from functools import partial

    from swarm_coordinator.db.signing import open_ledger
    from swarm_coordinator.run_directory import RunDirectory
    from swarm_protocol import auditor
    from swarm_protocol.errors import ConfigurationError
    from swarm_protocol.identity import Identity
    from swarm_protocol.signing import SigningLedger

    remote = where.startswith(("http://", "https://"))
    directory = Path.home() / ".local" / "share" / "swarm-auditor" if remote else Path(where)
    logs.configure(RunDirectory(directory).config().log)
    address = where if remote else url
    if address is None:
        raise ConfigurationError(f"give the coordinator's address as well: swarm-coordinator audit {where} --url URL")
    if key is None:
        key = directory / "identity"
        typer.echo(f"auditing with the key {Identity.load_or_create(key).peer_id}; the run owner has to appoint it")
    opening = SigningLedger if remote else partial(open_ledger, RunDirectory(directory))
    work = auditor.run(directory, address, key, threads=threads, open_ledger=opening)
    asyncio.run(_until_stopped(work))


@app.command()
def appoint(
    directory: Directory, key: Annotated[str, typer.Argument(help="The auditor's key, as PeerID or in hex.")]
) -> None:
    """Let somebody else's auditor give verdicts in a run. A coordinator that is running takes note within seconds."""
    from swarm_coordinator import owner
    from swarm_coordinator.db.archive import Archive
    from swarm_coordinator.run_directory import RunDirectory
    from swarm_protocol.errors import ConfigurationError
    from swarm_protocol.identity import peer_id

    home = RunDirectory(directory)
    home.spec()
    raw = owner.key_of(key)
    with owner.transaction(home) as (session, run):
        if Archive(session, run).dismissed(raw):
            raise ConfigurationError(f"{peer_id(raw)} was dismissed as an auditor of this run, which is for good")
    home.appoint(raw)
    typer.echo(f"{peer_id(raw)} may audit")


@app.command("audit-reduction")
def audit_reduction(
    url: Annotated[str, typer.Argument(help="The coordinator's address.")],
    round_number: Annotated[int, typer.Option("--round", min=0, help="The round.")],
    part: Annotated[
        list[int] | None, typer.Option(min=0, help="A part of it; may be given several times.", show_default="all")
    ] = None,
) -> None:
    """Recompute published averages from the committed inputs; anybody can. One JSON object on stdout.

    Exits with 0 if all of them are accepted, with 1 if not.
    """
    from swarm_coordinator import reduction_auditor
    from swarm_coordinator.config import Log

    logs.configure(Log())
    report = asyncio.run(reduction_auditor.run(url, round_number, part or None))
    typer.echo(json.dumps(report))
    raise typer.Exit(any(entry["outcome"] != "accepted" for entry in report["records"]))


@app.command("export-metrics")
def export_metrics(
    url: Annotated[str, typer.Argument(help="The coordinator's address.")],
    tensorboard: Annotated[Path | None, typer.Option(help="Write TensorBoard's event files into this folder.")] = None,
    wandb: Annotated[str | None, typer.Option(help="Write to this project of Weights & Biases.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run is over.")] = False,
) -> None:
    """Export a run's figures by round: losses, nodes, tokens, audits, missing parts. A round is written once."""
    from swarm_coordinator import exporting
    from swarm_coordinator.config import Log
    from swarm_protocol.errors import ConfigurationError

    logs.configure(Log())
    if tensorboard is not None and wandb is None:
        work = exporting.run(url, lambda spec: exporting.TensorBoard(spec, tensorboard), follow=follow)
    elif wandb is not None and tensorboard is None:
        work = exporting.run(url, lambda spec: exporting.WeightsAndBiases(spec, wandb), follow=follow)
    else:
        raise ConfigurationError("say where to: either --tensorboard DIR or --wandb PROJECT")
    typer.echo(f"{asyncio.run(work)} rounds written")


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


owner_commands.register(app)


def main() -> None:
    """The console script: errors that we raise on purpose become one clear message and an exit code."""
    processes.wait_politely()
    try:
        app()
    except SwarmError as error:
        sys.stderr.write(f"swarm-coordinator: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
