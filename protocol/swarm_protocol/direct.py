"""Calls over direct TLS connections between peers: several at a time to a peer, each used for one call after another.

A peer listens on a port of its own, and tells it to those who ask over the daemon. Whoever cannot connect there goes on
over the daemon and tries again after a while. Blocking reads and writes run in a pool of threads, without Python's lock;
idle connections wait in the event loop and cost no thread. What a call means is decided by whoever dispatches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from swarm_protocol.calls import (
    LENGTHS,
    Answer,
    Bytes,
    Call,
    Header,
    Traffic,
    pack,
    pieces_of,
    unpack_header,
    unpack_lengths,
)
from swarm_protocol.errors import EncodingError, InvalidDataError, RefusedError, SwarmError
from swarm_protocol.identity import Identity
from swarm_protocol.secure_channel import WRITE_BYTES, Certificate, Channel, accept, dial
from swarm_protocol.throttle import TokenBucket

log = logging.getLogger(__name__)

CHANNELS_PER_PEER = 4
MAX_CHANNELS = 512
THREADS = 48
CONNECT_S = 3.0
CALL_S = 120.0
IDLE_S = 60.0
LINGER_S = 2.0
FIRST_RETRY_S = 4.0
RETRY_S = 60.0
MAX_ADDRESSES = 8

Address = tuple[str, int]
T = TypeVar("T")


class NoDirectPathError(ConnectionError):
    """There is no direct connection to the peer, or it broke; the daemon may still reach it."""


class DirectPlane:
    """One peer's listener and its connections to others."""

    def __init__(
        self,
        identity: Identity,
        run: bytes,
        traffic: Traffic,
        *,
        dispatch: Callable[[Call], Awaitable[Answer]],
        ask: Callable[[bytes], Awaitable[list[Address]]],
    ) -> None:
        self._identity = identity
        self._run = run
        self._traffic = traffic
        self._dispatch = dispatch
        self._ask = ask
        self.upload: TokenBucket | None = None
        self._certificate: Certificate | None = None
        self._listener: socket.socket | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._callers: Counter[bytes] = Counter()
        self._idle: dict[bytes, list[Channel]] = defaultdict(list)
        self._gates: dict[bytes, asyncio.Semaphore] = {}
        self._addresses: dict[bytes, list[Address]] = {}
        self._asking: dict[bytes, asyncio.Lock] = {}
        self._avoid_s: dict[bytes, float] = {}
        self._avoid_until: dict[bytes, float] = {}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="direct")
        self._greeting = ThreadPoolExecutor(8, thread_name_prefix="direct-greeting")

    @property
    def port(self) -> int | None:
        """Where we listen, if we do."""
        return None if self._listener is None else int(self._listener.getsockname()[1])

    def listen(self, host: str) -> None:
        """Accept connections on a free port of this IP address. Needs a running event loop."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._certificate = Certificate()
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def close(self) -> None:
        """End all connections and threads."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        for channels in self._idle.values():
            for channel in channels:
                channel.close()
        self._idle.clear()
        for pool in (self._pool, self._greeting):
            pool.shutdown(wait=False, cancel_futures=True)

    # Calling

    async def call(
        self, peer: bytes, header: Header, body: bytes | memoryview, *, max_answer_bytes: int, timeout_s: float
    ) -> tuple[dict[str, Any], Bytes]:
        """One call. The caller sees to it that this is cancelled after `timeout_s`.

        Raises:
            NoDirectPathError: the peer cannot be connected to directly.
            RefusedError, InvalidDataError: as `PeerPlane.call` does.
        """
        deadline = time.monotonic() + timeout_s
        await self._locate(peer)
        async with self._gates.setdefault(peer, asyncio.Semaphore(CHANNELS_PER_PEER)):
            channel = await self._connected(peer)
            head = pack(header, len(body))
            try:
                unsent = await self._pace(channel, head, body, deadline, until_answered=len(body) > WRITE_BYTES)
                converse = partial(_converse, channel, unsent, len(body), max_answer_bytes, deadline)
                answer, content, size, read = await self._blocking(channel, converse)
            except (OSError, EOFError, EncodingError) as error:
                channel.close()
                raise NoDirectPathError(str(error) or "the connection was closed") from error
            except BaseException:
                channel.close()
                raise
            self._traffic.note(peer, "direct", sent=len(head) + len(body), received=read)
            if content is not None:
                channel.idle_since = time.monotonic()
                self._idle[peer].append(channel)
            else:
                channel.close()
        if "refused" in answer:
            raise RefusedError(str(answer["refused"])[:500])
        if content is None:
            raise InvalidDataError(f"an answer of {size} bytes where at most {max_answer_bytes} are allowed")
        return answer, content

    async def _locate(self, peer: bytes) -> None:
        """Know where the peer listens."""
        async with self._asking.setdefault(peer, asyncio.Lock()):
            if time.monotonic() < self._avoid_until.get(peer, 0.0):
                raise NoDirectPathError("no direct connection just now")
            if peer in self._addresses:
                return
            try:
                self._addresses[peer] = await self._ask(peer)
            except SwarmError as error:
                self._avoid(peer)
                raise NoDirectPathError(str(error)) from error
            if not self._addresses[peer]:
                self._avoid(peer)
                raise NoDirectPathError("it does not listen directly")

    async def _connected(self, peer: bytes) -> Channel:
        """An idle connection, or a new one."""
        idle = self._idle[peer]
        while idle:
            channel = idle.pop()
            if time.monotonic() - channel.idle_since < IDLE_S / 2 and not channel.stale():
                return channel
            channel.close()
        for address in self._addresses.get(peer, ())[:MAX_ADDRESSES]:
            try:
                deadline = time.monotonic() + CONNECT_S
                channel = await self._greet(partial(dial, address, self._identity, self._run, peer, deadline))
                self._avoid_s.pop(peer, None)
                return channel
            except (OSError, EOFError, InvalidDataError) as error:
                log.debug("no direct connection to %s: %s", address, error)
        self._avoid(peer)
        raise NoDirectPathError("none of its addresses answers")

    def _avoid(self, peer: bytes) -> None:
        """Go over the daemon for a while: short at first, since networks heal."""
        self._addresses.pop(peer, None)
        self._avoid_s[peer] = min(RETRY_S, 2 * self._avoid_s.get(peer, FIRST_RETRY_S / 2))
        self._avoid_until[peer] = time.monotonic() + self._avoid_s[peer]

    # Answering

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            plain, _ = self._listener.accept()
            if len(self._serving) >= MAX_CHANNELS:
                plain.close()
                return
            task = asyncio.create_task(self._serve(plain))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def _serve(self, plain: socket.socket) -> None:
        """Answer one call after another, until either side has had enough."""
        assert self._certificate is not None
        deadline = time.monotonic() + CONNECT_S
        try:
            channel = await self._greet(partial(accept, plain, self._certificate, self._identity, self._run, deadline))
        except (OSError, EOFError, InvalidDataError) as error:
            log.debug("a direct connection came to nothing: %s", error)
            return
        except asyncio.CancelledError:
            plain.close()
            raise
        self._callers[channel.peer] += 1
        try:
            if self._callers[channel.peer] > 2 * CHANNELS_PER_PEER:
                return
            while True:
                async with asyncio.timeout(IDLE_S):
                    await _readable(channel)
                if not await self._answer(channel):
                    return
        except (OSError, EOFError, InvalidDataError) as error:
            log.debug("a direct connection ended: %s", error)
        finally:
            self._callers[channel.peer] -= 1
            if not self._callers[channel.peer]:
                del self._callers[channel.peer]
            channel.close()

    async def _answer(self, channel: Channel) -> bool:
        """Answer the next call; False if the connection cannot be used for another one."""
        deadline = time.monotonic() + CALL_S
        header, size, head_bytes = await self._blocking(channel, partial(_receive_header, channel, deadline))
        self._traffic.note(channel.peer, "direct", received=head_bytes)
        unread = size

        async def receive(use: Callable[[Bytes], T]) -> T:
            nonlocal unread
            result = await self._blocking(channel, partial(_receive_body, channel, size, deadline, use))
            unread = 0
            self._traffic.note(channel.peer, "direct", received=size)
            return result

        answer = await self._dispatch(Call(channel.peer, header, size, receive))
        head = pack(answer.header, len(answer.body))
        unsent = await self._pace(channel, head, answer.body, deadline, urgent=answer.urgent)
        await self._blocking(channel, partial(channel.send, *(unsent or ()), deadline=deadline))
        self._traffic.note(channel.peer, "direct", sent=len(head) + len(answer.body))
        if unread:
            await self._blocking(channel, partial(channel.drain, time.monotonic() + LINGER_S))
        return not unread

    async def _pace(
        self, channel: Channel, head: bytes, body: Bytes | memoryview, deadline: float, *,
        urgent: bool = True, until_answered: bool = False,
    ) -> list[Bytes | memoryview] | None:  # fmt: skip
        """Send as slowly as the limit wants, all but the last piece; without a limit nothing is sent yet.

        Returns what is still to be sent, or None where the other side would not hear the rest (`Channel.send`).
        """
        if self.upload is None:
            return [head, body]
        pieces = pieces_of(head, body)
        for piece in pieces[:-1]:
            await self.upload.wait(len(piece), urgent=urgent)
            send = partial(channel.send, piece, deadline=deadline, until_answered=until_answered)
            if not await self._blocking(channel, send):
                return None
        await self.upload.wait(len(pieces[-1]), urgent=urgent)
        return pieces[-1:]

    async def _greet(self, shake_hands: Callable[[], Channel]) -> Channel:
        """A new channel. One that is made when nobody waits for it any more is closed."""
        running = self._greeting.submit(shake_hands)
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            running.add_done_callback(_discard)
            raise

    async def _blocking(self, channel: Channel, work: Callable[[], T]) -> T:
        """Run blocking work on a channel in a thread. Cancelling this breaks the channel, and waits for the thread."""
        running = self._pool.submit(work)
        outcome = asyncio.wrap_future(running)
        try:
            return await asyncio.shield(outcome)
        except asyncio.CancelledError:
            if not running.cancel() and not running.done():
                channel.abort()
                with contextlib.suppress(Exception):
                    await outcome
            raise


def _discard(made: Future[Channel]) -> None:
    if not made.cancelled() and made.exception() is None:
        made.result().close()


def parse_addresses(value: object) -> list[Address]:
    """The addresses that a peer says it listens on: at most `MAX_ADDRESSES` pairs of IP address and port.

    Raises:
        InvalidDataError
    """
    if not isinstance(value, list) or len(value) > MAX_ADDRESSES:
        raise InvalidDataError(f"up to {MAX_ADDRESSES} addresses were expected")
    found = []
    for item in value:
        match item:
            case [str(host), int(port)] if 0 < port < 1 << 16:
                try:
                    found.append((str(ipaddress.ip_address(host)), port))
                except ValueError as error:
                    raise InvalidDataError("an address that is none") from error
            case _:
                raise InvalidDataError("an address is an IP address and a port")
    return found


def _converse(
    channel: Channel, unsent: list[Bytes | memoryview] | None, body_bytes: int, max_answer_bytes: int, deadline: float
) -> tuple[dict[str, Any], Bytes | None, int, int]:
    """Send what is left of a call and receive its answer: header, body, declared size of the body, bytes received.

    There is no body where it is larger than allowed, or where the call was refused half way; the channel is spent then.
    """
    whole = unsent is not None and channel.send(*unsent, deadline=deadline, until_answered=body_bytes > WRITE_BYTES)
    header, size, head_bytes = _receive_header(channel, deadline)
    if not whole and "refused" not in header:
        raise EncodingError("an answer before the call was complete")
    if not whole or size > max_answer_bytes or ("refused" in header and body_bytes):
        return header, None, size, head_bytes
    return header, channel.receive(size, deadline), size, head_bytes + size


def _receive_header(channel: Channel, deadline: float) -> tuple[dict[str, Any], int, int]:
    """Header, size of the body, and size of this message so far."""
    length, size = unpack_lengths(channel.receive(LENGTHS.size, deadline))
    return unpack_header(channel.receive(length, deadline)), size, LENGTHS.size + length


def _receive_body(channel: Channel, size_bytes: int, deadline: float, use: Callable[[Bytes], T]) -> T:
    content = bytearray(size_bytes)
    channel.receive_into(memoryview(content), deadline)
    return use(content)


async def _readable(channel: Channel) -> None:
    """Wait until there is something to read."""
    if channel.stale():
        return
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    loop.add_reader(channel, arrived.set)
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(channel)
