"""`swarm-coordinator serve`: the API, the run's clock and the run owner's workers, from start to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from swarm_coordinator.app import create_app
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.service import Service, open_service
from swarm_coordinator.supervisor import supervise
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.records import Role

log = logging.getLogger(__name__)

BACKLOG = 2048
APPOINTMENTS_S = 2.0


async def serve(directory: Path, host: str, port: int, *, workers: bool) -> None:
    """Serve the run in a directory until SIGINT or SIGTERM.

    Raises:
        ConfigurationError: no run there, another coordinator serves it, or the port is in use.
    """
    home = RunDirectory(directory)
    spec = home.spec()
    with _only_one(home), contextlib.closing(_listen(host, port)) as listener:
        url = _url(host, listener.getsockname()[1])
        async with open_service(home) as service:
            server = _Server(create_app(service), f"serving run {spec.name} {spec.run_id.hex()} at {url}")
            _stop_on_signals(server, service)
            async with asyncio.TaskGroup() as tasks:
                others = [tasks.create_task(service.run_clock()), tasks.create_task(_appoint(home, service))]
                if workers:
                    others += [
                        tasks.create_task(supervise(name, command)) for name, command in _commands(home, url).items()
                    ]
                await server.serve(sockets=[listener])
                for task in others:
                    task.cancel()


async def _appoint(home: RunDirectory, service: Service) -> None:
    """Give their office to auditors that are appointed while the run goes on."""
    known = set(home.appointed())
    while True:
        await asyncio.sleep(APPOINTMENTS_S)
        try:
            for key in set(home.appointed()) - known:
                await service.appoint(Role.AUDITOR, key)
                known.add(key)
        except (ConfigurationError, OSError) as error:
            log.warning("%s", error)


class _Server(uvicorn.Server):
    """Says a line when it is ready, and leaves signals to us: the children have to be ended as well."""

    def __init__(self, app: FastAPI, announcement: str) -> None:
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        )
        self._announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            sys.stdout.write(self._announcement + "\n")
            sys.stdout.flush()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _commands(home: RunDirectory, url: str) -> dict[str, list[str]]:
    program = [sys.executable, "-m", "swarm_coordinator"]
    commands = {"checkpoint worker": [*program, "worker", str(home.root), "--url", url]}
    for path in home.auditor_keys():
        commands[f"auditor {path.stem}"] = [*program, "audit", str(home.root), "--url", url, "--key", str(path)]
    return commands


def _stop_on_signals(server: uvicorn.Server, service: Service) -> None:
    def stop() -> None:
        service.stop_waiting()
        server.force_exit = server.should_exit
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host} port {port}: {error.strerror}. Stop what uses it, or choose another --host or --port"
        ) from error
    # Connections inherit it. The event loop sets it only on sockets that were made with a protocol number, and without it an
    # answer in two pieces waits for the client's delayed acknowledgement: 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _only_one(home: RunDirectory) -> Iterator[None]:
    """Two coordinators would sign two histories: the second one is refused."""
    descriptor = os.open(home.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(f"another coordinator serves {home.root}; stop it first") from error
        yield
    finally:
        os.close(descriptor)
