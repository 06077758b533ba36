"""The libp2p host of the gossip process: TCP, noise and yamux only, with bounded connections and streams.

What is set differently from py-libp2p's defaults, and why:

- Its default host also accepts TLS, secio and *plaintext*: whoever knows a public key passes for its owner.
- An inbound slot stays taken after its connection has ended, so that a host refuses everybody after some hundred
  connections. `_accept` waits for the end of the connection instead of the end of the host.
- Sockets that never shake hands fill all slots. They have `HANDSHAKE_S`, and an address has `PENDING_PER_ADDRESS` at once.
- One peer may open thousands of streams. A connection with more than `STREAMS_PER_CONNECTION` is ended.
- The circuit breaker refuses everybody after some failures, which anybody can cause. It is off.
- After one failed dial a peer is not dialed again for a minute. `dial` forgets that; pauses are `process`'s.
- An exception in a stream handler ends the process. `guarded` resets the stream instead.
- Listening on a taken port succeeds (SO_REUSEPORT) or fails without a word. `require_free` and `addresses` look.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.rcmgr.manager import ResourceLimits, ResourceManager
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from swarm_protocol.errors import ConfigurationError, EncodingError, UnreachableError

log = logging.getLogger(__name__)

CONNECTIONS = 96
RESERVED_FOR_DIALING = 32
STREAMS_PER_CONNECTION = 16
PENDING_PER_ADDRESS = 32
HANDSHAKE_S = 4.0
NEGOTIATION_S = 10.0
DIAL_S = 5.0
MAX_FRAME_BYTES = 1 << 20

StreamHandler = Callable[[Any], Awaitable[None]]


def new_gossip_host(seed: bytes) -> Any:
    """A host (py-libp2p's `IHost`) whose transport key has this 32-byte seed."""
    key_pair = create_new_key_pair(seed)
    resources = ResourceManager(
        limits=ResourceLimits(max_connections=4 * CONNECTIONS, max_streams=CONNECTIONS * STREAMS_PER_CONNECTION),
        enable_metrics=False,
        enable_memory_limits=False,
        enable_circuit_breaker=False,
        enable_graceful_degradation=False,
        enable_rate_limiting=False,
    )
    config = ConnectionConfig(
        max_connections=CONNECTIONS,
        min_connections=RESERVED_FOR_DIALING,
        low_watermark=RESERVED_FOR_DIALING,
        high_watermark=CONNECTIONS,
        max_connections_per_peer=2,
        dial_timeout=DIAL_S,
        inbound_upgrade_timeout=HANDSHAKE_S,
        outbound_upgrade_timeout=NEGOTIATION_S,
        inbound_stream_protocol_negotiation_timeout=NEGOTIATION_S,
        outbound_stream_protocol_negotiation_timeout=NEGOTIATION_S,
        auto_connect_interval=1e9,  # whom to dial is decided in `process`
    )
    return new_host(
        key_pair=key_pair,
        sec_opt={NOISE: Noise(key_pair, noise_privkey=create_noise_key_pair().private_key)},
        muxer_opt={YAMUX: Yamux},
        connection_config=config,
        resource_manager=resources,
        enable_quic=False,
        disable_identify_address_discovery=True,
    )


def limit(host: Any, too_many_streams: Callable[[Any], Awaitable[None]]) -> None:
    """Bound what others can make a host hold; `too_many_streams` is called with the PeerID of who opened them."""
    swarm = host.get_network()
    pending: Counter[str] = Counter()

    async def accept(raw: Any, listener: Multiaddr, _event: Any) -> None:
        remote = raw.get_remote_address()
        address = remote[0] if remote else "?"
        if pending[address] >= PENDING_PER_ADDRESS:
            await raw.close()
            return
        pending[address] += 1
        try:
            connection = RawConnection(raw, False)
            muxed = await swarm.upgrade_inbound_raw_conn(connection, listener)
        except Exception as error:  # noqa: BLE001  whatever a stranger does in a handshake is its own affair
            log.debug("an inbound connection failed: %s", error)
            await raw.close()
            return
        finally:
            pending[address] -= 1
            if not pending[address]:
                del pending[address]
        for found in swarm.get_connections(muxed.peer_id):
            if found.muxed_conn is muxed:
                await found.event_closed.wait()

    async def handle(stream: Any) -> None:
        connection = getattr(stream, "swarm_conn", None)
        if connection is not None and len(connection.streams) > STREAMS_PER_CONNECTION:
            await end(stream)
            await too_many_streams(stream.muxed_conn.peer_id)
            return
        await guarded(host._swarm_stream_handler)(stream)

    swarm._do_handle_inbound_connection = accept
    swarm.set_stream_handler(handle)


def guarded(handler: StreamHandler, *, deadline_s: float | None = None) -> StreamHandler:
    """A handler whose errors and delays end its stream and nothing else."""

    async def run(stream: Any) -> None:
        try:
            if deadline_s is None:
                await handler(stream)
                return
            with trio.fail_after(deadline_s):
                await handler(stream)
        except Exception as error:  # noqa: BLE001
            log.debug("a stream of %s failed: %r", stream.muxed_conn.peer_id, error)
            await end(stream)

    return run


async def end(stream: Any) -> None:
    """Reset a stream, whatever its state, also when cancelled."""
    try:
        with trio.CancelScope(deadline=trio.current_time() + 1.0, shield=True):
            await stream.reset()
    except Exception as error:  # noqa: BLE001
        log.debug("a stream cannot be reset: %r", error)


def require_free(listen: str) -> None:
    """Raises `ConfigurationError` if the port of a multiaddr is taken, also by one who would share it."""
    address = Multiaddr(listen)
    port = int(address.value_for_protocol("tcp"))
    family = socket.AF_INET6 if listen.startswith("/ip6/") else socket.AF_INET
    host = address.value_for_protocol("ip6" if family == socket.AF_INET6 else "ip4")
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if port:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"gossip cannot listen on {listen}: {error.strerror}; choose another port"
            ) from error


def addresses(host: Any) -> list[str]:
    """Where a running host listens, with its transport PeerID.

    Raises:
        ConfigurationError: nowhere.
    """
    found = [str(address) for address in host.get_addrs()]
    if not found:
        raise ConfigurationError("gossip listens nowhere; choose another address or port")
    return found


async def dial(host: Any, address: str) -> Any:
    """Connect to a multiaddr that ends in `/p2p/PEER_ID`, and return that PeerID.

    Raises:
        UnreachableError: nobody with that key answers there in time.
        EncodingError: not such a multiaddr.
    """
    try:
        info = info_from_p2p_addr(Multiaddr(address))
    except Exception as error:
        raise EncodingError(f"{address[:200]!r} is not a multiaddr with a PeerID: {error}") from error
    if info.peer_id == host.get_id():
        raise EncodingError("this is our own address")
    host.get_network().unblock_peer(info.peer_id)
    try:
        with trio.fail_after(2 * DIAL_S):
            await host.connect(info)
    except Exception as error:
        raise UnreachableError(f"{address} cannot be reached: {error!r:.200}") from error
    return info.peer_id


async def write_frame(stream: Any, data: bytes) -> None:
    """A length of four bytes, then so many bytes."""
    await stream.write(len(data).to_bytes(4, "big") + data)


async def read_frame(stream: Any, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """Read one frame. py-libp2p's own `read_exactly` gives up after a hundred reads; this does not.

    Raises:
        EncodingError: longer than allowed, or the stream ended before.
    """
    size = int.from_bytes(await _read_exactly(stream, 4), "big")
    if size > max_bytes:
        raise EncodingError(f"a frame of {size} bytes where at most {max_bytes} are allowed")
    return await _read_exactly(stream, size)


async def _read_exactly(stream: Any, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await stream.read(size - len(data))
        if not piece:
            raise EncodingError("the stream ended within a frame")
        data += piece
    return bytes(data)
