"""Gossip between real processes: everybody hears what is signed, once, and nothing is left when it stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.swarm.gossiping import OWNER, RUN, SPEC, Ledger, heard, in_one_loop, manifest, members, plan, signed, until

from swarm_protocol.errors import ConfigurationError, InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.gossip import log_ranges, wire
from swarm_protocol.gossip.supervisor import GossipProcess, GossipSupervisor
from swarm_protocol.identity import Identity
from swarm_protocol.log import Log
from swarm_protocol.records import LogHead, TransportKey
from swarm_protocol.spec import RunSpec

pytestmark = pytest.mark.swarm


class Three:
    """The owner, who serves a log, and two others, in a loop that goes on from test to test."""

    def __init__(self, runner: asyncio.Runner, found: list[GossipSupervisor], ledger: Ledger) -> None:
        self.run = runner.run
        self.owner, self.other, self.third = found
        self.ledger = ledger


@pytest.fixture(scope="module")
def three() -> Iterator[Three]:
    ledger = Ledger()
    with in_one_loop(members(3, ledger=ledger)) as (runner, found):
        yield Three(runner, found, ledger)


def joining(*, certified: bytes | None = None, bootstrap: list[str]) -> wire.Joining:
    """A stranger who would join, with a certificate for this key or its own."""
    seed = os.urandom(32)
    key = certified or Identity.from_seed(seed).public_key
    certificate = signed(TransportKey(run=RUN, round=0, key=key, expires_ms=1 << 52), Identity.generate())
    return wire.Joining(seed, certificate.encode(), SPEC.encode(), bootstrap=tuple(bootstrap))


def test_what_the_owner_announces_reaches_everybody_once(three: Three) -> None:
    async def story() -> None:
        for round in range(3):
            assert await three.owner.publish(signed(plan(round)))
        assert not await three.owner.publish(signed(plan(0)))
        for one in (three.other, three.third):
            await heard(one, plan(2))
            assert (await one.status()).counters["accepted"] == 3
            # What comes another way as well, by long-poll for example, is known already.
            assert not await one.publish(signed(plan(2)))
        with pytest.raises(RefusedError, match="did not sign"):
            await three.owner.publish(signed(plan(3), Identity.generate()))

    three.run(story())


def test_a_newcomer_gets_what_is_newest_and_asks_for_the_rest(three: Three) -> None:
    async def story() -> None:
        await three.owner.publish(signed(plan(3)))
        await three.owner.publish(signed(plan(4)))
        async with GossipProcess() as process:
            spec = RunSpec.decode(await process.client.ask_spec(three.owner.addresses[0]))
            assert spec.run_id == RUN
            with pytest.raises(UnreachableError):
                await process.client.ask_spec(f"/ip4/127.0.0.1/tcp/1/p2p/{OWNER.peer_id}")
            with pytest.raises(InvalidDataError):
                await process.client.ask_spec("/ip4/127.0.0.1/tcp/1")
            await process.client.join(joining(bootstrap=three.owner.addresses))
            async with asyncio.timeout(10):
                async for envelope in process.client.records():
                    if envelope == signed(plan(4)):
                        break
            assert await process.client.record(plan(3).hash) == signed(plan(3))
            with pytest.raises(UnreachableError):
                await process.client.record(plan(9).hash)
            assert OWNER.peer_id in {one.identity for one in await process.client.peers()}

    three.run(story())


def test_two_manifests_of_one_round_are_noticed_by_whoever_hears_of_both(three: Three) -> None:
    async def story() -> None:
        await three.owner.publish(signed(manifest(5)))
        await heard(three.other, manifest(5))
        with pytest.raises(RefusedError, match="same name"):
            await three.other.publish(signed(manifest(5, root=RUN)))
        async with asyncio.timeout(5):
            found = await three.other.conflict()
        assert {found.first, found.second} == {signed(manifest(5)), signed(manifest(5, root=RUN))}

    three.run(story())


def test_ranges_of_the_log_are_fetched_from_peers_and_a_wrong_one_is_noticed(three: Three) -> None:
    def check(data: bytes, log: Log, head: LogHead) -> None:
        log_ranges.checked(data, log, head)

    async def story() -> None:
        ledger, client = three.ledger, three.other.client
        ledger.add(*(plan(round, cursor=round) for round in range(300)))
        ledger.append(*(os.urandom(64 << 10) for _ in range(40)))
        head, log, sizes = ledger.head(), Log(), []
        while log.size < head.sequence:
            wanted = wire.Wanted("log", first=log.size, count=300, size=head.sequence)
            data = await client.fetch(wanted, lambda data, log=log: check(data, log, head))
            _, log = log_ranges.checked(data, log, head)
            sizes.append(len(data))
        assert log.root() == ledger.log.root()
        assert max(sizes) > 1 << 20, "several messages, of at most 1 MB each"

        before = (await three.other.status()).counters.get("blamed", 0)
        ledger.entries[7] = ledger.entries[8]
        wanted = wire.Wanted("log", first=0, count=100, size=340)
        with pytest.raises(UnreachableError):
            await client.fetch(wanted, lambda data: check(data, Log(), head))
        assert (await three.other.status()).counters["blamed"] == before + 1

    three.run(story())


def test_a_certificate_of_another_key_does_not_let_in(three: Three) -> None:
    async def story() -> None:
        before = (await three.owner.status()).counters.get("blamed", 0)
        async with GossipProcess() as process:
            await process.client.join(joining(certified=OWNER.public_key, bootstrap=[]))
            with pytest.raises((UnreachableError, RefusedError)):
                await process.client.connect(three.owner.addresses[0])
        assert (await three.owner.status()).counters["blamed"] > before

    three.run(story())


def test_a_port_that_is_taken_is_an_error_and_not_shared(three: Three) -> None:
    async def story() -> None:
        taken = three.owner.addresses[0].partition("/p2p/")[0]
        with pytest.raises(ConfigurationError, match="choose another port"):
            async with GossipSupervisor(Identity.generate(), SPEC.encode(), listen=(taken,)):
                pass

    three.run(story())


def test_only_noise_is_offered_on_the_wire(three: Three) -> None:
    """py-libp2p's own default host accepts plaintext too: whoever knows a public key passes for its owner."""

    def answers(port: int, *proposals: str) -> list[bytes]:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            stream = connection.makefile("rwb", buffering=0)

            def say(text: str) -> bytes:
                line = text.encode() + b"\n"
                stream.write(bytes([len(line)]) + line)
                answer = stream.read(1)
                return bytes(stream.read(answer[0]) or b"") if answer else b""

            assert say("/multistream/1.0.0") == b"/multistream/1.0.0\n"
            return [say(proposal) for proposal in proposals]

    port = int(three.owner.addresses[0].split("/")[4])
    refused = ("/plaintext/2.0.0", "/tls/1.0.0", "/secio/1.0.0")
    assert three.run(asyncio.to_thread(answers, port, *refused)) == [b"na\n"] * 3
    assert three.run(asyncio.to_thread(answers, port, "/noise")) == [b"/noise\n"]


def test_nobody_else_gets_at_the_control_socket(three: Three) -> None:
    """One client, then no socket: it is gone with its private folder as soon as the supervisor is connected."""
    for one in (three.owner, three.other, three.third):
        folder = Path(psutil.Process(one.pid).cmdline()[-1]).parent
        assert folder.parent == Path(tempfile.gettempdir())
        assert not folder.exists()


def test_a_killed_process_is_back_within_seconds_with_its_address_and_hears_what_it_missed(three: Three) -> None:
    async def story() -> None:
        other = three.other
        pid, addresses = other.pid, other.addresses
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: other.pid != pid, 5)
        await three.owner.publish(signed(plan(6)))
        await heard(three.third, plan(6))
        async with asyncio.timeout(15):
            await other.up()
        await heard(other, plan(6), 15)
        assert other.addresses == addresses
        assert other.restarts == 1

    three.run(story())


def test_a_process_that_holds_too_many_tasks_is_started_again() -> None:
    async def story() -> None:
        async with members(1, max_tasks=5) as (owner,):
            await until(lambda: owner.restarts > 0, 10)

    asyncio.run(story())


def test_a_clean_stop_leaves_neither_a_process_nor_a_socket() -> None:
    async def story() -> tuple[int, Path]:
        async with members(1) as (owner,):
            assert owner.pid is not None
            return owner.pid, Path(psutil.Process(owner.pid).cmdline()[-1]).parent

    pid, folder = asyncio.run(story())
    assert not psutil.pid_exists(pid)
    assert not folder.exists()


def test_it_dies_with_the_process_that_started_it() -> None:
    script = (
        "import asyncio, os, signal\n"
        "from swarm_protocol.gossip.supervisor import GossipProcess\n"
        "async def main():\n"
        "    async with GossipProcess() as process:\n"
        "        print(process.pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    child = int(done.stdout)

    def gone() -> bool:
        return not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE

    asyncio.run(until(gone, 5))


@pytest.mark.parametrize(
    ("script", "fact"),
    [
        (
            "from libp2p import new_host; print(*new_host().get_network().upgrader.security_multistream.transports)",
            "/plaintext/2.0.0",
        ),
        ("import libp2p, hivemind", "duplicate symbol"),
    ],
    ids=["its default host accepts plaintext", "it cannot be loaded beside hivemind"],
)
def test_what_we_work_around_is_still_so(script: str, fact: str) -> None:
    """Once one of these fails, docs/gossip.md says something that is no longer true."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert fact in done.stdout + done.stderr
