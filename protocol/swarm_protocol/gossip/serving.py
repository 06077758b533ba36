"""The gossip process as its parent drives it: one Unix socket, one client, commands with answers, and events.

The socket is made with mode 0600 in a private directory, takes one client of the same user, and is gone when the process
ends; the process ends when its client is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from swarm_protocol import encoding
from swarm_protocol.errors import ConfigurationError, EncodingError, RefusedError, SwarmError
from swarm_protocol.gossip import fetching, wire
from swarm_protocol.gossip.process import Plane
from swarm_protocol.gossip.transport import dial, new_gossip_host

log = logging.getLogger(__name__)

CLIENT_WITHIN_S = 20.0
PROVIDED_WITHIN_S = 10.0
MAX_EVENTS = 1024

Command = Callable[[dict[str, Any]], Awaitable[Any]]


async def serve(path: Path) -> None:
    """Listen at `path` for the one client, and do as it says until it says stop or is gone.

    Raises:
        ConfigurationError: the socket cannot be made.
    """
    listener = _listening(path)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    try:
        with trio.fail_after(CLIENT_WITHIN_S):
            client, _ = await listener.accept()
    finally:
        listener.close()
        path.unlink(missing_ok=True)  # noqa: ASYNC240
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # nothing is left, however this process ends
    _, user, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if user != os.getuid():
        raise ConfigurationError("another user connects to the gossip process")
    async with trio.open_nursery() as nursery:
        await _Session(trio.SocketStream(client), nursery).run()
        nursery.cancel_scope.cancel()


def _listening(path: Path) -> trio.socket.SocketType:
    listener = trio.socket.from_stdlib_socket(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    before = os.umask(0o177)
    try:
        # A synchronous bind: the umask must not be anybody else's meanwhile.
        listener._sock.bind(str(path))  # type: ignore[attr-defined]
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"the socket {path} cannot be made: {error.strerror}") from error
    finally:
        os.umask(before)
    return listener


class _Session:
    """One client's commands, each in a task of its own, and the events for it."""

    def __init__(self, stream: trio.SocketStream, nursery: trio.Nursery) -> None:
        self._stream = stream
        self._nursery = nursery
        self._plane: Plane | None = None
        self._waiting: deque[dict[str, Any]] = deque()
        self._more = trio.Event()
        self._answers: dict[int, trio.MemorySendChannel[bytes | None]] = {}
        self._asked = 0
        self._commands: dict[str, Command] = {
            "ask": self._ask,
            "join": self._join,
            "publish": self._publish,
            "connect": self._connect,
            "fetch": self._fetch,
            "peers": self._peers,
            "status": self._status,
            "punish": self._punish,
        }

    async def run(self) -> None:
        self._nursery.start_soon(self._write)
        while True:
            head = await self._read(4)
            if head is None:
                break
            size = int.from_bytes(head, "big")
            if size > wire.MAX_CONTROL_BYTES:
                raise EncodingError("the client sends more than is allowed")
            raw = await self._read(size)
            if raw is None:
                break
            message = wire.decoded_map(raw, wire.MAX_CONTROL_BYTES)
            if message.get("do") == "stop":
                break
            if message.get("do") == "provide":
                self._provided(message)
            else:
                self._nursery.start_soon(self._do, message)
        if self._plane is not None:
            self._plane.stop()
            with trio.move_on_after(1.0):
                await self._plane.host.close()

    async def _read(self, size: int) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            try:
                piece = await self._stream.receive_some(size - len(data))
            except trio.BrokenResourceError:
                return None
            if not piece:
                return None
            data += piece
        return bytes(data)

    async def _do(self, message: dict[str, Any]) -> None:
        command = self._commands.get(str(message.get("do")))
        try:
            if command is None:
                raise EncodingError(f"there is no command {message.get('do')!r:.40}")
            answer = {"id": message["id"], "answer": await command(message)}
        except SwarmError as error:
            answer = {"id": message["id"], "error": type(error).__name__, "reason": str(error)}
        self._put(answer)

    def _put(self, message: dict[str, Any]) -> None:
        """Queue for the client; events give way, the oldest first, when it does not keep up."""
        self._waiting.append(message)
        if len(self._waiting) > MAX_EVENTS:
            for index, one in enumerate(self._waiting):
                if "event" in one:
                    del self._waiting[index]
                    break
            if self._plane is not None:
                self._plane.counters["undelivered"] += 1
        self._more.set()

    async def _write(self) -> None:
        while True:
            await self._more.wait()
            self._more = trio.Event()
            while self._waiting:
                data = encoding.encode(self._waiting.popleft())
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self._stream.send_all(len(data).to_bytes(4, "big") + data)

    # Commands

    @property
    def _joined(self) -> Plane:
        if self._plane is None:
            raise RefusedError("no run was joined yet")
        return self._plane

    async def _ask(self, message: dict[str, Any]) -> bytes:
        """A run's spec from whoever listens at an address, before anything is joined."""
        host, found, failed = new_gossip_host(os.urandom(32)), b"", None
        async with host.run([]):
            # An error that leaves this block comes out as one of py-libp2p's.
            try:
                peer = await dial(host, str(message["address"]))
                found = await fetching.fetch(host, peer, wire.Wanted("spec"))
            except SwarmError as error:
                failed = error
            finally:
                with trio.CancelScope(deadline=trio.current_time() + 2.0, shield=True):
                    await host.close()
        if failed is not None:
            raise failed
        return found

    async def _join(self, message: dict[str, Any]) -> list[str]:
        if self._plane is not None:
            raise RefusedError("a run was joined already")
        self._plane = Plane(wire.Joining.decode(message["joining"]), self._put, self._provide)
        try:
            return list(await self._nursery.start(self._plane.run))
        except SwarmError:
            self._plane = None
            raise

    async def _publish(self, message: dict[str, Any]) -> str:
        return self._joined.publish(bytes(message["data"]))

    async def _connect(self, message: dict[str, Any]) -> str:
        return await self._joined.connect(str(message["address"]))

    async def _fetch(self, message: dict[str, Any]) -> bytes:
        return await self._joined.fetch(str(message["peer"]), wire.Wanted.decode(message["wanted"]))

    async def _peers(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        return self._joined.peers()

    async def _status(self, message: dict[str, Any]) -> dict[str, Any]:
        return self._joined.status()

    async def _punish(self, message: dict[str, Any]) -> None:
        """The parent found out that a neighbour's answer was wrong."""
        self._joined.blame(str(message["peer"]), "an answer that is wrong")

    # What others want of the log, which the parent has

    async def _provide(self, wanted: wire.Wanted) -> bytes:
        self._asked += 1
        number = self._asked
        send, receive = trio.open_memory_channel[bytes | None](1)
        self._answers[number] = send
        self._put({"event": "wanted", "number": number, "wanted": wanted.encode()})
        try:
            with trio.move_on_after(PROVIDED_WITHIN_S):
                payload = await receive.receive()
                if payload is not None:
                    return payload
        finally:
            del self._answers[number]
        raise RefusedError("not here")

    def _provided(self, message: dict[str, Any]) -> None:
        waiting = self._answers.get(int(message["number"]))
        if waiting is not None:
            with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError):
                waiting.send_nowait(message["payload"])
