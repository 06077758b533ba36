"""Hostile members are dropped, and honest delivery goes on before, during and after."""

from __future__ import annotations

import asyncio
import itertools
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.swarm.gossiping import SPEC, ledger_head, members, plan, signed

from swarm_protocol.gossip.supervisor import GossipSupervisor
from swarm_protocol.identity import Identity

pytestmark = pytest.mark.swarm

WAYS = ("garbage", "forged", "foreign", "stale", "oversized", "flood", "frames", "streams")
ROUND = 100


class Honest:
    """Members who go on talking: how long each message takes to reach everybody."""

    def __init__(self, found: list[GossipSupervisor]) -> None:
        self.found = found
        self.sizes = itertools.count(1)

    async def delivery_s(self) -> float:
        """Announce one head and wait until everybody has it."""
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
async def attacker(addresses: list[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    script = Path(__file__).with_name("gossip_attacker.py")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), *addresses, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        await process.wait()


def test_whoever_misbehaves_is_dropped_by_everybody_and_honest_delivery_goes_on() -> None:
    async def story() -> None:
        async with members(3) as found:
            honest = Honest(found)
            await found[0].publish(signed(plan(ROUND)))
            before = [await honest.delivery_s() for _ in range(10)]
            report = {"before": before}
            addresses = [one.addresses[0] for one in found]
            async with attacker(addresses) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                for way in WAYS:
                    dropped = await honest.dropped()
                    process.stdin.write(f"{way}\n".encode())
                    answer = asyncio.create_task(process.stdout.readline())
                    report[way] = []
                    while not answer.done():
                        report[way].append(await honest.delivery_s())
                        await asyncio.sleep(0.05)
                    done, took_s, left = answer.result().decode().split()
                    assert (done, left) == (way, "0"), f"{way}: still connected to {left} after {took_s} s"
                    assert await honest.dropped() - dropped == len(found), way
            report["after"] = [await honest.delivery_s() for _ in range(10)]
            assert all(one.restarts == 0 for one in found)
            for name, times in report.items():
                print(f"{name:10} {len(times):4} messages, median {statistics.median(times) * 1000:.0f} ms, "
                      f"worst {max(times) * 1000:.0f} ms")  # fmt: skip
            assert statistics.median(report["after"]) < 1.0

    asyncio.run(story())


def test_three_hundred_idle_connections_keep_nobody_out_for_long() -> None:
    async def story() -> None:
        async with members(3) as found:
            honest = Honest(found)
            await honest.delivery_s()
            host, port = "127.0.0.1", int(found[0].addresses[0].split("/")[4])
            idle = [socket.create_connection((host, port), timeout=5) for _ in range(300)]
            try:
                worst_s = max([await honest.delivery_s() for _ in range(10)])
                assert worst_s < 2.0
                # They have three seconds to shake hands; then others are let in again.
                newcomer = GossipSupervisor(Identity.generate(), SPEC.encode(), bootstrap=found[0].addresses)
                async with asyncio.timeout(20), newcomer:
                    while not await newcomer.client.peers():  # noqa: ASYNC110
                        await asyncio.sleep(0.2)
            finally:
                for one in idle:
                    one.close()

    asyncio.run(story())
