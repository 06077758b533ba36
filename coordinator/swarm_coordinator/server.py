"""`swarm-coordinator serve`: the API, the run's clock and the run owner's workers, from start to a clean end.

The first SIGINT or SIGTERM answers what waits, asks the workers to end, and exits with 0. The second kills them and exits at
once, with 130: what was acknowledged is on disk already.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from swarm_coordinator import config
from swarm_coordinator.api.limits import Limits
from swarm_coordinator.app import create_app
from swarm_coordinator.connections import Connection
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.service import Service, offices, open_service
from swarm_coordinator.supervisor import kill_all, supervise
from swarm_coordinator.workers import employ
from swarm_protocol.errors import ConfigurationError, SwarmError
from swarm_protocol.records import Role

log = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_S = 75
DESCRIPTORS = 1 << 16
GC_THRESHOLDS = (50_000, 50, 100)
APPOINTMENTS_S = 2.0
FAILURE_S = 0.25
LOCK_S = 0.5


@dataclass(frozen=True)
class Part:
    """What this process does beside serving the API: it starts checkpoint workers and auditors, or further processes."""

    workers: bool = True
    one_of_several: bool = False


async def serve(directories: Sequence[Path], settings: config.CoordinatorConfig, part: Part) -> None:
    """Serve the runs in these directories until SIGINT or SIGTERM.

    Raises:
        ConfigurationError: no run there, another coordinator serves it, the port is in use, the certificate cannot be used,
            or nodes hold what was signed after the backup that the run was restored from.
    """
    homes, serving = [RunDirectory(directory) for directory in directories], settings.server
    specs = [home.spec() for home in homes]
    if len({spec.run_id for spec in specs}) < len(specs):
        raise ConfigurationError("the same run is given twice; give each directory once")
    secure = serving.tls_certificate is not None
    several = part.one_of_several or serving.workers > 1
    with contextlib.ExitStack() as stack:
        for home in homes:
            if home.shared():
                continue
            if several:
                raise ConfigurationError(f"{home.root}: several processes need PostgreSQL; set database.url")
            stack.enter_context(_only_one(home))
        listener = stack.enter_context(contextlib.closing(_listen(serving.host, serving.port, several=several)))
        port = listener.getsockname()[1]
        url = _url("https" if secure else "http", serving.host, port)
        async with contextlib.AsyncExitStack() as opened:
            services = [await opened.enter_async_context(open_service(home)) for home in homes]
            limits = Limits(**settings.limits.model_dump())
            app = create_app(*services, limits=limits, metrics_public=settings.metrics.public)
            names = ", ".join(f"{spec.name} {spec.run_id.hex()}" for spec in specs)
            server = _Server(app, serving, f"serving run{'s' if len(specs) > 1 else ''} {names} at {url}")
            servers = [server]
            _stop_on_signals(servers, services)
            async with asyncio.TaskGroup() as tasks:
                others = [tasks.create_task(_end_on_failure(servers, services))]
                for home, service in zip(homes, services, strict=True):
                    others += [tasks.create_task(service.run_clock()), tasks.create_task(_appoint(home, service))]
                commands = _further(homes, settings, port) if several and not part.one_of_several else {}
                if part.workers:
                    if secure:
                        # The run owner's own processes need no certificate for this machine's inner address.
                        inner = stack.enter_context(contextlib.closing(_listen("127.0.0.1", 0)))
                        servers.append(_Server(app, config.Server(), None))
                        others.append(tasks.create_task(servers[1].serve(sockets=[inner])))
                        url = _url("http", "127.0.0.1", inner.getsockname()[1])
                    for home, spec in zip(homes, specs, strict=True):
                        where = f"{url}/v1/runs/{spec.run_id.hex()}"
                        label = f" of {spec.name}" if len(specs) > 1 else ""
                        workers = _commands(home, where, serving.host, label)
                        others.append(tasks.create_task(employ(home, workers)))
                        exports = _exports(settings.metrics, where, label)
                        others += [tasks.create_task(supervise(*export, once=True)) for export in exports.items()]
                others += [tasks.create_task(supervise(name, command)) for name, command in commands.items()]
                await server.serve(sockets=[listener])
                for task in others:
                    task.cancel()
            for service in services:
                if service.failure is not None:
                    raise ConfigurationError(service.failure)


def prepare_process() -> None:
    """Make room for thousands of connections: file descriptors, and a garbage collector that seldom looks at all of them.

    Each connection is hundreds of objects that live long; going through all of them took a third of the time.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


async def _appoint(home: RunDirectory, service: Service) -> None:
    """Give their office to auditors that are appointed while the run goes on."""
    known: set[tuple[Role, bytes]] = set()
    while True:
        try:
            for role, key in offices(home):
                if (role, key) not in known and await service.appoint(role, key):
                    known.add((role, key))
        except (SwarmError, OSError) as error:
            log.warning("%s", error)
        await asyncio.sleep(APPOINTMENTS_S)


async def _end_on_failure(servers: list[_Server], services: Sequence[Service]) -> None:
    """A run that cannot go on is served no longer."""
    failed = None
    while failed is None:
        await asyncio.sleep(FAILURE_S)
        failed = next((service.failure for service in services if service.failure is not None), None)
    log.error("%s", failed)
    for service in services:
        service.stop_waiting()
    for server in servers:
        server.should_exit = True


class _Server(uvicorn.Server):
    """Says a line when it is ready, and leaves signals to us: the children have to be ended as well."""

    def __init__(self, app: FastAPI, serving: config.Server, announcement: str | None) -> None:
        settings = uvicorn.Config(
            app,
            http=Connection,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
            timeout_keep_alive=KEEP_ALIVE_S,
            ssl_certfile=serving.tls_certificate,
            ssl_keyfile=serving.tls_key,
            proxy_headers=bool(serving.behind_proxy),
            forwarded_allow_ips=list(serving.behind_proxy),
        )
        try:
            settings.load()
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"the certificate {serving.tls_certificate} and its key {serving.tls_key} cannot be used: {error}. Both are "
                "PEM files; the certificate's comes with its chain"
            ) from error
        super().__init__(settings)
        self._announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._announcement is not None:
            sys.stdout.write(self._announcement + "\n")
            sys.stdout.flush()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _further(homes: Sequence[RunDirectory], settings: config.CoordinatorConfig, port: int) -> dict[str, list[str]]:
    """More processes that serve the API on our port."""
    serving = settings.server
    command = [sys.executable, "-m", "swarm_coordinator", "serve", *(str(home.root) for home in homes)]
    command += ["--host", serving.host, "--port", str(port), "--no-workers", "--one-of-several"]
    if serving.tls_certificate is not None:
        command += ["--tls-certificate", str(serving.tls_certificate), "--tls-key", str(serving.tls_key)]
    return {f"API process {number}": command for number in range(2, serving.workers + 1)}


def _commands(home: RunDirectory, url: str, host: str, label: str) -> dict[str, list[str]]:
    program = [sys.executable, "-m", "swarm_coordinator"]
    commands = {f"checkpoint worker{label}": [*program, "worker", str(home.root), "--url", url, "--host", host]}
    home.gossip_file.unlink(missing_ok=True)
    if home.config().gossip.listen is not None:
        commands[f"gossip{label}"] = [*program, "gossip", str(home.root), "--url", url]
    for path in home.auditor_keys():
        commands[f"auditor {path.stem}{label}"] = [*program, "audit", str(home.root), "--url", url, "--key", str(path)]
    return commands


def _exports(metrics: config.Metrics, url: str, label: str) -> dict[str, list[str]]:
    program = [sys.executable, "-m", "swarm_coordinator", "export-metrics", url, "--follow"]
    commands = {}
    if metrics.tensorboard_dir is not None:
        commands[f"export{label} to TensorBoard"] = [*program, "--tensorboard", str(metrics.tensorboard_dir)]
    if metrics.wandb_project is not None:
        commands[f"export{label} to Weights & Biases"] = [*program, "--wandb", metrics.wandb_project]
    return commands


def _stop_on_signals(servers: list[_Server], services: Sequence[Service]) -> None:
    def stop() -> None:
        if servers[0].should_exit:
            kill_all()
            os._exit(130)
        for service in services:
            service.stop_waiting()
        for server in servers:
            server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)


def _listen(host: str, port: int, *, several: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=several)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host} port {port}: {error.strerror}. Stop what uses it, or choose another --host or --port"
        ) from error
    # Connections inherit it. The event loop sets it only on sockets that were made with a protocol number, and without it an
    # answer in two pieces waits for the client's delayed acknowledgement: 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@contextmanager
def _only_one(home: RunDirectory) -> Iterator[None]:
    """Two coordinators would sign two histories: the second one is refused."""
    descriptor = os.open(home.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:  # a command may have looked just now whether somebody serves the run
                    raise ConfigurationError(f"another coordinator serves {home.root}; stop it first") from error
            time.sleep(LOCK_S / 10)
        yield
    finally:
        os.close(descriptor)
