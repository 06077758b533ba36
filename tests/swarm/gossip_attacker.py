"""A hostile member, as a process of its own: `python gossip_attacker.py ADDRESS...` with a way to attack per line of stdin.

It joins as anybody may, with a certificate of its own, and does to every address what the line says until it is dropped by
all of them; then it says on stdout how long that took. It is made of the real process's parts, without their gate.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.swarm.gossiping import RUN, SPEC, ZERO, manifest, plan, signed

from swarm_protocol.errors import SwarmError
from swarm_protocol.gossip import wire
from swarm_protocol.gossip.process import Plane
from swarm_protocol.gossip.transport import CONNECTIONS, RESERVED_FOR_DIALING, dial, new_gossip_host
from swarm_protocol.gossip.validation import Decision, Outcome
from swarm_protocol.identity import Identity
from swarm_protocol.records import Envelope, TransportKey, Verdict
from swarm_protocol.records import Outcome as Judged

STRANGER = Identity.generate()
LONGEST_S = 30.0
SLOTS = CONNECTIONS - RESERVED_FOR_DIALING


def verdict(number: int) -> Verdict:
    return Verdict(
        run=RUN, round=0, sequence=number, slot=0, commitment=ZERO, outcome=Judged.ACCEPTED, comparison=None, statistic=None,
        reason="", steps_replayed=1, fingerprint=ZERO,
    )  # fmt: skip


def make(way: str, number: int) -> bytes:
    """A message of this kind."""
    if way == "flood":  # well-formed, of a key that might yet be appointed
        return signed(verdict(number), STRANGER).encode()
    if way == "garbage":
        return os.urandom(200)
    if way == "forged":
        return signed(plan(number), STRANGER).encode()
    if way == "foreign":
        return signed(plan(number).model_copy(update={"run": ZERO})).encode()
    if way == "stale":  # what the owner did sign, long ago
        return signed(manifest(number % 50)).encode()
    if way == "oversized":
        return os.urandom(300 << 10)
    raise ValueError(way)


async def send(plane: Plane, way: str, number: int) -> None:
    await plane.mesh.announce(make(way, number))
    await trio.sleep(0.002)


async def open_streams(plane: Plane, way: str, number: int) -> None:
    for peer in list(plane.mesh.peers):
        for _ in range(50):
            try:
                with trio.move_on_after(2.0):
                    await plane.host.get_network().new_stream(peer)
            except Exception as error:
                print(f"# {error!r:.100}", file=sys.stderr)
                break
    await trio.sleep(0.05)


async def send_frames(plane: Plane, way: str, number: int) -> None:
    """Frames beyond all bounds, straight into the stream."""
    for stream in list(plane.mesh.peers.values()):
        try:
            with trio.move_on_after(2.0):
                await stream.write(b"\xff\xff\xff\x7f" + os.urandom(1000))
        except Exception as error:
            print(f"# {error!r:.100}", file=sys.stderr)
    await trio.sleep(0.1)


WAYS: dict[str, Callable[[Plane, str, int], Awaitable[None]]] = {"streams": open_streams, "frames": send_frames}


async def attack(way: str, addresses: list[str]) -> None:
    seed = os.urandom(32)
    key = TransportKey(run=RUN, round=0, key=Identity.from_seed(seed).public_key, expires_ms=1 << 52)
    certificate = Envelope.sign(Identity.generate(), key).encode()

    async def nothing(wanted: wire.Wanted) -> bytes:
        raise SwarmError("nothing")

    joining = wire.Joining(seed, certificate, SPEC.encode(), target=0)
    plane = Plane(joining, lambda event: None, nothing)
    plane.gate.judge = lambda data: Decision(Outcome.DUPLICATE)  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        await nursery.start(plane.run)
        for address in addresses:
            await plane.connect(address)
        while len(plane.mesh.members()) < len(addresses):  # noqa: ASYNC110
            await trio.sleep(0.05)
        started_s, number = time.monotonic(), 0
        with trio.move_on_after(LONGEST_S):
            while plane.host.get_network().get_connections():
                await WAYS.get(way, send)(plane, way, number)
                number += 1
        took_s = time.monotonic() - started_s
        left = len(plane.host.get_network().get_connections())
        print(f"{way} {took_s:.2f} {left}", flush=True)
        plane.stop()


async def churn(address: str) -> None:
    """Connect more often than there are slots for those who dial, ten at a time, and go away each time."""
    started_s, failed = time.monotonic(), 0

    async def come_and_go() -> None:
        nonlocal failed
        host = new_gossip_host(os.urandom(32))
        async with host.run([]):
            for _ in range(SLOTS // 10 + 1):
                try:
                    peer = await dial(host, address)
                    await host.get_network().close_peer(peer)
                except SwarmError:
                    failed += 1
            with trio.move_on_after(2.0):
                await host.close()

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(come_and_go)
    print(f"churn {time.monotonic() - started_s:.2f} {failed}", flush=True)


async def main() -> None:
    print("ready", flush=True)
    while True:
        line = await trio.to_thread.run_sync(sys.stdin.readline)
        if not line:
            return
        if line.strip() == "churn":
            await churn(sys.argv[1])
        else:
            await attack(line.strip(), sys.argv[1:])


if __name__ == "__main__":
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    logging.getLogger().setLevel(logging.CRITICAL)
    trio.run(main)
