"""The `swarm-node` command. Importing it loads neither torch nor hivemind: a command does, once it knows that it can run."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from swarm_node import model_commands
from swarm_node.cheats import Kind
from swarm_protocol import PROTOCOL_VERSION, __version__, processes
from swarm_protocol.errors import SwarmError

app = typer.Typer(
    name="swarm-node",
    help="Donate a CPU or GPU to train an open model together; every contribution is checked by replaying it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


verify_app = typer.Typer(no_args_is_help=True)
app.add_typer(verify_app, name="verify", help="Check a run at home: replay contributions, find where replays part.")


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Numerics(StrEnum):
    NATIVE = "native"
    EXACT = "exact"


def default_folder() -> Path:
    """The XDG place for a node's data."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "swarm-node"


@app.command()
def join(
    url: Annotated[str, typer.Argument(help="The coordinator's address, for example https://swarm.example.org")],
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where the node keeps its identity and its work.", show_default="~/.local/share/swarm-node"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The name that others see.", show_default="this machine's name")
    ] = None,
    team: Annotated[str, typer.Option(help="Your team: what you earn counts for it as well.")] = "",
    token: Annotated[
        str | None, typer.Option(help="An invitation, if the run asks for one.", envvar="SWARM_TOKEN")
    ] = None,
    trust: Annotated[
        str | None,
        typer.Option(help="The coordinator's key (hex or PeerID); without it the first one seen is trusted."),
    ] = None,
    device: Annotated[Device, typer.Option(help="What to train on.")] = Device.AUTO,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.", show_default="all")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Also replay others' work; the run owner has to appoint this node.")
    ] = False,
    listen: Annotated[
        str | None,
        typer.Option(help="The IP address at which other nodes reach this one.", show_default="all of this machine's"),
    ] = None,
    client_only: Annotated[
        bool, typer.Option("--client-only", help="Others cannot reach this node, so it averages nothing for them.")
    ] = False,
    upload_limit: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="MBIT", help="Send no more than this to other nodes, in megabits per second."),
    ] = None,
    download_limit: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="MBIT", help="Download checkpoints no faster, in megabits per second."),
    ] = None,
    cheat: Annotated[Kind | None, typer.Option(hidden=True)] = None,
    fault: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
) -> None:
    """Join a run and contribute until it ends. Ctrl-C finishes the current contribution, a second one stops at once."""
    from swarm_node import joining

    joining.join(
        joining.Options(
            url=url,
            data_dir=data_dir or default_folder(),
            name=name,
            team=team,
            token=token,
            trust=trust,
            device=device,
            threads=threads,
            cheat=cheat,
            audits=audit,
            faults=tuple(fault or ()),
            listen=listen,
            client_only=client_only,
            upload_limit=upload_limit,
            download_limit=download_limit,
        )
    )


@app.command()
def demo(
    nodes: Annotated[int, typer.Option(min=1, max=32, help="Volunteer processes.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds to train.")] = 6,
    cheaters: Annotated[int, typer.Option(min=0, max=8, help="Further volunteers, who cheat.")] = 0,
    cheat: Annotated[Kind, typer.Option(help="What cheaters do.")] = Kind.MADE_UP,
    numerics: Annotated[
        Numerics, typer.Option(help="exact: training gives the same bits on any machine.")
    ] = Numerics.NATIVE,
    mixed_kernels: Annotated[
        bool, typer.Option("--mixed-kernels", help="Give every node, and the auditors, other CPU kernels and threads.")
    ] = False,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, help="Text to train on; may be given several times.", show_default="Python's sources"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
    keep: Annotated[Path | None, typer.Option(help="Keep all files of the demo in this new folder.")] = None,
) -> None:
    """Train a small model on this machine: a coordinator, volunteers and auditors, each a process of its own."""
    from swarm_node import demonstration

    raise typer.Exit(
        demonstration.run(
            demonstration.Options(
                nodes=nodes,
                rounds=rounds,
                cheaters=cheaters,
                cheat=cheat,
                numerics=numerics,
                mixed_kernels=mixed_kernels,
                corpus=corpus or [],
                as_json=as_json,
                keep=keep,
            )
        )
    )


@verify_app.command("run")
def verify_run(
    url: Annotated[str, typer.Argument(help="The coordinator's address.")],
    round: Annotated[int | None, typer.Option(min=0, help="Replay this round's contributions.")] = None,
    slot: Annotated[int | None, typer.Option(min=0, help="Only this slot of the round.")] = None,
    sample: Annotated[int, typer.Option(min=1, max=10_000, help="Without --round: how many, drawn at random.")] = 3,
    device: Annotated[Device, typer.Option(help="What to replay on.")] = Device.CPU,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.", show_default="1")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
) -> None:
    """Replay published contributions whole, from the public checkpoint. Exit code 0 only if all of them hold."""
    from swarm_node import verifying

    options = verifying.options(url, round, slot, sample, device, threads, as_json=as_json)
    raise typer.Exit(verifying.verify(options))


@verify_app.command("trace")
def verify_trace(
    url: Annotated[str, typer.Argument(help="The coordinator's address.")],
    round: Annotated[int, typer.Option(min=0)],
    slot: Annotated[int, typer.Option(min=0)],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    device: Annotated[Device, typer.Option(help="What to compute on.")] = Device.CPU,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.", show_default="1")] = None,
) -> None:
    """Replay one contribution of an exact run and write every operator's result to a file, for `verify bisect`."""
    from swarm_node import verifying

    verifying.write_trace(verifying.options(url, round, slot, 1, device, threads, as_json=False), out)


@verify_app.command("bisect")
def verify_bisect(
    a: Annotated[Path, typer.Argument(exists=True, help="A trace made by `verify trace`.")],
    b: Annotated[Path, typer.Argument(exists=True, help="Another one of the same contribution.")],
) -> None:
    """Find the first segment, step, layer and operator in which two traces differ. Exit code 0 where they agree."""
    from swarm_node import verifying

    raise typer.Exit(verifying.bisect(a, b))


@verify_app.command("evidence")
def verify_evidence(
    url: Annotated[str, typer.Argument(help="The coordinator's address.")],
    round: Annotated[int, typer.Option(min=0)],
    slot: Annotated[int, typer.Option(min=0)],
    part: Annotated[
        int | None, typer.Option(min=0, help="The average of this part, instead of the slot's contribution.")
    ] = None,
    device: Annotated[Device, typer.Option(help="What to replay on.")] = Device.CPU,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.", show_default="1")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
) -> None:
    """Judge a rejection again by the evidence that its auditors archived. Exit code 0 only if the verdict stands."""
    from swarm_node import verifying, verifying_evidence

    options = verifying.options(url, round, slot, 1, device, threads, as_json=as_json)
    raise typer.Exit(verifying_evidence.verify(options, part))


@verify_app.command("draws")
def verify_draws(
    url: Annotated[str, typer.Argument(help="The coordinator's address.")],
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
) -> None:
    """Repeat every draw and every outcome from the log alone. Exit code 0 only if the coordinator says the same."""
    from swarm_node import verifying_draws

    raise typer.Exit(verifying_draws.verify(url, as_json=as_json))


@verify_app.command("log")
def verify_log(
    url: Annotated[str, typer.Argument(help="The coordinator's address.")],
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where the heads of logs seen before are kept.", show_default="~/.local/share/swarm-node"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
) -> None:
    """Download the log and recompute everything: draws, outcomes, credit, balances. Exit code 0 only if all agrees."""
    from swarm_node import verifying_log

    raise typer.Exit(verifying_log.verify(url, data_dir or default_folder(), as_json=as_json))


@verify_app.command("certificate")
def verify_certificate(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A certificate of credit, as JSON.")],
    checkpoint: Annotated[str | None, typer.Option(help="The checkpoint's root that it has to be for, in hex.")] = None,
    run: Annotated[str | None, typer.Option(help="The run id that it has to be of, in hex.")] = None,
) -> None:
    """Check offline what a certificate says somebody has earned. Exit code 0 only if it is valid."""
    from swarm_node import verifying_certificates

    raise typer.Exit(verifying_certificates.verify(file, checkpoint=checkpoint, run=run))


@app.command()
def observe(
    where: Annotated[
        str, typer.Argument(help="The coordinator's URL, or the multiaddr of anybody who gossips the run.")
    ],
    run: Annotated[str | None, typer.Option(help="The run id that it has to be, in hex.")] = None,
    listen: Annotated[
        str, typer.Option(help="Where to listen for other observers and nodes.")
    ] = "/ip4/127.0.0.1/tcp/0",
    rounds: Annotated[int | None, typer.Option(min=1, help="Stop after so many sealed rounds.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line: every record, and what follows.")
    ] = False,
) -> None:
    """Follow a run over gossip alone, verifying every record and the log. Exit code 1 if anything does not fit."""
    from swarm_node import observing

    raise typer.Exit(observing.observe(where, run=run, listen=listen, rounds=rounds, as_json=as_json))


@app.command()
def version() -> None:
    """Print the version of the software and of the protocol."""
    typer.echo(f"swarm-node {__version__}, protocol {PROTOCOL_VERSION}")


model_commands.register(app)


def main() -> None:
    """The console script: errors that we raise on purpose become one clear message and an exit code."""
    processes.wait_politely()
    try:
        app()
    except SwarmError as error:
        sys.stderr.write(f"swarm-node: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
