"""The peer plane: hivemind's Go daemon and Kademlia DHT, and calls from one peer to another over its streams.

A call is a small canonical header and a body of declared size in each direction: one stream through the daemon, or, where
the two can reach each other, a direct TLS connection (`direct`), which costs a fraction. The caller's key is the one
that libp2p, or the direct connection's handshake, authenticated. Every wait has a deadline; a header or a body above its
bound is refused before it is read. Whoever answers a call decides what is allowed; nothing here knows about rounds.

Addresses, and who has which checkpoint, are found in the DHT (`dht`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from swarm_protocol import processes
from swarm_protocol.calls import (
    LENGTHS,
    MAX_HEADER_BYTES,
    WRITE_BYTES,
    Answer,
    Bytes,
    Call,
    Handler,
    Header,
    Traffic,
    pack,
    pieces_of,
    unpack_header,
    unpack_lengths,
)
from swarm_protocol.dht import Directory, Guard
from swarm_protocol.direct import Address, DirectPlane, NoDirectPathError, parse_addresses
from swarm_protocol.errors import (
    ConfigurationError,
    EncodingError,
    InvalidDataError,
    RefusedError,
    SwarmError,
    UnreachableError,
)
from swarm_protocol.identity import Identity, peer_id
from swarm_protocol.throttle import TokenBucket

log = logging.getLogger(__name__)

PROTOCOL = "/swarm-node/call/1"
LINGER_S = 2.0
DIRECT_S = 3.0

T = TypeVar("T")

__all__ = ["MAX_HEADER_BYTES", "Answer", "Call", "Handler", "Header", "PeerPlane", "Traffic"]


class PeerPlane:
    """One daemon, one DHT node, and the calls that go through them. Use `start`, and `close` at the end.

    `reachable` says whether others can be expected to open connections to us.
    """

    def __init__(
        self,
        identity: Identity,
        run: bytes,
        p2p: Any,
        dht: Any,
        *,
        direct: bool,
        direct_host: str | None,
        reachable: bool,
    ) -> None:
        self.identity = identity
        self.traffic = Traffic()
        self._p2p = p2p
        self._dht = dht
        self.directory = Directory(dht, run, identity.public_key)
        self._handlers: dict[str, Handler] = {}
        self._connected: dict[bytes, float] = {}
        self.reachable = reachable
        self._direct_host = direct_host
        self._direct_wanted = direct
        self._direct = DirectPlane(identity, run, self.traffic, dispatch=self._dispatch, ask=self._ask_direct)

    @classmethod
    async def start(
        cls,
        identity_path: Path,
        run: bytes,
        *,
        initial_peers: Sequence[str] = (),
        listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
        client_only: bool = False,
        direct: bool = True,
        timeout_s: float = 30.0,
    ) -> PeerPlane:
        """Start the daemon and join the DHT. Call it before any thread is started: hivemind forks.

        With `direct`, calls go over direct connections where they can, and unless `client_only` we take some ourselves.

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
                record_validators=(Guard(run, hivemind.utils.MSGPackSerializer.loads),),
            )
            dht.start()
            await asyncio.wait_for(asyncio.to_thread(dht.wait_until_ready, timeout_s), timeout_s + 5)
        except Exception as error:
            await p2p.shutdown()
            raise UnreachableError(f"no peer of the run answers on {', '.join(initial_peers)}: {error}") from error
        host = _ip_of(listen[0]) if direct and not client_only and listen else None
        return cls(identity, run, p2p, dht, direct=direct, direct_host=host, reachable=not client_only)

    async def close(self) -> None:
        """Stop the DHT and the daemon; nothing of them is left when this returns."""
        await self._direct.close()
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

    @property
    def upload(self) -> TokenBucket | None:
        """What limits everything that we send to peers, if something does."""
        return self._direct.upload

    def limit_upload(self, bytes_per_s: float) -> None:
        """From now on send no faster than this, headers included, without what transports add and the daemon's own."""
        self._direct.upload = TokenBucket(bytes_per_s)

    # Serving

    async def serve(self, handlers: Mapping[str, Handler]) -> None:
        """Answer calls whose header names an operation in `handlers`."""
        self._handlers.update({**handlers, "direct": self._tell_direct})
        if self._direct_host is not None and self._direct.port is None:
            try:
                self._direct.listen(self._direct_host)
            except OSError as error:
                log.warning("no direct connections to this node: %s", error)
        await self._p2p.add_binary_stream_handler(PROTOCOL, self._answer)

    async def _answer(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = bytes(info.peer_id.to_bytes())[-32:]
        try:
            async with asyncio.timeout(120):
                header, size = await self._receive_header(peer, reader)

                async def receive(use: Callable[[Bytes], T]) -> T:
                    content = await reader.readexactly(size)
                    self.traffic.note(peer, "daemon", received=size)
                    return use(content) if size < WRITE_BYTES else await asyncio.to_thread(use, content)

                answer = await self._dispatch(Call(peer, header, size, receive))
                await self._send(peer, writer, answer.header, answer.body, urgent=answer.urgent)
                if size and "refused" in answer.header:
                    await _hear_out(reader)
        except (OSError, EOFError, TimeoutError, EncodingError) as error:
            log.debug("a call broke off: %s", error)
        finally:
            writer.close()

    async def _dispatch(self, call: Call) -> Answer:
        handler = self._handlers.get(str(call.header.get("op")))
        if handler is None:
            return Answer({"refused": "no such operation"})
        try:
            return await handler(call)
        except (SwarmError, KeyError, TypeError, ValueError) as error:
            return Answer({"refused": str(error)[:500] or type(error).__name__})
        except (OSError, EOFError, TimeoutError):
            raise
        except Exception:  # a fault of ours must not take the peer plane down with it
            log.exception("answering %s failed", call.header.get("op"))
            return Answer({"refused": "internal error"})

    async def _tell_direct(self, call: Call) -> Answer:
        """Where we take direct connections: nowhere, or our port at the addresses that the daemon is seen at."""
        port = self._direct.port
        if port is None or self._direct_host is None:
            return Answer({"addresses": []})
        hosts = [self._direct_host]
        if hosts[0] in ("0.0.0.0", "::"):  # noqa: S104  # a comparison
            hosts = [host for host in map(_ip_of, await self.addresses()) if host is not None]
        return Answer({"addresses": [[host, port] for host in dict.fromkeys(hosts)][:4]})

    # Calling

    async def call(
        self, peer: bytes, header: Header, body: bytes | memoryview = b"", *, max_answer_bytes: int, timeout_s: float
    ) -> tuple[dict[str, Any], Bytes]:
        """Call the peer with this public key; returns its answer's header and body.

        Raises:
            UnreachableError: no answer within `timeout_s`.
            RefusedError: the peer says why it does not do it.
            InvalidDataError: the answer breaks the rules.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if self._direct_wanted:
                    with contextlib.suppress(NoDirectPathError):
                        return await self._direct.call(
                            peer, header, body, max_answer_bytes=max_answer_bytes, timeout_s=timeout_s
                        )
                return await self._call(peer, header, body, max_answer_bytes)
        except (OSError, EOFError, TimeoutError) as error:
            self._connected.pop(peer, None)
            raise UnreachableError(f"{peer_id(peer)} does not answer: {str(error) or 'timed out'}") from error

    async def _call(
        self, peer: bytes, header: Header, body: bytes | memoryview, max_answer_bytes: int
    ) -> tuple[dict[str, Any], Bytes]:
        """One call through the daemon."""
        reader, writer = await self._open(peer)
        sending = asyncio.create_task(self._send(peer, writer, header, body))
        try:
            answer, size = await self._receive_header(peer, reader)
            if "refused" in answer:  # perhaps long before all of the body was sent
                raise RefusedError(str(answer["refused"])[:500])
            await sending
            if size > max_answer_bytes:
                raise InvalidDataError(f"an answer of {size} bytes where at most {max_answer_bytes} are allowed")
            content = await reader.readexactly(size)
            self.traffic.note(peer, "daemon", received=size)
            return answer, content
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            writer.close()

    async def _ask_direct(self, peer: bytes) -> list[Address]:
        """Ask a peer, through the daemon, where it takes direct connections."""
        try:
            async with asyncio.timeout(DIRECT_S):
                answer, _ = await self._call(peer, {"op": "direct"}, b"", 0)
        except (OSError, EOFError, TimeoutError) as error:
            raise UnreachableError(str(error) or "timed out") from error
        return parse_addresses(answer.get("addresses"))

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
        for address in await self.directory.lookup(peer):
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
            async with asyncio.timeout(timeout_s):
                await self._p2p._client.connect(target, [plain])

    # Messages on the daemon's streams

    async def _send(
        self,
        peer: bytes,
        writer: asyncio.StreamWriter,
        header: Header,
        body: Bytes | memoryview,
        *,
        urgent: bool = True,
    ) -> None:
        head = pack(header, len(body))
        for piece in pieces_of(head, body):
            if self.upload is not None:
                await self.upload.wait(len(piece), urgent=urgent)
            writer.write(piece)
            await writer.drain()
        self.traffic.note(peer, "daemon", sent=len(head) + len(body))

    async def _receive_header(self, peer: bytes, reader: asyncio.StreamReader) -> tuple[dict[str, Any], int]:
        length, size = unpack_lengths(await reader.readexactly(LENGTHS.size))
        header = unpack_header(await reader.readexactly(length))
        self.traffic.note(peer, "daemon", received=LENGTHS.size + length)
        return header, size


def _ip_of(multiaddr: str) -> str | None:
    """The IP address in a multiaddress, if there is one."""
    match multiaddr.split("/"):
        case ["", "ip4" | "ip6", host, *_]:
            return host
        case _:
            return None


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
