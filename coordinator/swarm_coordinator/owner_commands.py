"""The run owner's commands: who may join, pause and stop, ban, a look at the run, its keys, backup and restore.

They work on the run's directory, whether a coordinator serves it or not; see `owner`.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from swarm_protocol.errors import ConfigurationError

Directory = Annotated[Path, typer.Argument(help="The run's directory.")]
Key = Annotated[str, typer.Argument(help="The identity's key, as PeerID or in hex.")]

SEVERAL_ADDRESSES = ("0.0.0.0", "::")  # noqa: S104  # it is only compared with


def register(app: typer.Typer) -> None:
    """Add these commands to the program."""
    for command in (invite, allow, pause, resume, stop, ban, dismiss, status, keys, backup, restore):
        app.command()(command)


def invite(
    directory: Directory,
    uses: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many identities may join with it.")] = 1,
    expires: Annotated[str | None, typer.Option(help="After how long it is good for nothing: 12h, 7d, 2w.")] = None,
    label: Annotated[str, typer.Option(help="Whom it is for; only for you.")] = "",
    show: Annotated[bool, typer.Option("--list", help="List all invitations.")] = False,
    revoke: Annotated[
        str | None, typer.Option(help="Withdraw the invitations with this label, or the one whose hash begins so.")
    ] = None,
) -> None:
    """Make an invitation. Its token is shown once; who joins with it has weight from the first contribution on."""
    from swarm_coordinator import entrance, owner
    from swarm_coordinator.run_directory import RunDirectory

    home = RunDirectory(directory)
    now = owner.now_ms()
    until = None if expires is None else now + owner.duration_ms(expires)
    with owner.transaction(home) as (session, run):
        if show:
            for row in entrance.invitations(session, run):
                end = (
                    ""
                    if row.expires_ms is None
                    else f", {'expired' if row.expires_ms <= now else 'until'} {_day(row.expires_ms)}"
                )
                typer.echo(f"{row.token_hash.hex()[:16]}  {row.used} of {row.uses} used{end}  {row.label}")
            return
        if revoke is not None:
            found = entrance.withdraw(session, run, revoke, now)
            if not found:
                raise ConfigurationError(f"there is no invitation {revoke}; see them with --list")
            typer.echo(f"withdrawn: {found}")
            return
        token = entrance.invite(session, run, label=label, uses=uses, now_ms=now, expires_ms=until)
    typer.echo(f"token    {token}")
    typer.echo(f"join it  swarm-node join {_address(home)} --token {token} --trust {_owner(home)}")
    if home.admission_mode() != "invite":
        typer.echo(f'Note: admission.mode is "{home.admission_mode()}", so that others may join without an invitation.')


def allow(
    directory: Directory,
    key: Annotated[str | None, typer.Argument(help="The identity's key, as PeerID or in hex.")] = None,
    label: Annotated[str, typer.Option(help="Whose it is; only for you.")] = "",
    remove: Annotated[bool, typer.Option("--remove", help="Take it off the list: it cannot register again.")] = False,
) -> None:
    """Put an identity on the allow-list, take it off, or without a key show the list."""
    from swarm_coordinator import entrance, owner
    from swarm_coordinator.run_directory import RunDirectory
    from swarm_protocol.identity import peer_id

    home = RunDirectory(directory)
    with owner.transaction(home) as (session, run):
        if key is None:
            for row in entrance.allowed(session, run):
                typer.echo(f"{peer_id(row.key)}  {row.label}")
            return
        raw = owner.key_of(key)
        if remove:
            if not entrance.disallow(session, run, raw):
                raise ConfigurationError(f"{peer_id(raw)} is not on the allow-list")
            typer.echo(f"{peer_id(raw)} is off the list. Where it takes part already, only `ban` ends that")
            return
        entrance.allow(session, run, raw, label)
    typer.echo(f"{peer_id(raw)} may register")
    if home.admission_mode() != "allow-list":
        typer.echo(f'Note: admission.mode is "{home.admission_mode()}", so that the list decides nothing.')


def pause(directory: Directory) -> None:
    """Let no round begin until `resume`; the one under way ends."""
    _order(directory, "pause", {})


def resume(directory: Directory) -> None:
    """Let rounds begin again after `pause`."""
    _order(directory, "resume", {})


def stop(
    directory: Directory,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """End the run for good after the round under way; volunteers' nodes say so and exit."""
    if not yes:
        typer.confirm(
            "This ends the run for good. To stop the program only, press Ctrl-C in `serve`. Go on?", abort=True
        )
    _order(directory, "stop", {})


def ban(
    directory: Directory,
    key: Key,
    reason: Annotated[str, typer.Option(help="Why; it is published.", show_default=False)],
) -> None:
    """End an identity's standing, by a signed record: its slot is free, and its pending credit forfeited."""
    from swarm_coordinator import owner

    if not 0 < len(reason) <= 450:
        raise ConfigurationError("--reason takes 1 to 450 characters; it is published with the ban")
    _order(directory, "ban", {"key": owner.key_of(key).hex(), "reason": reason})


def dismiss(
    directory: Directory,
    key: Annotated[str, typer.Argument(help="The auditor's key, as PeerID or in hex.")],
    reason: Annotated[str, typer.Option(help="Why; it is published.", show_default=False)],
) -> None:
    """Take an auditor's office back for good, by a signed record: its verdicts are refused, and count in no open audit."""
    from swarm_coordinator import owner

    if not 0 < len(reason) <= 450:
        raise ConfigurationError("--reason takes 1 to 450 characters; it is published with the dismissal")
    _order(directory, "dismiss", {"key": owner.key_of(key).hex(), "reason": reason})


def status(
    where: Annotated[str, typer.Argument(help="The run's directory, or the coordinator's address.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """How the run is doing."""
    from swarm_coordinator import overview
    from swarm_coordinator.run_directory import RunDirectory

    if where.startswith(("http://", "https://")):
        found = asyncio.run(overview.of_address(where))
    else:
        found = overview.of_directory(RunDirectory(Path(where)))
    typer.echo(json.dumps(found) if as_json else overview.page(found))


def keys(directory: Directory) -> None:
    """The public keys of the coordinator, the checkpoint worker and the auditors; and what to back up."""
    from swarm_coordinator import overview
    from swarm_coordinator.run_directory import RunDirectory

    home = RunDirectory(directory)
    for row in overview.keys(home):
        typer.echo(f"{row['role']:<17}  {row['peer']}  {row['key']}  {row['file']} {row['note']}".rstrip())
    typer.echo("Back these up, and show them to nobody (`swarm-coordinator backup` takes them all):")
    for line in overview.secrets(home):
        typer.echo(f"  {line}")


def backup(
    directory: Directory,
    file: Annotated[Path, typer.Argument(help="The file to write. It holds the run's secrets.")],
    objects: Annotated[
        bool, typer.Option("--objects", help="With the checkpoints, the data and the averages, where they are local.")
    ] = False,
) -> None:
    """Write all of a run into one file; the coordinator may go on meanwhile."""
    from swarm_coordinator import backup as backups
    from swarm_coordinator.run_directory import RunDirectory

    home = RunDirectory(directory)
    found = backups.backup(home, file, objects=objects)
    typer.echo(f"{file}: {found.name}, {file.stat().st_size / 1e6:,.1f} MB, a log of {found.log_size} records")
    if not found.has_database:
        typer.echo("The database is PostgreSQL's, and is not in it: back it up with pg_dump.")
    if not found.has_objects:
        typer.echo(f"The objects are not in it: copy {home.objects_url()}, or give --objects.")


def restore(
    file: Annotated[Path, typer.Argument(help="A file that `backup` wrote.", exists=True)],
    directory: Annotated[Path, typer.Argument(help="A new directory for the run.")],
) -> None:
    """Make a run's directory of a backup. When it is served, nodes are asked first for what was signed since."""
    from swarm_coordinator import backup as backups

    found = backups.restore(file, directory)
    typer.echo(f"run          {found.name} {found.run}")
    typer.echo(f"log          {found.log_size} records, every signed head fits")
    if not found.has_objects:
        typer.echo("objects      not in the backup; put the folder `objects` here before serving it")
    typer.echo(f"serve it     swarm-coordinator serve {directory}")


def _order(directory: Path, kind: str, argument: dict[str, Any]) -> None:
    from swarm_coordinator import owner
    from swarm_coordinator.run_directory import RunDirectory

    answer = owner.order(RunDirectory(directory), kind, argument)
    if answer is None:
        answer = (
            "ordered; no coordinator has taken note of it yet, so that it takes effect when one next serves the run"
        )
    typer.echo(answer)


def _address(home: Any) -> str:
    server = home.config().server
    host = "THIS-MACHINE" if server.host in SEVERAL_ADDRESSES else server.host
    return f"{'https' if server.tls_certificate else 'http'}://{f'[{host}]' if ':' in host else host}:{server.port}"


def _owner(home: Any) -> str:
    from swarm_protocol.identity import peer_id

    return peer_id(bytes.fromhex(home.spec().coordinator))


def _day(at_ms: int) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_ms / 1000))
