"""Calls between peers over real daemons on loopback: they arrive, they are bounded, and nothing survives its process."""

from __future__ import annotations

import asyncio
import gc
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from swarm_protocol import encoding
from swarm_protocol.errors import ConfigurationError, InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.identity import Identity
from swarm_protocol.peers import MAX_HEADER_BYTES, Answer, Call, PeerPlane
from swarm_protocol.records import Addresses, Envelope

T = TypeVar("T")
Run = Callable[[Awaitable[T]], T]

# hivemind's ways: how it finds its daemon (Python 3.11), that it forks (3.12 and later), and that it leaves a socket to
# the garbage collector where a deadline cuts it off.
pytestmark = [
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

RUN = bytes([1]) * 32
MEBIBYTE = 1 << 20

# A peer in a process of its own: prints its key and an address, answers `echo`, ends with its stdin.
PEER = """
import asyncio, sys
from pathlib import Path
from swarm_protocol.identity import Identity
from swarm_protocol.peers import Answer, PeerPlane

async def echo(call):
    return Answer({}, await call.body(1 << 20))

async def main():
    path = Path(sys.argv[1])
    identity = Identity.load_or_create(path)
    plane = await PeerPlane.start(path, bytes([1]) * 32, initial_peers=sys.argv[2:])
    await plane.serve({"echo": echo})
    print(identity.public_key.hex(), (await plane.addresses())[0], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await plane.close()

asyncio.run(main())
"""


class Planes:
    """Two peers in this process, on one event loop that tests share."""

    def __init__(self, runner: asyncio.Runner, folder: Path) -> None:
        self.run = runner.run
        self._folder = folder
        self.handled: list[str] = []
        self.first = self.start()
        self.address = self.run(self.first.addresses())[0]
        self.second = self.start(self.address)
        for plane in (self.first, self.second):
            self.run(
                plane.serve({"echo": self._echo, "refuse": self._refuse, "fail": self._fail, "large": self._large})
            )

    def start(self, *initial_peers: str) -> PeerPlane:
        path = self._folder / secrets.token_hex(4)
        Identity.generate().save(path)
        return self.run(PeerPlane.start(path, RUN, initial_peers=initial_peers))

    def call(
        self, op: str, body: bytes = b"", *, max_answer_bytes: int = 64 * MEBIBYTE, **more: encoding.Value
    ) -> tuple[dict[str, object], bytes]:
        """What the first peer answers to the second."""
        header = {"op": op, **more}
        key = self.first.identity.public_key
        return self.run(self.second.call(key, header, body, max_answer_bytes=max_answer_bytes, timeout_s=20))

    async def _echo(self, call: Call) -> Answer:
        limit = call.header.get("limit", 64 * MEBIBYTE)
        body = await call.body(limit)
        self.handled.append("echo")
        return Answer({"caller": call.caller, "said": call.header.get("say")}, body)

    async def _refuse(self, call: Call) -> Answer:
        raise RefusedError(call.header["why"])

    async def _fail(self, call: Call) -> Answer:
        raise {"key": KeyError("part"), "bug": RuntimeError("secret"), "type": TypeError("odd")}[call.header["how"]]

    async def _large(self, call: Call) -> Answer:
        return Answer({}, bytes(call.header["size"]))


@pytest.fixture(scope="module")
def planes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planes]:
    with asyncio.Runner() as runner:
        made = Planes(runner, tmp_path_factory.mktemp("identities"))
        yield made
        for plane in (made.second, made.first):
            runner.run(plane.close())
        gc.collect()  # while there is a loop to close sockets on


class Peer:
    """A peer in another process."""

    def __init__(self, identity: Path, *initial_peers: str) -> None:
        command = [sys.executable, "-c", PEER, str(identity), *initial_peers]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def await_start(self) -> None:
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        assert len(words) == 2, "the peer did not start"
        self.key, self.address = bytes.fromhex(words[0]), words[1]
        self.family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]


@pytest.fixture(scope="module")
def peers(planes: Planes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Peer, Peer]]:
    """Two peers in processes of their own: one to freeze and to kill, one to end in order."""
    folder = tmp_path_factory.mktemp("peers")
    started = Peer(folder / "first", planes.address), Peer(folder / "second", planes.address)
    for peer in started:
        peer.await_start()
    yield started
    for peer in started:
        peer.process.kill()
        peer.process.communicate()


def alive(family: list[psutil.Process]) -> list[str]:
    """Those that still run; a zombie only waits for its parent to look."""
    found = []
    for process in family:
        try:
            if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                found.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return found


def gone(family: list[psutil.Process], within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while alive(family) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(family)


# Calls


def test_a_call_is_answered_in_both_directions(planes: Planes) -> None:
    for caller, callee in ((planes.first, planes.second), (planes.second, planes.first)):
        header, body = planes.run(
            caller.call(
                callee.identity.public_key, {"op": "echo", "say": ["θ", 1]}, b"body", max_answer_bytes=4, timeout_s=20
            )
        )
        assert header == {"caller": caller.identity.public_key, "said": ["θ", 1]}
        assert body == b"body"


def test_a_body_of_many_megabytes_travels_both_ways(planes: Planes) -> None:
    body = secrets.token_bytes(MEBIBYTE) * 32
    before = planes.first.traffic.sent, planes.first.traffic.received
    assert planes.call("echo", body)[1] == body
    assert 0 <= planes.first.traffic.sent - before[0] - len(body) < 1000
    assert 0 <= planes.first.traffic.received - before[1] - len(body) < 1000


def test_a_view_of_a_body_travels_like_its_bytes(planes: Planes) -> None:
    view = memoryview(b"0123456789")[2:5]
    key = planes.first.identity.public_key
    _, body = planes.run(planes.second.call(key, {"op": "echo"}, view, max_answer_bytes=10, timeout_s=20))
    assert body == b"234"


def test_many_calls_at_once_each_get_their_own_answer(planes: Planes) -> None:
    async def everybody() -> list[tuple[dict[str, object], bytes]]:
        key = planes.first.identity.public_key
        return await asyncio.gather(
            *(
                planes.second.call(key, {"op": "echo"}, bytes([number]) * 1000, max_answer_bytes=1000, timeout_s=20)
                for number in range(50)
            )
        )

    assert [body for _, body in planes.run(everybody())] == [bytes([number]) * 1000 for number in range(50)]


def test_the_reason_of_a_refusal_travels(planes: Planes) -> None:
    with pytest.raises(RefusedError, match=r"^this part is reduced elsewhere × θ$"):
        planes.call("refuse", why="this part is reduced elsewhere × θ")
    with pytest.raises(RefusedError) as caught:
        planes.call("refuse", why="x" * 5000)
    assert len(str(caught.value)) == 500


def test_what_nobody_serves_is_refused(planes: Planes) -> None:
    for header in ({"op": "unheard of"}, {}, {"op": None}, {"op": ["echo"]}):
        with pytest.raises(RefusedError, match="no such operation"):
            planes.call(**{"op": "", **header})


def test_a_fault_in_a_handler_is_a_refusal_and_gives_nothing_away(planes: Planes) -> None:
    for how, told in (("key", "'part'"), ("type", "odd"), ("bug", "internal error")):
        with pytest.raises(RefusedError, match=told):
            planes.call("fail", how=how)
    assert planes.call("echo", b"still here")[1] == b"still here"


@pytest.mark.parametrize("size", [1001, MEBIBYTE, 64 * MEBIBYTE])
def test_a_body_beyond_its_bound_is_refused_before_it_is_read(planes: Planes, size: int) -> None:
    received = planes.first.traffic.received
    planes.handled.clear()
    with pytest.raises(RefusedError, match=f"a body of {size} bytes where at most 1000 are allowed"):
        planes.call("echo", bytes(size), limit=1000)
    assert planes.handled == []
    assert planes.first.traffic.received - received < 1000


def test_an_answer_beyond_its_bound_is_not_read(planes: Planes) -> None:
    received = planes.second.traffic.received
    with pytest.raises(InvalidDataError, match=f"an answer of {16 * MEBIBYTE} bytes where at most 1000 are allowed"):
        planes.call("large", size=16 * MEBIBYTE, max_answer_bytes=1000)
    assert planes.second.traffic.received - received < 1000
    assert planes.call("large", size=1000, max_answer_bytes=1000)[1] == bytes(1000)


def head(header: bytes, size: int = 0) -> bytes:
    return struct.pack("<IQ", len(header), size) + header


GARBAGE = {
    "nothing": b"",
    "a few bytes": b"\0\0\0",
    "noise": secrets.token_bytes(5000),
    "a header beyond its bound": struct.pack("<IQ", MAX_HEADER_BYTES + 1, 0) + bytes(100),
    "the largest lengths": b"\xff" * 12,
    "half a header": struct.pack("<IQ", 1000, 0) + bytes(10),
    "a header that is not canonical": head(b"\xbf\xff"),
    "a header that is no map": head(encoding.encode([1, 2])),
    "a header nested too deeply": head(b"\x81" * 1000 + b"\x80"),
    "a body that never comes": head(encoding.encode({"op": "echo"}), 1000) + b"only this",
    "a body without end": head(encoding.encode({"op": "echo"}), 1 << 63) + b"only this",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_on_a_stream_ends_that_stream_only(planes: Planes, garbage: bytes) -> None:
    async def send() -> None:
        reader, writer = await planes.second._open(planes.first.identity.public_key)
        writer.write(garbage)
        writer.write_eof()
        await asyncio.wait_for(reader.read(), 10)
        writer.close()

    planes.run(send())
    assert planes.call("echo", b"still here")[1] == b"still here"


# Reaching each other


def test_a_peer_is_found_by_its_key_through_the_addresses_it_signed(planes: Planes) -> None:
    first, key = planes.first, planes.first.identity.public_key
    record = Addresses(run=RUN, round=0, multiaddrs=(planes.address,))
    planes.run(first.directory.announce(Envelope.sign(first.identity, record)))
    assert planes.run(planes.second.directory.lookup(key)) == [planes.address]


def test_addresses_that_their_peer_did_not_sign_for_this_run_are_ignored(
    planes: Planes, caplog: pytest.LogCaptureFixture
) -> None:
    victim, forger = Identity.generate(), planes.second

    def forged(signer: Identity, run: bytes = RUN) -> bytes:
        record = Addresses(run=run, round=0, multiaddrs=(planes.address,))
        return Envelope.sign(signer, record).encode()

    honest = forged(victim)
    for number, value in enumerate(
        (
            forged(forger.identity),
            forged(victim, run=bytes(32)),
            honest[:-1] + bytes([honest[-1] ^ 1]),
            b"garbage",
            "text",
            7,
            {"map": b""},
            honest,
        )
    ):
        expiration = time.time() + 100 + 10 * number
        key = forger.directory.addresses_key(victim.public_key)
        assert planes.run(_store(forger, key, value, expiration))
        assert planes.run(planes.first.directory.lookup(victim.public_key)) == (
            [planes.address] if value is honest else []
        )
    assert "not its own" in caplog.text


async def _store(plane: PeerPlane, key: str, value: object, expiration: float) -> bool:
    return bool(await asyncio.to_thread(plane._dht.store(key, value, expiration, return_future=True).result, 10))


def test_a_peer_that_nobody_knows_is_unreachable(planes: Planes) -> None:
    nobody = Identity.generate()
    with pytest.raises(UnreachableError, match=nobody.peer_id):
        planes.run(planes.second.call(nobody.public_key, {"op": "echo"}, max_answer_bytes=0, timeout_s=5))


def test_a_frozen_peer_is_unreachable_at_the_deadline(planes: Planes, peers: tuple[Peer, Peer]) -> None:
    peer, _ = peers

    def ask(timeout_s: float) -> bytes:
        return planes.run(
            planes.second.call(peer.key, {"op": "echo"}, b"?" * 100_000, max_answer_bytes=MEBIBYTE, timeout_s=timeout_s)
        )[1]

    assert len(ask(20)) == 100_000
    for frozen in (peer.family[:1], peer.family):  # its process, then its daemon as well
        for process in frozen:
            process.suspend()
        started = time.monotonic()
        with pytest.raises(UnreachableError, match="timed out"):
            ask(0.5)
        assert 0.4 < time.monotonic() - started < 3
        for process in frozen:
            process.resume()
        assert len(ask(20)) == 100_000


# Starting and ending


def test_a_peer_cannot_join_where_nobody_answers(planes: Planes) -> None:
    before = psutil.Process().children(recursive=True)
    port_of_nobody = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer_id}"
    with pytest.raises(UnreachableError, match=port_of_nobody):
        planes.start(port_of_nobody)
    assert gone([process for process in psutil.Process().children(recursive=True) if process not in before])


def test_a_daemon_that_cannot_start_says_what_to_check(planes: Planes, tmp_path: Path) -> None:
    Identity.generate().save(tmp_path / "identity")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        with pytest.raises(
            ConfigurationError, match=f"the peer daemon does not start.*address already in use.*{address}"
        ):
            planes.run(PeerPlane.start(tmp_path / "identity", RUN, listen=[address]))


def test_a_plane_that_was_closed_leaves_no_process(planes: Planes) -> None:
    before = psutil.Process().children(recursive=True)
    plane = planes.start(planes.address)
    family = [process for process in psutil.Process().children(recursive=True) if process not in before]
    assert len(family) >= 2
    planes.run(plane.close())
    assert gone(family, within_s=2.0)


def test_a_killed_process_takes_its_daemon_along_and_is_unreachable(planes: Planes, peers: tuple[Peer, Peer]) -> None:
    peer, _ = peers
    assert any("p2pd" in line for line in alive(peer.family))
    assert len(peer.family) >= 3
    peer.process.send_signal(signal.SIGKILL)
    peer.process.wait()
    assert gone(peer.family)
    with pytest.raises(UnreachableError):
        planes.run(planes.second.call(peer.key, {"op": "echo"}, max_answer_bytes=0, timeout_s=2))


def test_a_process_that_ends_in_order_leaves_nothing(peers: tuple[Peer, Peer]) -> None:
    _, peer = peers
    peer.process.communicate(timeout=20)
    assert peer.process.returncode == 0
    assert gone(peer.family)
