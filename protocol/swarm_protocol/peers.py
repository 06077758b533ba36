"""The peer plane: hivemind's Go daemon and Kademlia DHT, and calls from one peer to another over its streams.

A call is one stream: a small canonical header and a body of declared size in each direction. The caller's key is the one
that libp2p authenticated. Every wait has a deadline; a header or a body above its bound is refused before it is read.
Whoever answers a call decides what is allowed; nothing here knows about rounds.

Addresses are found in the DHT by PeerID: every peer stores its own signed `Addresses` record there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import struct
import time
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarm_protocol import encoding, processes
from swarm_protocol.errors import (
    ConfigurationError,
    EncodingError,
    InvalidDataError,
    RefusedError,
    SwarmError,
    UnreachableError,
)
from swarm_protocol.identity import Identity, peer_id
from swarm_protocol.records import Addresses, Envelope

log = logging.getLogger(__name__)

PROTOCOL = "/swarm-node/call/1"
MAX_HEADER_BYTES = 1 << 16
WRITE_BYTES = 1 << 18
ADDRESS_TTL_S = 600.0
LINGER_S = 2.0

Header = Mapping[str, encoding.Value]


@dataclass
class Traffic:
    """Bytes of calls in both directions, headers included, without what the transport adds."""

    sent: int = 0
    received: int = 0


@dataclass
class Call:
    """A call as its handler sees it: who calls, what for, and how large the body is that has not been read yet."""

    caller: bytes
    header: dict[str, Any]
    size_bytes: int
    _reader: asyncio.StreamReader
    _traffic: Traffic

    async def body(self, max_bytes: int) -> bytes:
        """Read the body.

        Raises:
            RefusedError: it was declared larger than `max_bytes`.
        """
        if self.size_bytes > max_bytes:
            raise RefusedError(f"a body of {self.size_bytes} bytes where at most {max_bytes} are allowed")
        content = await self._reader.readexactly(self.size_bytes)
        self._traffic.received += self.size_bytes
        return content


@dataclass(frozen=True)
class Answer:
    header: Header = field(default_factory=dict)
    body: bytes | memoryview = b""


Handler = Callable[[Call], Awaitable[Answer]]


class PeerPlane:
    """One daemon, one DHT node, and the calls that go through them. Use `start`, and `close` at the end."""

    def __init__(self, identity: Identity, run: bytes, p2p: Any, dht: Any) -> None:
        self.identity = identity
        self.traffic = Traffic()
        self._run = run
        self._p2p = p2p
        self._dht = dht
        self._handlers: dict[str, Handler] = {}
        self._connected: dict[bytes, float] = {}

    @classmethod
    async def start(
        cls,
        identity_path: Path,
        run: bytes,
        *,
        initial_peers: Sequence[str] = (),
        listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
        client_only: bool = False,
        timeout_s: float = 30.0,
    ) -> PeerPlane:
        """Start the daemon and join the DHT. Call it before any thread is started: hivemind forks.

        Raises:
            ConfigurationError: the daemon does not start; says what to check.
            UnreachableError: none of `initial_peers` answered.
        """
        identity = Identity.load(identity_path)
        hivemind, guarded_p2p, guarded_dht = _hivemind()
        mode = "client" if client_only else "server"
        try:
            p2p = await asyncio.wait_for(
                guarded_p2p.create(
                    initial_peers=list(initial_peers) or None,
                    host_maddrs=list(listen),
                    identity_path=str(identity_path),
                    check_if_identity_free=False,
                    dht_mode=mode,
                    nat_port_map=False,
                    startup_timeout=timeout_s,
                ),
                timeout_s + 5,
            )
        except (OSError, TimeoutError, hivemind.p2p.P2PDaemonError) as error:
            if initial_peers and "bootstrap peers" in str(error):
                raise UnreachableError(f"no peer of the run answers on {', '.join(initial_peers)}") from error
            if "bootstrap peers" in str(error):
                raise UnreachableError(f"no peer of the run answers on {', '.join(initial_peers)}") from error
            raise ConfigurationError(
                f"the peer daemon does not start ({str(error) or 'it did not answer'})."
                f" Check that the ports {list(listen)} are free, that {_daemon_path(hivemind)} may be executed, that there"
                " is memory left, and that no other swarm-node runs with this data directory."
            ) from error
        try:
            dht = guarded_dht(
                initial_peers=list(initial_peers) or None,
                p2p=p2p,
                start=False,
                client_mode=client_only,
                record_validators=(),
            )
            dht.start()
            await asyncio.wait_for(asyncio.to_thread(dht.wait_until_ready, timeout_s), timeout_s + 5)
        except Exception as error:
            await p2p.shutdown()
            raise UnreachableError(f"no peer of the run answers on {', '.join(initial_peers)}: {error}") from error
        return cls(identity, run, p2p, dht)

    async def close(self) -> None:
        """Stop the DHT and the daemon; nothing of them is left when this returns."""
        daemon = self._p2p._child
        with contextlib.suppress(Exception):
            await asyncio.wait_for(asyncio.to_thread(self._dht.shutdown), 10)
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._p2p.shutdown(), 5)
        if daemon is not None:
            with contextlib.suppress(ProcessLookupError):
                daemon.kill()
            with contextlib.suppress(Exception):
                await asyncio.wait_for(daemon.wait(), 5)
            daemon._transport.close()  # or it complains when the loop is gone

    async def addresses(self) -> list[str]:
        """Our own multiaddresses, each ending in our PeerID."""
        return [str(address) for address in await self._p2p.get_visible_maddrs(latest=True)]

    # Serving

    async def serve(self, handlers: Mapping[str, Handler]) -> None:
        """Answer calls whose header names an operation in `handlers`."""
        self._handlers.update(handlers)
        await self._p2p.add_binary_stream_handler(PROTOCOL, self._answer)

    async def _answer(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(120):
                header, size = await self._receive_header(reader)
                answer = await self._dispatch(bytes(info.peer_id.to_bytes())[-32:], header, size, reader)
                await self._send(writer, answer.header, answer.body)
                if size and "refused" in answer.header:
                    await _hear_out(reader)
        except (OSError, EOFError, TimeoutError, EncodingError) as error:
            log.debug("a call broke off: %s", error)
        finally:
            writer.close()

    async def _dispatch(self, caller: bytes, header: dict[str, Any], size: int, reader: asyncio.StreamReader) -> Answer:
        handler = self._handlers.get(str(header.get("op")))
        if handler is None:
            return Answer({"refused": "no such operation"})
        try:
            return await handler(Call(caller, header, size, reader, self.traffic))
        except (SwarmError, KeyError, TypeError, ValueError) as error:
            return Answer({"refused": str(error)[:500] or type(error).__name__})
        except (OSError, EOFError, TimeoutError):
            raise
        except Exception:  # a fault of ours must not take the peer plane down with it
            log.exception("answering %s failed", header.get("op"))
            return Answer({"refused": "internal error"})

    # Calling

    async def call(
        self, peer: bytes, header: Header, body: bytes | memoryview = b"", *, max_answer_bytes: int, timeout_s: float
    ) -> tuple[dict[str, Any], bytes]:
        """Call the peer with this public key; returns its answer's header and body.

        Raises:
            UnreachableError: no answer within `timeout_s`.
            RefusedError: the peer says why it does not do it.
            InvalidDataError: the answer breaks the rules.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._call(peer, header, body, max_answer_bytes)
        except (OSError, EOFError, TimeoutError) as error:
            self._connected.pop(peer, None)
            raise UnreachableError(f"{peer_id(peer)} does not answer: {str(error) or 'timed out'}") from error

    async def _call(
        self, peer: bytes, header: Header, body: bytes | memoryview, max_answer_bytes: int
    ) -> tuple[dict[str, Any], bytes]:
        reader, writer = await self._open(peer)
        sending = asyncio.create_task(self._send(writer, header, body))
        try:
            answer, size = await self._receive_header(reader)
            if "refused" in answer:  # perhaps long before all of the body was sent
                raise RefusedError(str(answer["refused"])[:500])
            await sending
            if size > max_answer_bytes:
                raise InvalidDataError(f"an answer of {size} bytes where at most {max_answer_bytes} are allowed")
            content = await reader.readexactly(size)
            self.traffic.received += size
            return answer, content
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            writer.close()

    async def _open(self, peer: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        hivemind, _, _ = _hivemind()
        target = hivemind.p2p.PeerID.from_base58(peer_id(peer))
        if peer not in self._connected:
            await self._connect(peer)
        try:
            _, reader, writer = await self._p2p.call_binary_stream_handler(target, PROTOCOL)
        except Exception as error:  # the daemon's own errors are not OSErrors
            raise ConnectionError(str(error) or "no route") from error
        self._connected[peer] = time.monotonic()
        return reader, writer

    async def _connect(self, peer: bytes) -> None:
        """Dial the addresses that the peer stored in the DHT; without any, the daemon's own routing has to do."""
        for address in await self.lookup(peer):
            with contextlib.suppress(Exception):
                await self.dial([address])
                return

    async def dial(self, multiaddrs: Sequence[str], timeout_s: float = 5.0) -> None:
        """Make sure that there is a connection to the peer behind these addresses. Does nothing if there is one."""
        hivemind, _, _ = _hivemind()
        from hivemind.utils.multiaddr import Multiaddr

        for text in multiaddrs:
            whole = Multiaddr(text)
            target = hivemind.p2p.PeerID.from_base58(whole["p2p"])
            plain = Multiaddr(text.split("/p2p/")[0])
            await asyncio.wait_for(self._p2p._client.connect(target, [plain]), timeout_s)

    # Addresses in the DHT

    async def announce(self, envelope: Envelope, timeout_s: float = 10.0) -> None:
        """Store our signed `Addresses` under our PeerID. A few hundred bytes; larger values can hang hivemind's DHT.

        Raises:
            UnreachableError
        """
        hivemind, _, _ = _hivemind()
        future = self._dht.store(
            self._dht_key(self.identity.public_key),
            envelope.encode(),
            hivemind.utils.get_dht_time() + ADDRESS_TTL_S,
            return_future=True,
        )
        try:
            await asyncio.to_thread(future.result, timeout_s)
        except Exception as error:
            raise UnreachableError(f"the DHT does not store our addresses: {error}") from error

    async def lookup(self, peer: bytes, timeout_s: float = 5.0) -> list[str]:
        """The addresses that this peer announced and signed, or none."""
        future = self._dht.get(self._dht_key(peer), latest=True, return_future=True)
        try:
            found = await asyncio.to_thread(future.result, timeout_s)
        except Exception as error:  # noqa: BLE001  # whatever the DHT process raised
            log.debug("the DHT does not answer: %s", error)
            return []
        if found is None or not isinstance(found.value, bytes) or len(found.value) > MAX_HEADER_BYTES:
            return []
        try:
            record = Envelope.decode(found.value).open_as(Addresses, run=self._run, key=peer)
        except InvalidDataError as error:
            log.warning("the DHT holds addresses of %s that are not its own: %s", peer_id(peer), error)
            return []
        return list(record.multiaddrs)

    def _dht_key(self, peer: bytes) -> str:
        return f"swarm-node/{self._run.hex()[:16]}/addresses/{peer_id(peer)}"

    # Framing: u32 header length, u64 body length, header, body

    async def _send(self, writer: asyncio.StreamWriter, header: Header, body: bytes | memoryview) -> None:
        head = encoding.encode(header)
        writer.write(struct.pack("<IQ", len(head), len(body)) + head)
        view = memoryview(body)
        for start in range(0, len(view), WRITE_BYTES):
            writer.write(view[start : start + WRITE_BYTES])
            await writer.drain()
        await writer.drain()
        self.traffic.sent += 12 + len(head) + len(view)

    async def _receive_header(self, reader: asyncio.StreamReader) -> tuple[dict[str, Any], int]:
        length, size = struct.unpack("<IQ", await reader.readexactly(12))
        if length > MAX_HEADER_BYTES:
            raise EncodingError("a header beyond its bound")
        header = encoding.decode(await reader.readexactly(length), max_bytes=MAX_HEADER_BYTES)
        if not isinstance(header, dict):
            raise EncodingError("a header is a map")
        self.traffic.received += 12 + length
        return header, size


async def _hear_out(reader: asyncio.StreamReader) -> None:
    """Discard what a caller goes on sending after a refusal: to close on it would lose the refusal as well."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while await reader.read(WRITE_BYTES):
                pass


_loaded: tuple[Any, Any, Any] | None = None


def _hivemind() -> tuple[Any, Any, Any]:
    """hivemind, quiet, and its P2P and DHT as classes whose processes die with ours."""
    global _loaded
    if _loaded is not None:
        return _loaded
    processes.require_platform()
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "CRITICAL")
    # Its other way of sharing memory starts a torch_shm_manager, which outlives a killed node.
    os.environ.setdefault("HIVEMIND_MEMORY_SHARING_STRATEGY", "file_descriptor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hivemind
        from hivemind.p2p import P2P
    with contextlib.suppress(RuntimeError):
        multiprocessing.set_start_method("fork")

    class GuardedP2P(P2P):  # type: ignore[misc]
        @staticmethod
        def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
            return processes.bound_to_parent(P2P._make_process_args(*args, **kwargs))

        def __del__(self) -> None:
            # hivemind's own fails, visibly, where the daemon never started.
            with contextlib.suppress(AttributeError):
                super().__del__()

    class GuardedDHT(hivemind.DHT):  # type: ignore[misc]
        def run(self) -> None:
            processes.die_with_parent(self._parent_pid)
            super().run()

    _loaded = (hivemind, GuardedP2P, GuardedDHT)
    return _loaded


def _daemon_path(hivemind: Any) -> Path:
    return Path(hivemind.__file__).parent / "hivemind_cli" / "p2pd"
