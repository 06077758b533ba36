"""Hostile members are dropped, and honest delivery goes on before, during and after."""

from __future__ import annotations

import asyncio
import itertools
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.swarm.gossiping import SPEC, in_one_loop, ledger_head, members, plan, signed

from swarm_protocol.gossip.supervisor import GossipSupervisor
from swarm_protocol.identity import Identity

pytestmark = [pytest.mark.swarm, pytest.mark.alone]

WAYS = ("garbage", "forged", "foreign", "stale", "oversized", "flood", "frames", "streams")
ROUND = 100


class Honest:
    """Members who go on talking: how long each message takes to reach everybody."""

    def __init__(self, runner: asyncio.Runner, found: list[GossipSupervisor]) -> None:
        self.run = runner.run
        self.found = found
        self.sizes = itertools.count(1)

    async def delivery_s(self) -> float:
        """Announce one head, at the pace that is ours, and wait until everybody has it."""
        await asyncio.sleep(0.1)
        head = ledger_head(next(self.sizes))
        started_s = time.monotonic()
        await self.found[0].publish(signed(head))

        async def has(member: GossipSupervisor) -> None:
            async for envelope in member.records():
                if envelope.open().hash == head.hash:
                    return

        async with asyncio.timeout(5):
            await asyncio.gather(*(has(member) for member in self.found[1:]))
        return time.monotonic() - started_s

    async def dropped(self) -> int:
        return sum([(await one.status()).counters.get("dropped_peers", 0) for one in self.found])


@asynccontextmanager
async def attacker(addresses: list[str]) -> AsyncIterator[tuple[Callable[[str], None], asyncio.StreamReader]]:
    """A hostile member: what tells it what to do, and its answers."""
    script = Path(__file__).with_name("gossip_attacker.py")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), *addresses, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        writer, answers = process.stdin, process.stdout
        assert writer is not None
        assert answers is not None
        async with asyncio.timeout(30):
            assert await answers.readline() == b"ready\n"
        yield (lambda way: writer.write(f"{way}\n".encode())), answers
    finally:
        process.kill()
        await process.wait()


@pytest.fixture(scope="module")
def honest() -> Iterator[Honest]:
    with in_one_loop(members(3)) as (runner, found):
        yield Honest(runner, found)


def test_whoever_misbehaves_is_dropped_by_everybody_and_honest_delivery_goes_on(honest: Honest) -> None:
    async def story() -> None:
        await honest.found[0].publish(signed(plan(ROUND)))
        report = {"before": [await honest.delivery_s() for _ in range(10)]}
        async with attacker([one.addresses[0] for one in honest.found]) as (say, answers):
            for way in WAYS:
                dropped = await honest.dropped()
                say(way)
                answer = asyncio.create_task(answers.readline())
                report[way] = []
                while not answer.done():
                    report[way].append(await honest.delivery_s())
                done, took_s, left = answer.result().decode().split()
                assert (done, left) == (way, "0"), f"{way}: still connected to {left} after {took_s} s"
                assert await honest.dropped() - dropped == len(honest.found), way
        report["after"] = [await honest.delivery_s() for _ in range(10)]
        for name, times in report.items():
            median_ms, worst_ms = 1000 * statistics.median(times), 1000 * max(times)
            print(f"{name:10} {len(times):4} messages, median {median_ms:.0f} ms, worst {worst_ms:.0f} ms")
        assert all(one.restarts == 0 for one in honest.found)
        assert statistics.median(report["after"]) < 1.0

    honest.run(story())


def test_connections_that_come_and_go_leave_no_slot_and_no_task_behind(honest: Honest) -> None:
    async def story() -> None:
        owner = honest.found[0]
        before = (await owner.status()).gauges["tasks"]
        async with attacker(owner.addresses[:1]) as (say, answers), asyncio.timeout(60):
            say("churn")
            name, _, failed = (await answers.readline()).decode().split()
            assert (name, failed) == ("churn", "0")
        async with asyncio.timeout(10):
            while (await owner.status()).gauges["tasks"] > before + 30:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        await honest.delivery_s()

    honest.run(story())


def test_three_hundred_idle_connections_keep_nobody_out_for_long(honest: Honest) -> None:
    async def story() -> None:
        owner = honest.found[0]
        port = int(owner.addresses[0].split("/")[4])
        idle = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(300)]
        try:
            assert max([await honest.delivery_s() for _ in range(10)]) < 2.0
            # They have four seconds to shake hands; then others are let in again.
            newcomer = GossipSupervisor(Identity.generate(), SPEC.encode(), bootstrap=owner.addresses)
            async with asyncio.timeout(30), newcomer:
                while not await newcomer.client.peers():  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
        finally:
            for one in idle:
                one.close()

    honest.run(story())
