"""A run's gossip for tests: its owner, members as real processes, and a log to announce."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

from swarm_protocol.gossip import log_ranges, wire
from swarm_protocol.gossip.supervisor import GossipSupervisor
from swarm_protocol.identity import Identity
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.records import Envelope, LogHead, Record, RoundManifest, RoundPlan, Seat
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

T = TypeVar("T")
ZERO = bytes(32)
OWNER = Identity.from_seed(bytes([2]) * 32)
SPEC = RunSpec(
    name="gossip",
    seed=1,
    numerics="native",
    coordinator=OWNER.public_key.hex(),
    checkpoint="0" * 64,
    beacon="0" * 64,
    model=ModelSpec(),
    data=DataSpec(root="0" * 64, tokenizer="bytes", train_tokens=1, held_out_windows=1),
    training=TrainingSpec(),
    exchange=ExchangeSpec(),
    outer=OuterSpec(),
    rounds=RoundsSpec(),
    audit=AuditSpec(),
)
RUN = SPEC.run_id


def signed(record: Record, by: Identity = OWNER) -> Envelope:
    return Envelope.sign(by, record)


def plan(round: int, *, cursor: int = 0) -> RoundPlan:
    return RoundPlan(
        run=RUN,
        round=round,
        base=ZERO,
        roster=(Seat(peer=OWNER.public_key, steps=1, weight=1, reducer=True),),
        cursor=cursor,
        commit_by_ms=1,
        exchange_by_ms=2,
        previous_beacon=ZERO,
        log_size=0,
        log_root=ZERO,
    )


def manifest(round: int, *, root: bytes = ZERO) -> RoundManifest:
    return RoundManifest(
        run=RUN, round=round, plan=plan(round).hash, commitment_set=ZERO, parts=(None,), base=ZERO, root=root
    )


def ledger_head(size: int, root: bytes = ZERO) -> LogHead:
    return LogHead(run=RUN, round=0, sequence=size, root=root)


class Ledger:
    """The owner's log: entries, heads, and what others fetch of it."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.log = Log()

    def add(self, *records: Record) -> None:
        self.append(*(signed(record).encode() for record in records))

    def append(self, *entries: bytes) -> None:
        for entry in entries:
            self.entries.append(entry)
            self.log.append(leaf_hash(entry))

    def head(self) -> LogHead:
        return LogHead(run=RUN, round=0, sequence=self.log.size, root=self.log.root())

    async def provide(self, wanted: wire.Wanted) -> bytes:
        return log_ranges.provide(self.entries, self.log, wanted)


@contextlib.asynccontextmanager
async def members(
    count: int, *, ledger: Ledger | None = None, max_tasks: int = 2500
) -> AsyncIterator[list[GossipSupervisor]]:
    """The owner's gossip process and `count - 1` others, who know the owner's address; all of them with neighbours."""
    provider = None if ledger is None else ledger.provide
    owner = GossipSupervisor(OWNER, SPEC.encode(), provider=provider, max_tasks=max_tasks)
    found = [owner]
    try:
        await owner.__aenter__()
        others = [
            GossipSupervisor(Identity.generate(), SPEC.encode(), bootstrap=owner.addresses) for _ in range(count - 1)
        ]
        found += others
        await asyncio.gather(*(one.__aenter__() for one in others))
        async with asyncio.timeout(30.0):
            for one in found:
                while len(await one.client.peers()) < min(3, count - 1):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        yield found
    finally:
        await asyncio.gather(*(one.stop() for one in found))


@contextlib.contextmanager
def in_one_loop(swarm: contextlib.AbstractAsyncContextManager[T]) -> Iterator[tuple[asyncio.Runner, T]]:
    """A swarm that lasts from test to test, and the runner of its loop."""
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        found = runner.run(stack.enter_async_context(swarm))
        try:
            yield runner, found
        finally:
            runner.run(stack.aclose())


async def until(happened: Callable[[], bool], deadline_s: float) -> None:
    """Look until it is so."""
    async with asyncio.timeout(deadline_s):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def heard(member: GossipSupervisor, wanted: Record, deadline_s: float = 10.0) -> None:
    """Wait until this record reaches a member, whatever else comes before it."""
    async with asyncio.timeout(deadline_s):
        async for envelope in member.records():
            if envelope.open().hash == wanted.hash:
                return
