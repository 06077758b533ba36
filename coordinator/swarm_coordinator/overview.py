"""`swarm-coordinator status` and `keys`: a run at a glance, from its directory or from its coordinator's address."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from swarm_coordinator import owner
from swarm_coordinator.api.status import newest_checkpoint, run_status
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.engine import open_database, shown
from swarm_coordinator.journal import restored_state
from swarm_coordinator.run_directory import RunDirectory
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.identity import Identity, peer_id
from swarm_protocol.tokenizing import harmless

MAX_LINES = 20


def of_directory(home: RunDirectory) -> dict[str, Any]:
    """The run's status as the API says it, under `run`, and what only this machine knows of it."""
    spec, ancestors = home.spec(), home.ancestors()
    with owner.transaction(home):
        pass  # the database is there, and up to date
    engine = open_database(home.database_url())
    try:
        with Session(engine) as session:
            status = run_status(spec, restored_state(session, spec), Archive(session, spec.run_id), ancestors)
    finally:
        engine.dispose()
    return {
        "run": status.model_dump(mode="json"),
        "served": owner.is_served(home),
        "admission": home.admission_mode(),
        "database": shown(home.database_url()),
        "objects": home.objects_url(),
        "directory_bytes": _size_bytes(home.root),
        "free_bytes": shutil.disk_usage(home.root).free,
    }


def sealed_checkpoint(home: RunDirectory, round_number: int | None) -> tuple[int, bytes]:
    """The newest checkpoint of a run, or the one that a round starts from: its number and its root.

    Raises:
        ConfigurationError: there is no run, or no such checkpoint yet.
    """
    spec = home.spec()
    with owner.transaction(home) as (session, run):
        archive = Archive(session, run)
        newest = newest_checkpoint(spec, archive)
        number = newest.round if round_number is None else round_number
        row = archive.round(number - 1) if number else None
        if number == 0:
            return 0, bytes.fromhex(spec.checkpoint)
        if row is None or row.root is None:
            raise ConfigurationError(
                f"{home.root} has checkpoints 0 to {newest.round}; there is no checkpoint {number} yet"
            )
        return number, row.root


async def of_address(url: str) -> dict[str, Any]:
    """The run's status as its coordinator says it, under `run`."""
    client = await CoordinatorClient.connect(url)
    async with client:
        return {"run": await client.status(), "served": True}


def page(found: dict[str, Any]) -> str:
    """The status for people, in lines."""
    run = found["run"]
    doing = run["phase"]
    if run.get("ended"):
        doing = f"finished: {run['ended']}" if doing == "finished" else f"{doing}, the last one: {run['ended']}"
    elif run.get("recovering"):
        doing = "restored from a backup; its nodes are asked for what was signed last"
    elif run.get("paused"):
        doing = f"{doing}, paused by its owner"
    lines = [
        f"run          {run['name']} {run['run_id']}",
        f"coordinator  {'running' if found['served'] else 'not running'}",
        f"round        {run['round']} of {run['rounds']}, {doing}",
        *(
            f"{'parent' if one is run['ancestors'][0] else 'before that':<12} {harmless(one['name'])} {one['run_id']},"
            f" checkpoint {one['round']}"
            for one in run["ancestors"]
        ),
        f"checkpoint   {run['checkpoint']['round']} {run['checkpoint']['root']}",
    ]
    if run["evaluations"]:
        newest = run["evaluations"][-1]
        lines.append(f"loss         {newest['loss']:.4f} nats per token on held-out data, checkpoint {newest['round']}")
    nodes = run["nodes"]
    good = [node for node in nodes if node["standing"] == "good"]
    new = sum(node["probation"] for node in good)
    lines.append(
        f"nodes        {len(good)} in good standing, {new} of them on probation; {len(nodes) - len(good)} ended"
    )
    totals = {name: sum(node["credit"][name] for node in nodes) for name in ("pending", "settled", "forfeited")}
    credit = ", ".join(f"{amount:,} {name}" for name, amount in totals.items())
    lines.append(f"credit       {credit}, in megaflops")
    audits = run["audits"]
    outcomes = ("accepted", "rejected", "inconclusive", "unavailable", "pending")
    lines.append(f"audits       {audits['drawn']} drawn: " + ", ".join(f"{audits[name]} {name}" for name in outcomes))
    if "free_bytes" in found:
        lines += [
            f"admission    {found['admission']}",
            f"database     {found['database']}",
            f"objects      {found['objects']}",
            f"disk         {found['directory_bytes'] / 1e6:,.1f} MB here, {found['free_bytes'] / 1e9:,.1f} GB free",
        ]
    shown_nodes = sorted(nodes, key=lambda node: -node["contributions"])[:MAX_LINES]
    for node in shown_nodes:
        state = "on probation" if node["probation"] else "trusted"
        state = state if node["standing"] == "good" else f"ended: {node['reason']}"
        lines.append(f"  {node['peer']}  {node['name']}: {node['contributions']} contributions, {state}")
    if len(nodes) > len(shown_nodes):
        lines.append(f"  and {len(nodes) - len(shown_nodes)} more")
    return "\n".join(lines)


def keys(home: RunDirectory) -> list[dict[str, str]]:
    """The public keys of a run's offices, with their files and who may read these."""
    spec = home.spec()
    rows = [_key("coordinator", home.coordinator_key, home.root), _key("checkpoint worker", home.worker_key, home.root)]
    rows += [_key("auditor", path, home.root) for path in home.auditor_keys()]
    rows += [_row("auditor", key, "kept elsewhere", "") for key in home.appointed()]
    if rows[0]["key"] != spec.coordinator:
        rows[0]["note"] = "NOT the key that the run was made with"
    return rows


def secrets(home: RunDirectory) -> list[str]:
    """The files that make the run what it is: to back up, and to show to nobody."""
    files = [home.coordinator_key, home.beacon_seed_file, home.worker_key, *home.auditor_keys(), home.token_file]
    return [f"{path.relative_to(home.root)} ({_mode(path)})" for path in files if path.exists()]


def _key(role: str, path: Path, root: Path) -> dict[str, str]:
    return _row(role, Identity.load(path).public_key, str(path.relative_to(root)), _mode(path))


def _row(role: str, key: bytes, where: str, note: str) -> dict[str, str]:
    return {"role": role, "peer": peer_id(key), "key": key.hex(), "file": where, "note": note}


def _mode(path: Path) -> str:
    mode = stat.S_IMODE(path.stat().st_mode)
    return f"mode {mode:04o}" + (f", OPEN TO OTHERS: chmod 600 {path}" if mode & 0o077 else "")


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
