"""One node's part in a run's gossip: neighbours found, certified and kept, messages judged and passed on.

Runs inside the gossip process (trio). It believes nothing that is not signed, tells its parent of every record that is
new, and asks it for what others want of the log. Promises: what it holds is bounded, every wait has a deadline, and a
neighbour that misbehaves is dropped and stays away for a while.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import resource
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio
from libp2p.peer.id import ID
from libp2p.rcmgr import Direction
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from swarm_protocol import encoding
from swarm_protocol.errors import (
    ConfigurationError,
    EncodingError,
    InvalidDataError,
    RefusedError,
    SwarmError,
    UnreachableError,
)
from swarm_protocol.gossip import fetching, wire
from swarm_protocol.gossip.mesh import Mesh
from swarm_protocol.gossip.transport import (
    addresses,
    dial,
    guarded,
    limit,
    new_gossip_host,
    read_frame,
    require_free,
    write_frame,
)
from swarm_protocol.gossip.validation import Decision, Gate, Outcome, Standings
from swarm_protocol.identity import peer_id as peer_id_of
from swarm_protocol.records import Envelope, TransportKey
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

HELLO = "/swarm-node/gossip-hello/1"
ADMISSION_S = 20.0
LOOK_EVERY_S = 1.0
LONGEST_PAUSE_S = 30.0
MAX_KNOWN = 512
DIALS_AT_ONCE = 4
CATCH_UP_FROM = 3
PUBLISH_PER_S = 10.0
PUBLISH_AT_ONCE = 20
MAX_OUTGOING = 256
BLAME_PENALTY = 20.0
CERTAIN = 1000.0

Deliver = Callable[[dict[str, Any]], None]
Provide = Callable[[wire.Wanted], Awaitable[bytes]]


class Plane:
    """A run's gossip as one process takes part in it. `run` it, in a nursery; `stop` ends it."""

    def __init__(self, joining: wire.Joining, deliver: Deliver, provide: Provide) -> None:
        self.spec = RunSpec.decode(joining.spec)
        self.gate = Gate(self.spec.run_id, bytes.fromhex(self.spec.coordinator))
        self.standings = Standings()
        self.counters: Counter[str] = Counter()
        self.stopping = trio.Event()
        self.host = new_gossip_host(joining.seed)
        self.mesh = Mesh(self.host, wire.topic_of(self.spec.run_id), self)
        self._joining = joining
        self._deliver = deliver
        self._provide = provide
        self._identities: dict[str, str] = {}
        self._known: OrderedDict[str, str] = OrderedDict()
        self._pause_s: dict[str, tuple[float, float]] = {}
        self._catch_ups = 0
        self._nursery: trio.Nursery | None = None
        self._dropping: set[str] = set()
        self._outgoing: tuple[Any, Any] = trio.open_memory_channel(MAX_OUTGOING)
        for address in joining.bootstrap:
            self._learn(address)

    @property
    def now_s(self) -> float:
        return time.monotonic()

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until stopped. Started once it listens, with its addresses.

        Raises:
            ConfigurationError: it cannot listen where it should.
        """
        for address in self._joining.listen:
            require_free(address)
        limit(self.host, self._too_many_streams)
        self.host.set_stream_handler(HELLO, guarded(self._answer_hello, deadline_s=ADMISSION_S))
        self.host.set_stream_handler(fetching.PROTOCOL, fetching.serving(self._answer))
        self.host.get_network().register_notifee(_Connections(self))
        listen = [Multiaddr(address) for address in self._joining.listen]
        async with self.host.run(listen), trio.open_nursery() as nursery:
            listens = len(self.host.get_transport_addrs()) >= len(listen)
            if not listens:  # an error that leaves this block comes out as one of py-libp2p's
                self.stopping.set()
            self._nursery = nursery
            async with background_trio_service(self.mesh), background_trio_service(self.mesh.router):
                await self.mesh.wait_until_ready()
                await self.mesh.subscribe(self.mesh.topic)
                if listens:
                    task_status.started(self.addresses())
                nursery.start_soon(self._keep_connected)
                nursery.start_soon(self._send)
                await self.stopping.wait()
                # Dialed sockets would stay open otherwise.
                with trio.move_on_after(2.0):
                    await self.host.close()
            nursery.cancel_scope.cancel()
        if not listens:
            raise ConfigurationError(f"gossip cannot listen on {' '.join(self._joining.listen)}; choose another port")

    def stop(self) -> None:
        self.stopping.set()

    def start(self, task: Callable[[Any], Awaitable[None]], of: Any) -> None:
        """Run a task for one neighbour; its failure is that neighbour's alone."""

        async def contained() -> None:
            try:
                await task(of)
            except Exception as error:  # noqa: BLE001  an exception here would end the process
                log.info("%s for %s failed: %r", task.__name__, of, error)
                self.counters["failures"] += 1

        if self._nursery is not None:
            self._nursery.start_soon(contained)

    def addresses(self) -> list[str]:
        """Where others reach this process: what it was told to announce, or where it listens."""
        return list(self._joining.announce) or addresses(self.host)

    # What the parent asks

    def publish(self, data: bytes) -> str:
        """Judge a record of our own or one that came another way, and send it, at our pace. Returns what it was.

        Raises:
            RefusedError: nobody would pass it on; or too much is waiting.
        """
        decision = self.gate.judge(data)
        if decision.outcome is Outcome.CONFLICT:
            self._conflict(decision, data)
        if decision.outcome is Outcome.DUPLICATE:
            return decision.outcome.value
        if decision.outcome is not Outcome.ACCEPTED:
            raise RefusedError(decision.reason)
        try:
            self._outgoing[0].send_nowait(data)
        except trio.WouldBlock as error:
            raise RefusedError(f"{MAX_OUTGOING} messages are waiting to be sent; ask again later") from error
        self.counters["published"] += 1
        return decision.outcome.value

    async def connect(self, address: str) -> str:
        """Make a neighbour of whoever listens there; returns its identity's PeerID.

        Raises:
            SwarmError: it cannot be reached, or is not let in.
        """
        peer = await dial(self.host, address)
        await self._greet(peer)
        self._learn(address)
        return self._identities[str(peer)]

    async def fetch(self, peer: str, wanted: wire.Wanted) -> bytes:
        """What a neighbour answers, unchecked."""
        if peer not in self.mesh.members():
            raise RefusedError(f"{peer} is no neighbour of ours")
        return await fetching.fetch(self.host, ID.from_base58(peer), wanted)

    def peers(self) -> list[dict[str, Any]]:
        """The neighbours that follow the run, the best first."""
        found = [
            {
                "peer": peer,
                "identity": self._identities.get(peer, ""),
                "score": self.score(peer),
                "address": self._known.get(peer, ""),
            }
            for peer in self.mesh.members()
        ]
        return sorted(found, key=lambda one: (-one["score"], one["peer"]))

    def status(self) -> dict[str, Any]:
        """Counters and gauges."""
        gauges = {
            "neighbours": len(self.mesh.members()),
            "connections": len(self.host.get_network().get_connections()),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "memory_bytes": _memory_bytes(),
            "cpu_ms": int(1000 * time.process_time()),
            "bytes_in": self.mesh.bytes_in,
            "bytes_out": self.mesh.bytes_out,
            "newest_round": -1 if self.gate.newest_round is None else self.gate.newest_round,
        }
        return {"counters": dict(self.counters), "gauges": gauges, "addresses": self.addresses()}

    # What the mesh asks (`mesh.Judge`)

    def heard(self, peer: str) -> bool:
        if self.standings.is_banned(peer, self.now_s):
            self._drop_soon(peer)
            return False
        if self.standings.heard(peer, self.now_s):
            return True
        self.counters["over_rate"] += 1
        self._check(peer)
        return False

    def judge(self, peer: str, data: bytes) -> Outcome:
        decision = self.gate.judge(data)
        self.counters[decision.outcome.value] += 1
        self.standings.note(peer, decision.outcome, self.now_s)
        if decision.outcome is Outcome.ACCEPTED:
            self._deliver({"event": "record", "data": data, "peer": peer})
        elif decision.outcome is Outcome.CONFLICT:
            self._conflict(decision, data)
        else:
            if decision.outcome is not Outcome.DUPLICATE:
                log.debug("%s sent what is %s: %s", peer, decision.outcome.value, decision.reason)
            self._check(peer)
        return decision.outcome

    def repeated(self, peer: str) -> None:
        self.counters[Outcome.DUPLICATE.value] += 1

    def blame(self, peer: str, reason: str, *, certain: bool = False) -> None:
        if self.standings.is_banned(peer, self.now_s):
            self._drop_soon(peer)
            return
        log.info("%s: %s", peer, reason)
        self.counters["blamed"] += 1
        self.standings.punish(peer, CERTAIN if certain else BLAME_PENALTY, self.now_s)
        self._check(peer)

    def score(self, peer: str) -> float:
        return self.standings.score(peer, self.now_s)

    def _conflict(self, decision: Decision, data: bytes) -> None:
        if decision.conflict is not None:
            self._deliver({"event": "equivocation", "first": decision.conflict, "second": data})

    # Neighbours

    async def connected(self, connection: Any) -> None:
        """Somebody is connected: certified and in the run within `ADMISSION_S`, or gone."""
        peer = connection.muxed_conn.peer_id
        name = str(peer)
        if self.standings.is_banned(name, self.now_s):
            self.counters["banned_refused"] += 1
            self._drop_soon(name)
            return
        with trio.move_on_after(ADMISSION_S) as scope:
            if connection.direction is Direction.OUTBOUND and name not in self._identities:
                try:
                    await self._greet(peer)
                except SwarmError as error:
                    log.debug("%s is not greeted: %s", name, error)
            while not connection.is_closed and not self._is_admitted(name):  # noqa: ASYNC110  there is no event
                await trio.sleep(0.1)
        if scope.cancelled_caught:
            self.counters["not_admitted"] += 1
            self._drop_soon(name)

    def _is_admitted(self, peer: str) -> bool:
        return peer in self._identities and peer in self.mesh.members()

    def disconnected(self, peer: str) -> None:
        if not self.host.get_network().get_connections(ID.from_base58(peer)):
            self._identities.pop(peer, None)

    async def _too_many_streams(self, peer: Any) -> None:
        self.blame(str(peer), "too many streams", certain=True)

    def _check(self, peer: str) -> None:
        if self.standings.to_drop(peer, self.now_s):
            log.info("%s is dropped", peer)
            self.counters["dropped_peers"] += 1
            self._drop_soon(peer)

    def _drop_soon(self, peer: str) -> None:
        if peer not in self._dropping:
            self._dropping.add(peer)
            self.start(self._drop, peer)

    async def _drop(self, peer: str) -> None:
        try:
            with trio.move_on_after(5.0):
                await self.host.get_network().close_peer(ID.from_base58(peer))
        finally:
            self._dropping.discard(peer)

    def _hello(self, peers: list[str]) -> bytes:
        return encoding.encode(
            {
                "certificate": self._joining.certificate,
                "addresses": self.addresses()[: wire.MAX_ADDRESSES],
                "peers": peers[: wire.MAX_PEERS_TOLD],
            }
        )

    async def _greet(self, peer: Any) -> None:
        """Say who we are and hear who it is. Raises `InvalidDataError` or `UnreachableError`."""
        try:
            with trio.fail_after(ADMISSION_S):
                stream = await self.host.new_stream(peer, [HELLO])
                await write_frame(stream, self._hello([]))
                self._admit(peer, await read_frame(stream, wire.MAX_HELLO_BYTES))
                await stream.close()
        except InvalidDataError:
            raise
        except Exception as error:
            raise UnreachableError(f"{peer} does not return the greeting: {error!r:.200}") from error
        if self._catch_ups < CATCH_UP_FROM:
            self._catch_ups += 1
            self.start(self._catch_up, peer)

    async def _answer_hello(self, stream: Any) -> None:
        peer = stream.muxed_conn.peer_id
        try:
            self._admit(peer, await read_frame(stream, wire.MAX_HELLO_BYTES))
        except InvalidDataError as error:
            self.blame(str(peer), f"a greeting that is none: {error}")
            raise
        others = [address for known, address in self._known.items() if known != str(peer)]
        await write_frame(stream, self._hello(random.sample(others, min(len(others), wire.MAX_PEERS_TOLD))))
        await stream.close()

    def _admit(self, peer: Any, raw: bytes) -> None:
        """Check who a neighbour is and where it listens. Raises `InvalidDataError`."""
        hello = wire.decoded_map(raw, wire.MAX_HELLO_BYTES)
        certificate = hello.get("certificate")
        if not isinstance(certificate, bytes):
            raise EncodingError("a greeting without a certificate")
        envelope = Envelope.decode(certificate)
        said = envelope.open_as(TransportKey, run=self.spec.run_id, round=0)
        if said.key != peer.to_bytes()[-32:] or said.expires_ms < time.time() * 1000:
            raise InvalidDataError("a certificate of another transport key, or one that has expired")
        self._identities[str(peer)] = peer_id_of(envelope.key)
        for address in wire.text_list(hello.get("addresses"), wire.MAX_ADDRESSES):
            if address.endswith(f"/p2p/{peer}"):
                self._learn(address)
        for address in wire.text_list(hello.get("peers"), wire.MAX_PEERS_TOLD):
            self._learn(address)

    async def _catch_up(self, peer: Any) -> None:
        """Ask a new neighbour for what is newest: records that were sent before we came."""
        try:
            raw = await fetching.fetch(self.host, peer, wire.Wanted("newest"))
            found = wire.bytes_list(encoding.decode(raw, max_bytes=wire.MAX_FETCH_BYTES, max_depth=1))
        except SwarmError as error:
            log.debug("%s does not say what is newest: %s", peer, error)
            return
        for data in found:
            self.judge(str(peer), data)

    def _learn(self, address: str) -> None:
        """Keep an address that can be dialed, the newest for each PeerID."""
        head, _, peer = address.rpartition("/p2p/")
        if not head or not peer or peer == str(self.host.get_id()) or not _is_dialable(head):
            return
        self._known[peer] = address
        self._known.move_to_end(peer)
        while len(self._known) > MAX_KNOWN:
            gone, _ = self._known.popitem(last=False)
            self._pause_s.pop(gone, None)

    async def _keep_connected(self) -> None:
        """Look for neighbours while there are few; whoever does not answer is asked again later and later."""
        while True:
            members, now_s = self.mesh.members(), self.now_s
            due = [
                (peer, address)
                for peer, address in self._known.items()
                if peer not in members
                and self._pause_s.get(peer, (0.0, 0.0))[0] <= now_s
                and not self.standings.is_banned(peer, now_s)
            ]
            random.shuffle(due)
            wanted = min(DIALS_AT_ONCE, self._joining.target - len(members))
            async with trio.open_nursery() as nursery:
                for peer, address in due[: max(0, wanted)]:
                    nursery.start_soon(self._try, peer, address)
            await trio.sleep(LOOK_EVERY_S)

    async def _try(self, peer: str, address: str) -> None:
        _, last_s = self._pause_s.get(peer, (0.0, LOOK_EVERY_S / 2))
        pause_s = min(2 * last_s, LONGEST_PAUSE_S)
        self._pause_s[peer] = (self.now_s + pause_s, pause_s)
        try:
            await dial(self.host, address)
        except SwarmError as error:
            log.debug("%s", error)
            if len(self._known) > self._joining.target and address not in self._joining.bootstrap and pause_s > 8:
                self._known.pop(peer, None)
                self._pause_s.pop(peer, None)
        else:
            self._pause_s[peer] = (self.now_s + LOOK_EVERY_S, LOOK_EVERY_S)

    # Sending, and what others fetch

    async def _send(self) -> None:
        allowance, at_s = float(PUBLISH_AT_ONCE), self.now_s
        async for data in self._outgoing[1]:
            allowance = min(PUBLISH_AT_ONCE, allowance + (self.now_s - at_s) * PUBLISH_PER_S) - 1
            at_s = self.now_s
            if allowance < 0:
                await trio.sleep(-allowance / PUBLISH_PER_S)
            await self.mesh.announce(data)

    async def _answer(self, peer: str, wanted: wire.Wanted) -> bytes:
        if not self.heard(peer):
            raise RefusedError("too many requests")
        self.counters["served"] += 1
        if wanted.what == "spec":
            return self._joining.spec
        if wanted.what == "newest":
            return encoding.encode(self.gate.newest())
        if wanted.what == "record":
            found = self.gate.kept(wanted.hash)
            if found is None:
                raise RefusedError("not here")
            return found
        return await self._provide(wanted)


class _Connections:
    """What py-libp2p calls when connections come and go (its `INotifee`)."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    async def connected(self, network: Any, connection: Any) -> None:
        self._plane.start(self._plane.connected, connection)

    async def disconnected(self, network: Any, connection: Any) -> None:
        self._plane.disconnected(str(connection.muxed_conn.peer_id))

    async def opened_stream(self, network: Any, stream: Any) -> None: ...

    async def closed_stream(self, network: Any, stream: Any) -> None: ...

    async def listen(self, network: Any, multiaddr: Any) -> None: ...

    async def listen_close(self, network: Any, multiaddr: Any) -> None: ...


def _memory_bytes() -> int:
    """What this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _is_dialable(head: str) -> bool:
    """Whether a multiaddr without its PeerID is `/ip4/ADDRESS/tcp/PORT` or the like, of one machine."""
    steps = head.split("/")
    if len(steps) != 5 or steps[0] or steps[3] != "tcp" or not steps[4].isdigit() or not 0 < int(steps[4]) < 65536:
        return False
    if steps[1] in ("dns", "dns4", "dns6"):
        return bool(steps[2])
    try:
        address = ipaddress.ip_address(steps[2])
    except ValueError:
        return False
    named = "ip4" if address.version == 4 else "ip6"
    return steps[1] == named and not (address.is_unspecified or address.is_multicast)
