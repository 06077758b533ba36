"""What happens between `swarm-node join URL` and the first round: checks, trust, the peer plane, and the donor's Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from swarm_node.faults import Fault, Faults
from swarm_node.folder import DataFolder
from swarm_protocol import processes
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError, InvalidDataError, UnreachableError
from swarm_protocol.http import persist
from swarm_protocol.identity import Identity, peer_id, public_key_of
from swarm_protocol.signing import SigningLedger
from swarm_protocol.throttle import TokenBucket

START_PATIENCE_S = 120.0
MBIT = 1e6 / 8
"""A megabit, in bytes."""


@dataclass(frozen=True)
class Options:
    """Limits are in megabits per second."""

    url: str
    data_dir: Path
    name: str | None
    token: str | None
    trust: str | None
    device: str
    threads: int | None
    cheat: str | None
    audits: bool = False
    faults: tuple[str, ...] = ()
    listen: str | None = None
    client_only: bool = False
    upload_limit: float | None = None
    download_limit: float | None = None
    team: str = ""


def join(options: Options) -> None:
    """Join and contribute until the run ends or the donor stops.

    Raises:
        SwarmError: with a message for the donor.
    """
    processes.require_platform()
    processes.reuse_freed_memory()
    faults = Faults(tuple(Fault.parse(text) for text in options.faults))
    logging.basicConfig(level=os.environ.get("SWARM_LOG", "WARNING"), format="%(asctime)s %(levelname)s %(message)s")
    folder = DataFolder(options.data_dir)
    identity = Identity.load_or_create(folder.identity)
    with SigningLedger(folder.ledger, identity) as ledger:
        asyncio.run(_join(options, folder, ledger, faults))


async def _join(options: Options, folder: DataFolder, ledger: SigningLedger, faults: Faults) -> None:
    said: set[str] = set()

    def waiting(reason: str) -> None:
        if reason not in said:
            said.add(reason)
            say(f"{reason}; trying again")

    client = await persist(
        lambda: CoordinatorClient.connect(options.url, token=options.token),
        deadline_s=START_PATIENCE_S,
        waiting=waiting,
    )
    async with client:
        trust(folder, client.url, client.spec.coordinator, options.trust, say)
        bootstrap = await _bootstrap(client)

        # torch and hivemind are slow to import; by now it is worth it. The daemon comes first: hivemind forks.
        from swarm_node.cheats import kinds
        from swarm_node.volunteer import Volunteer
        from swarm_protocol import training
        from swarm_protocol.peers import PeerPlane

        folder.run(client.spec).require_room(training.size_bytes(client.spec))
        device = choose_device(options.device)
        threads = options.threads or len(os.sched_getaffinity(0))
        training.configure(threads)
        plane = await persist(
            lambda: PeerPlane.start(
                folder.identity,
                client.spec.run_id,
                initial_peers=bootstrap,
                listen=[multiaddr(options.listen or default_listen(client.url))],
                client_only=options.client_only,
            ),
            deadline_s=START_PATIENCE_S,
            waiting=waiting,
        )
        if options.upload_limit is not None:
            plane.limit_upload(MBIT * options.upload_limit)
        try:
            volunteer = Volunteer(
                client,
                folder,
                ledger,
                plane,
                name=options.name or default_name(),
                team=options.team,
                device=device,
                threads=threads,
                say=say,
                conduct=kinds.conduct(options.cheat),
                faults=faults,
                audits=options.audits,
                download_limit=None if options.download_limit is None else TokenBucket(MBIT * options.download_limit),
            )
            gc.freeze()  # what was imported stays; collecting it over and over costs as much as an exchange
            await _until_stopped(volunteer.run, volunteer.finish)
        finally:
            await plane.close()


async def _until_stopped(run: Callable[[], object], finish: Callable[[], None]) -> None:
    """Run to the end. The first Ctrl-C (or SIGTERM) calls `finish`, the second cancels."""
    task = asyncio.ensure_future(run())  # type: ignore[call-overload]
    asked = False

    def on_signal() -> None:
        nonlocal asked
        if asked:
            say("Stopping at once.")
            task.cancel()
            return
        asked = True
        say("Finishing the current contribution; press Ctrl-C again to stop at once.")
        finish()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        await task
    except asyncio.CancelledError:
        if not asked:
            raise


async def _bootstrap(client: CoordinatorClient) -> list[str]:
    """Addresses of the run's first peer, which may still be starting."""

    async def attempt() -> list[str]:
        peers = (await client.status())["peers"]
        if not peers:
            raise UnreachableError("the run's peer plane is not up yet")
        return [str(peer) for peer in peers]

    return await persist(attempt, deadline_s=START_PATIENCE_S, longest_pause_s=1.0)


def trust(folder: DataFolder, url: str, key: str, given: str | None, say: Callable[[str], None]) -> None:
    """Pin the coordinator's key for this URL: the one that was given, or the first one seen.

    Raises:
        ConfigurationError: the coordinator shows another key than the one that is trusted.
    """
    shown = peer_id(bytes.fromhex(key))
    if given is not None:
        if _key(given) != key:
            raise ConfigurationError(f"the coordinator at {url} has the key {shown}, not the one given by --trust")
    else:
        pinned = folder.pinned_key(url)
        if pinned is not None and pinned != key:
            raise ConfigurationError(
                f"the coordinator at {url} now has the key {shown}, not {peer_id(bytes.fromhex(pinned))} as before."
                f" If its owner confirms that, run again with --trust {shown}"
            )
        if pinned is None:
            say(f"Trusting the coordinator at {url} with the key {shown} from now on.")
    folder.pin(url, key)


def _key(text: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{64}", text):
        return text.lower()
    try:
        return public_key_of(text).hex()
    except InvalidDataError as error:
        raise ConfigurationError(f"--trust takes a key in hex or a PeerID: {error}") from error


def default_listen(url: str) -> str:
    """Where to listen if nothing was said: all of this machine's addresses, or only its own if the run is on it."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return "127.0.0.1"
    return "127.0.0.1" if host == "localhost" else "0.0.0.0"  # noqa: S104  # volunteers reach each other there


def multiaddr(host: str) -> str:
    """The multiaddress on which to listen at an IP address, on any free port.

    Raises:
        ConfigurationError: it is not an IP address.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise ConfigurationError(f"--listen takes an IP address of this machine, or 0.0.0.0: {error}") from error
    return f"/ip{address.version}/{address}/tcp/0"


def choose_device(wanted: str) -> str:
    """The torch device for `auto`, `cpu` or `cuda`."""
    if wanted == "cpu":
        return "cpu"
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigurationError("--device cuda: torch finds no CUDA device; check the driver, or use --device cpu")
    return "cuda" if available else "cpu"


def default_name() -> str:
    """This machine's name, as far as it may stand in a record."""
    return re.sub(r"[^\w.-]", "-", platform.node() or "volunteer")[:64]


def say(sentence: str) -> None:
    """One line for the donor, with the time."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')}  {sentence}\n")
    sys.stdout.flush()
