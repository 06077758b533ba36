"""`GossipClient`: the gossip process, driven from asyncio over its Unix socket.

Loads neither py-libp2p nor torch nor hivemind. What it hands out was validated by our own gossip process, and is as good as
its signatures: whoever acts on a record opens its envelope. Every call has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm_protocol import encoding, errors
from swarm_protocol.errors import EncodingError, HashMismatchError, RefusedError, SwarmError, UnreachableError
from swarm_protocol.gossip import wire
from swarm_protocol.records import Envelope

log = logging.getLogger(__name__)

CALL_S = 10.0
FETCH_S = 30.0
MAX_RECORDS = 4096
MAX_CONFLICTS = 64
PEERS_ASKED = 4

Provider = Callable[[wire.Wanted], Awaitable[bytes]]


@dataclass(frozen=True)
class Neighbour:
    """A neighbour that follows the run: its transport PeerID, its identity's, its score, 0 at best, and where it listens."""

    peer: str
    identity: str
    score: float
    address: str


@dataclass(frozen=True)
class Status:
    """What the gossip process counts and holds, and where it listens."""

    counters: dict[str, int]
    gauges: dict[str, int]
    addresses: list[str]


@dataclass(frozen=True)
class Conflict:
    """Two different records that one key signed under one name."""

    first: Envelope
    second: Envelope


class GossipClient:
    """One gossip process. `provider` answers what others want of the log (see `log_ranges`); without it they are refused."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, provider: Provider | None = None
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._provider = provider
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._records: asyncio.Queue[Envelope | None] = asyncio.Queue(MAX_RECORDS)
        self._conflicts: asyncio.Queue[Conflict] = asyncio.Queue(MAX_CONFLICTS)
        self._tasks: set[asyncio.Task[None]] = set()
        self.lost = 0
        self.closed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, path: Path, *, provider: Provider | None = None) -> GossipClient:
        """Connect to the process that listens at `path`. Raises `UnreachableError`."""
        try:
            async with asyncio.timeout(CALL_S):
                reader, writer = await asyncio.open_unix_connection(path)
        except (OSError, TimeoutError) as error:
            raise UnreachableError(f"the gossip process does not answer at {path}: {error}") from error
        return cls(reader, writer, provider)

    async def close(self) -> None:
        """Tell the process to end."""
        with contextlib.suppress(OSError):
            self._send({"do": "stop"})
            await self._writer.drain()
        self._writer.close()
        self._reading.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._reading, *self._tasks, return_exceptions=True)
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def ask_spec(self, address: str) -> bytes:
        """The encoded spec of the run that is gossiped at an address, unchecked, before anything is joined."""
        return bytes(await self._call("ask", FETCH_S, address=address))

    async def join(self, joining: wire.Joining) -> list[str]:
        """Take part in a run; returns the multiaddrs under which others reach us.

        Raises:
            ConfigurationError: it cannot listen where it should.
        """
        return [str(one) for one in await self._call("join", FETCH_S, joining=joining.encode())]

    async def publish(self, record: Envelope | bytes) -> bool:
        """Send a signed record to everybody. False if it was known already.

        Raises:
            RefusedError: nobody would pass it on, for the reason given; or too much is waiting.
        """
        data = record if isinstance(record, bytes) else record.encode()
        return str(await self._call("publish", CALL_S, data=data)) == "accepted"

    async def records(self) -> AsyncIterator[Envelope]:
        """Validated records that others sent, as they come, each once; ends when the process does."""
        while True:
            envelope = await self._records.get()
            if envelope is None:
                self._records.put_nowait(None)
                return
            yield envelope

    async def conflict(self) -> Conflict:
        """The next equivocation that was noticed here."""
        return await self._conflicts.get()

    async def connect(self, address: str) -> str:
        """Make a neighbour of whoever listens at a multiaddr; returns the PeerID of its identity."""
        return str(await self._call("connect", FETCH_S, address=address))

    async def peers(self) -> list[Neighbour]:
        """The neighbours, the best first."""
        return [
            Neighbour(str(one["peer"]), str(one["identity"]), float(one["score"]), str(one["address"]))
            for one in await self._call("peers")
        ]

    async def status(self, *, timeout_s: float = CALL_S) -> Status:
        """Counters and gauges."""
        found = await self._call("status", timeout_s)
        return Status(dict(found["counters"]), dict(found["gauges"]), [str(one) for one in found["addresses"]])

    async def fetch(self, wanted: wire.Wanted, check: Callable[[bytes], None]) -> bytes:
        """What some neighbour answers and `check` finds right; one whose answer is wrong is punished.

        Raises:
            UnreachableError: no neighbour has it.
        """
        reason = "there are no neighbours"
        for neighbour in (await self.peers())[:PEERS_ASKED]:
            try:
                data = bytes(await self._call("fetch", FETCH_S, peer=neighbour.peer, wanted=wanted.encode()))
            except (RefusedError, UnreachableError, EncodingError) as error:
                reason = str(error)
                continue
            try:
                check(data)
            except errors.InvalidDataError as error:
                reason = f"{neighbour.identity} answers wrongly: {error}"
                log.warning("%s", reason)
                await self._call("punish", peer=neighbour.peer)
                continue
            return data
        raise UnreachableError(f"no neighbour has it: {reason}")

    async def record(self, record_hash: bytes) -> Envelope:
        """A recent record by its hash. Raises `UnreachableError`."""

        def check(data: bytes) -> None:
            if Envelope.decode(data).open().hash != record_hash:
                raise HashMismatchError("another record than the one asked for")

        return Envelope.decode(await self.fetch(wire.Wanted("record", hash=record_hash), check))

    # The socket

    async def _call(self, command: str, timeout_s: float = CALL_S, **arguments: Any) -> Any:
        if self.closed.is_set():
            raise UnreachableError("the gossip process is gone")
        self._number += 1
        number = self._number
        waiting: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = waiting
        try:
            async with asyncio.timeout(timeout_s):
                self._send({"do": command, "id": number, **arguments})
                await self._writer.drain()
                return await waiting
        except (TimeoutError, OSError) as error:
            raise UnreachableError(f"the gossip process does not answer ({command})") from error
        finally:
            del self._calls[number]

    def _send(self, message: dict[str, Any]) -> None:
        data = encoding.encode(message)
        self._writer.write(len(data).to_bytes(4, "big") + data)

    async def _read(self) -> None:
        try:
            while True:
                size = int.from_bytes(await self._reader.readexactly(4), "big")
                if size > wire.MAX_CONTROL_BYTES:
                    raise EncodingError("the gossip process sends more than is allowed")
                self._take(wire.decoded_map(await self._reader.readexactly(size), wire.MAX_CONTROL_BYTES))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.closed.set()
            for waiting in self._calls.values():
                if not waiting.done():
                    waiting.set_exception(UnreachableError("the gossip process is gone"))
            while self._records.full():
                self._records.get_nowait()
            self._records.put_nowait(None)

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            waiting = self._calls.get(message["id"])
            if waiting is None or waiting.done():
                return
            if "error" in message:
                waiting.set_exception(_error(str(message["error"]), str(message["reason"])))
            else:
                waiting.set_result(message["answer"])
        elif message.get("event") == "record":
            if self._records.full():
                self.lost += 1
                self._records.get_nowait()
            self._records.put_nowait(Envelope.decode(message["data"]))
        elif message.get("event") == "equivocation":
            with contextlib.suppress(asyncio.QueueFull):
                found = Conflict(Envelope.decode(message["first"]), Envelope.decode(message["second"]))
                self._conflicts.put_nowait(found)
        elif message.get("event") == "wanted":
            task = asyncio.create_task(self._provide(int(message["number"]), wire.Wanted.decode(message["wanted"])))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _provide(self, number: int, wanted: wire.Wanted) -> None:
        payload: bytes | None = None
        if self._provider is not None:
            try:
                payload = await self._provider(wanted)
            except SwarmError as error:
                log.debug("not provided: %s", error)
        with contextlib.suppress(OSError):
            self._send({"do": "provide", "number": number, "payload": payload})
            await self._writer.drain()


def _error(name: str, reason: str) -> SwarmError:
    """The error that the process raised, of the same class where it has no other arguments."""
    found = getattr(errors, name, None)
    if isinstance(found, type) and issubclass(found, SwarmError):
        return found(reason)
    return SwarmError(reason)
