"""How long a record takes to everybody over gossip, and what it costs each node, with 5, 10 and 20 processes on one machine.

    python benchmarks/gossip.py [--nodes 5 10 20] [--messages 150] [--per-s 5] [--json]

Every node is a gossip process of its own that knows the address of the first; the first announces manifests, as many a
second as said. A delivery is one record at one node, timed from the call that announces it to the moment that the node's
client has it. Bytes are those of GossipSub's frames, without noise's and TCP's own. Memory and tasks are the largest
of any process, in the middle and at the end. `observe` is started once and timed until its first line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass

from swarm_protocol.gossip.supervisor import GossipSupervisor
from swarm_protocol.identity import Identity
from swarm_protocol.records import Envelope, RoundManifest
from swarm_protocol.spec import (
    AuditSpec,
    DataSpec,
    ExchangeSpec,
    ModelSpec,
    OuterSpec,
    RoundsSpec,
    RunSpec,
    TrainingSpec,
)

STARTED_AT_ONCE = 4
PARTS = 64
LAST_S = 30.0


@dataclass
class Figures:
    """Of one swarm: seconds, bytes, counts."""

    nodes: int
    messages: int
    record_bytes: int
    deliveries: int
    missing: int
    p50_ms: float
    p95_ms: float
    worst_ms: float
    out_bytes_per_node_and_message: float
    worst_out_bytes_per_message: float
    owner_out_bytes_per_message: float
    cpu_ms_per_node_and_message: float
    duplicates_per_delivery: float
    memory_mb: list[float]
    tasks: list[int]
    restarts: int
    counters: dict[str, int]


def run_of(owner: Identity) -> RunSpec:
    """A run that exists in name only."""
    zero = "0" * 64
    return RunSpec(
        name="gossip",
        seed=1,
        numerics="native",
        coordinator=owner.public_key.hex(),
        checkpoint=zero,
        beacon=zero,
        model=ModelSpec(),
        data=DataSpec(root=zero, tokenizer="bytes", train_tokens=1, held_out_windows=1),
        training=TrainingSpec(),
        exchange=ExchangeSpec(),
        outer=OuterSpec(),
        rounds=RoundsSpec(),
        audit=AuditSpec(),
    )


async def measure(nodes: int, messages: int, per_s: float) -> Figures:
    """Start a swarm, announce, and count."""
    owner = Identity.generate()
    spec = run_of(owner)
    first = GossipSupervisor(owner, spec.encode())
    found = [first]
    try:
        await first.__aenter__()
        while len(found) < nodes:
            more = [
                GossipSupervisor(Identity.generate(), spec.encode(), bootstrap=first.addresses)
                for _ in range(min(STARTED_AT_ONCE, nodes - len(found)))
            ]
            found += more
            await asyncio.gather(*(one.__aenter__() for one in more))
        async with asyncio.timeout(60):
            for one in found:
                while len(await one.client.peers()) < min(4, nodes - 1):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        await asyncio.sleep(2.0)  # two heartbeats, in which the mesh is made
        return await announce(found, owner, spec, messages, per_s)
    finally:
        await asyncio.gather(*(one.stop() for one in found))


async def announce(
    found: list[GossipSupervisor], owner: Identity, spec: RunSpec, messages: int, per_s: float
) -> Figures:
    sent_s: dict[bytes, float] = {}
    times: list[float] = []

    async def listen(member: GossipSupervisor) -> None:
        left = messages
        async for envelope in member.records():
            arrived_s = time.perf_counter()
            started_s = sent_s.get(envelope.open().hash)
            if started_s is not None:
                times.append(arrived_s - started_s)
                left -= 1
                if not left:
                    return

    async def held() -> tuple[float, int]:
        gauges = [(await one.status()).gauges for one in found]
        return max(one["memory_bytes"] for one in gauges) / 1e6, max(one["tasks"] for one in gauges)

    async def spent(what: str) -> list[int]:
        return [(await one.status()).gauges[what] for one in found]

    listening = asyncio.gather(*(listen(one) for one in found[1:]))
    sent_before, cpu_before = await spent("bytes_out"), await spent("cpu_ms")
    began_s, middle, size = time.perf_counter(), (0.0, 0), 0
    for number in range(messages):
        await asyncio.sleep(max(0.0, began_s + number / per_s - time.perf_counter()))
        zero = bytes(32)
        record = RoundManifest(
            run=spec.run_id, round=number, plan=zero, commitment_set=zero, parts=(zero,) * PARTS, base=zero, root=zero
        )
        envelope = Envelope.sign(owner, record)
        size = len(envelope.encode())
        sent_s[record.hash] = time.perf_counter()
        await found[0].publish(envelope)
        if number == messages // 2:
            middle = await held()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_S):
            await listening
    end, sent_after, cpu_after = await held(), await spent("bytes_out"), await spent("cpu_ms")
    counters = [(await one.status()).counters for one in found]
    out = [(late - early) / messages for late, early in zip(sent_after, sent_before, strict=True)]
    expected = messages * (len(found) - 1)
    times.sort()
    return Figures(
        nodes=len(found),
        messages=messages,
        record_bytes=size,
        deliveries=len(times),
        missing=expected - len(times),
        p50_ms=1000 * times[len(times) // 2],
        p95_ms=1000 * times[len(times) * 95 // 100],
        worst_ms=1000 * times[-1],
        out_bytes_per_node_and_message=sum(out) / len(out),
        worst_out_bytes_per_message=max(out),
        owner_out_bytes_per_message=out[0],
        cpu_ms_per_node_and_message=(sum(cpu_after) - sum(cpu_before)) / messages / len(found),
        duplicates_per_delivery=sum(one.get("duplicate", 0) for one in counters) / max(1, len(times)),
        memory_mb=[middle[0], end[0]],
        tasks=[middle[1], end[1]],
        restarts=sum(one.restarts for one in found),
        counters=dict(sum((Counter(one) for one in counters), Counter())),
    )


async def observe_start_s() -> float:
    """From starting `swarm-node observe` to its first line."""
    owner = Identity.generate()
    async with GossipSupervisor(owner, run_of(owner).encode()) as gossip:
        started_s = time.perf_counter()
        command = [sys.executable, "-m", "swarm_node", "observe", gossip.addresses[0]]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            assert process.stdout is not None
            async with asyncio.timeout(60):
                await process.stdout.readline()
            return time.perf_counter() - started_s
        finally:
            process.kill()
            await process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nodes", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--messages", type=int, default=150)
    parser.add_argument("--per-s", type=float, default=5.0)
    parser.add_argument("--no-observe", action="store_true", help="Do not time the start of `swarm-node observe`.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = []
    for nodes in options.nodes:
        figures = asyncio.run(measure(nodes, options.messages, options.per_s))
        found.append(figures)
        print(
            f"{figures.nodes:3} nodes   {figures.messages} records of {figures.record_bytes:,} bytes, {options.per_s:g}/s   "
            f"p50 {figures.p50_ms:.0f} ms   p95 {figures.p95_ms:.0f} ms   worst {figures.worst_ms:.0f} ms   "
            f"missing {figures.missing}   out per node and record {figures.out_bytes_per_node_and_message:,.0f} bytes, "
            f"the owner's {figures.owner_out_bytes_per_message:,.0f}   CPU per node and record "
            f"{figures.cpu_ms_per_node_and_message:.1f} ms   memory {figures.memory_mb[-1]:.0f} MB   "
            f"tasks {figures.tasks[0]} then {figures.tasks[1]}",
            file=sys.stderr if options.json else sys.stdout,
            flush=True,
        )
    start_s = None if options.no_observe else asyncio.run(observe_start_s())
    if start_s is not None:
        print(f"observe: first line after {start_s:.2f} s", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps({"swarms": [asdict(one) for one in found], "observe_start_s": start_s}))


if __name__ == "__main__":
    main()
