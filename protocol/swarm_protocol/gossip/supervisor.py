"""The gossip process, kept running: started, asked for its health, started again, stopped.

It is started again with growing pauses when it crashes, does not answer, or holds more tasks or memory than it should:
py-libp2p leaks some per connection. It comes back with the same transport key, port and neighbours. It dies with this
process, and a clean stop leaves neither a process nor a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from swarm_protocol.errors import ConfigurationError, SwarmError, UnreachableError
from swarm_protocol.gossip import wire
from swarm_protocol.gossip.client import Conflict, GossipClient, Provider, Status
from swarm_protocol.identity import Identity
from swarm_protocol.processes import bound_to_parent
from swarm_protocol.records import Envelope, TransportKey
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

START_S = 30.0
HEALTH_EVERY_S = 2.0
ANSWER_S = 5.0
GRACE_S = 3.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
HEALTHY_S = 60.0
MAX_TASKS = 2500
MAX_MEMORY_BYTES = 1 << 30
CERTIFIED_S = 30 * 86400.0
RENEW_AFTER_S = 25 * 86400.0
MAX_REMEMBERED = 32


class GossipProcess:
    """One start of the gossip process with its client, not yet in a run. Use it as a context."""

    def __init__(self, provider: Provider | None = None) -> None:
        self._provider = provider
        self._folder: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._client: GossipClient | None = None

    @property
    def client(self) -> GossipClient:
        assert self._client is not None, "the process was started"
        return self._client

    @property
    def pid(self) -> int:
        assert self._process is not None, "the process was started"
        return self._process.pid

    async def __aenter__(self) -> Self:
        """Raises `UnreachableError` if it does not come up."""
        self._folder = Path(tempfile.mkdtemp(prefix="swarm-gossip-"))
        path = self._folder / "socket"
        try:
            command = [sys.executable, "-m", "swarm_protocol.gossip", str(path)]
            self._process = await asyncio.create_subprocess_exec(
                *bound_to_parent(command), stdout=asyncio.subprocess.PIPE
            )
            assert self._process.stdout is not None
            async with asyncio.timeout(START_S):
                if await self._process.stdout.readline() != b"listening\n":
                    raise UnreachableError("the gossip process ended as it started")
                self._client = await GossipClient.open(path, provider=self._provider)
        except TimeoutError as error:
            await self._end()
            raise UnreachableError("the gossip process did not start in time") from error
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        """Ask it to end, then make it; nothing is left."""
        try:
            if self._client is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GRACE_S):
                        await self._client.close()
            if self._process is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GRACE_S if self._client is not None else 0.0):
                        await self._process.wait()
        finally:
            if self._process is not None:
                for kill in (self._process.kill, lambda: os.killpg(self.pid, signal.SIGKILL)):
                    with contextlib.suppress(ProcessLookupError):
                        kill()
                await self._process.wait()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)


class GossipSupervisor:
    """A node's place in a run's gossip, through all restarts of its process. Use it as a context.

    `spec` is the encoded RunSpec; the rest is `wire.Joining`'s. While the process is down, calls raise `UnreachableError`.
    """

    def __init__(
        self,
        identity: Identity,
        spec: bytes,
        *,
        listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
        bootstrap: Sequence[str] = (),
        announce: Sequence[str] = (),
        target: int = 8,
        provider: Provider | None = None,
        max_tasks: int = MAX_TASKS,
    ) -> None:
        self._identity = identity
        self._run = RunSpec.decode(spec).run_id
        self._joining = wire.Joining(
            os.urandom(32), b"", spec, tuple(listen), tuple(bootstrap), tuple(announce), target
        )
        self._bootstrap = tuple(bootstrap)
        self._provider = provider
        self._max_tasks = max_tasks
        self._records: asyncio.Queue[Envelope] = asyncio.Queue(4096)
        self._conflicts: asyncio.Queue[Conflict] = asyncio.Queue(64)
        self._process: GossipProcess | None = None
        self._up = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self.addresses: list[str] = []
        self.restarts = 0
        self.lost = 0

    async def __aenter__(self) -> Self:
        """Raises `ConfigurationError` if it can never listen, `UnreachableError` if it does not come up."""
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeping = asyncio.create_task(self._keep(started))
        try:
            await started
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End the process; nothing is left of it."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    @property
    def client(self) -> GossipClient:
        """The client of the process that runs now. Raises `UnreachableError` while there is none."""
        if self._process is None:
            raise UnreachableError("the gossip process is being started again")
        return self._process.client

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def up(self) -> GossipClient:
        """The client, once there is a process."""
        while self._process is None:
            await self._up.wait()
        return self._process.client

    async def publish(self, record: Envelope) -> bool:
        """Send a signed record to everybody; see `GossipClient.publish`."""
        return await self.client.publish(record)

    async def status(self) -> Status:
        return await self.client.status()

    async def records(self) -> AsyncIterator[Envelope]:
        """Validated records of others, through all restarts; one that came before a restart may come again."""
        while True:
            yield await self._records.get()

    async def conflict(self) -> Conflict:
        """The next equivocation that was noticed here."""
        return await self._conflicts.get()

    async def _keep(self, started: asyncio.Future[None]) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            since_s = time.monotonic()
            try:
                async with GossipProcess(self._provider) as process:
                    await self._join(process)
                    if not started.done():
                        started.set_result(None)
                    reason = await self._watch(process, since_s)
            except SwarmError as error:
                if not started.done():
                    started.set_exception(error)
                    return
                reason = str(error)
            finally:
                self._process = None
                self._up.clear()
            if time.monotonic() - since_s > HEALTHY_S:
                pause_s = FIRST_PAUSE_S
            self.restarts += 1
            log.warning("the gossip process is started again in %.1f s: %s", pause_s, reason)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _join(self, process: GossipProcess) -> None:

        key = Identity.from_seed(self._joining.seed).public_key
        certificate = TransportKey(
            run=self._run, round=0, key=key, expires_ms=int((time.time() + CERTIFIED_S) * 1000), sequence=self.restarts
        )
        joining = replace(self._joining, certificate=Envelope.sign(self._identity, certificate).encode())
        self.addresses = await process.client.join(joining)
        if not self._joining.announce:
            # The next one listens where this one did, so that neighbours find it.
            self._joining = replace(self._joining, listen=tuple(one.partition("/p2p/")[0] for one in self.addresses))
        self._process = process
        self._up.set()

    async def _watch(self, process: GossipProcess, since_s: float) -> str:
        """Hand on what comes while the process is in good health; returns why it is not."""
        client = process.client
        pumps = [asyncio.create_task(self._pump_records(client)), asyncio.create_task(self._pump_conflicts(client))]
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HEALTH_EVERY_S):
                        await client.closed.wait()
                if client.closed.is_set():
                    return "it ended"
                status = await client.status(timeout_s=ANSWER_S)
                if status.gauges["tasks"] > self._max_tasks:
                    return f"it has {status.gauges['tasks']} tasks"
                if status.gauges["memory_bytes"] > MAX_MEMORY_BYTES:
                    return f"it holds {status.gauges['memory_bytes'] >> 20} MB"
                if time.monotonic() - since_s > RENEW_AFTER_S:
                    return "its certificate is about to expire"
                found = tuple(one.address for one in await client.peers() if one.address)
                if found:
                    self._joining = replace(self._joining, bootstrap=(*self._bootstrap, *found)[:MAX_REMEMBERED])
        except ConfigurationError:
            raise
        except SwarmError as error:
            return str(error)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump_records(self, client: GossipClient) -> None:
        async for envelope in client.records():
            if self._records.full():
                self._records.get_nowait()
                self.lost += 1
            self._records.put_nowait(envelope)

    async def _pump_conflicts(self, client: GossipClient) -> None:
        while True:
            found = await client.conflict()
            with contextlib.suppress(asyncio.QueueFull):
                self._conflicts.put_nowait(found)
