"""The run owner's gossiper: tells everybody what the coordinator has signed, as soon as it is in the log.

A process beside the checkpoint worker, with that one's key. It follows the log like anybody, gossips what gossip carries
and the newest signed head, and gives other members ranges of the log. It decides nothing, and stopping it stops nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from pathlib import Path

from swarm_coordinator.run_directory import RunDirectory
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import RefusedError, UnreachableError
from swarm_protocol.files import write_atomic
from swarm_protocol.gossip import log_ranges, wire
from swarm_protocol.gossip.supervisor import GossipSupervisor
from swarm_protocol.gossip.validation import AUDITORS_KINDS, MAX_MESSAGE_BYTES, OWNERS_KINDS, ROUNDS_BACK
from swarm_protocol.http import persist
from swarm_protocol.identity import Identity
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.records import Appointment, Ban, Dismissal, Envelope, Equivocation, Record, RunEnd

log = logging.getLogger(__name__)

START_PATIENCE_S = 120.0
PATIENCE_S = 24 * 3600.0
WAIT_S = 20.0
TOGETHER_S = 0.25
"""How long records are collected before they are gossiped with one head."""

PAUSE_S = 1.0
ATTEMPTS = 30
LASTING = (Appointment, Ban, Dismissal, Equivocation, RunEnd)


async def run(directory: Path, url: str) -> None:
    """Gossip until cancelled.

    Raises:
        SwarmError: it cannot listen where `gossip.listen` says, or the coordinator does not answer.
    """
    home = RunDirectory(directory)
    listen = home.config().gossip.listen
    assert listen is not None, "serve starts this where there is an address to listen on"
    client = await persist(lambda: CoordinatorClient.connect(url), deadline_s=START_PATIENCE_S)
    async with client:
        announcer = Announcer(client)
        async with GossipSupervisor(
            Identity.load(home.worker_key), client.spec.encode(), listen=[listen], provider=announcer.provide
        ) as gossip:
            write_atomic(home.gossip_file, json.dumps(gossip.addresses).encode())
            log.info("gossiping at %s", ", ".join(gossip.addresses))
            try:
                await announcer.run(gossip)
            finally:
                home.gossip_file.unlink(missing_ok=True)


class Announcer:
    """Follows a run's log, and says what is new in it."""

    def __init__(self, client: CoordinatorClient) -> None:
        self._client = client
        self._run = client.spec.run_id
        self._log = Log()

    async def run(self, gossip: GossipSupervisor) -> None:
        """Until cancelled: first what a newcomer has to know, then all that comes."""
        while True:
            head, signed = await persist(
                lambda: self._client.signed_log_head(after=self._log.size, wait_s=WAIT_S), deadline_s=PATIENCE_S
            )
            if head.sequence <= self._log.size:
                continue
            for envelope in await self._taken(head.sequence):
                await self._say(gossip, envelope)
            await self._say(gossip, signed)
            await asyncio.sleep(TOGETHER_S)

    async def _taken(self, size: int) -> list[Envelope]:
        """Take the log over up to this size; returns what of it is to be said, which is less of what is long past."""
        first, lasting, recent = self._log.size == 0, list[Envelope](), deque[tuple[int, Envelope]]()
        newest = 0

        async def take() -> None:
            nonlocal newest
            async for envelope in self._client.log(self._log.size, size):
                self._log.append(leaf_hash(envelope.encode()))
                record = envelope.open()
                newest = max(newest, record.round if isinstance(record, OWNERS_KINDS) else 0)
                if not _carried(envelope, record):
                    continue
                if isinstance(record, LASTING):
                    lasting.append(envelope)
                else:
                    recent.append((record.round, envelope))
                while first and recent and recent[0][0] + ROUNDS_BACK < newest:
                    recent.popleft()

        await persist(take, deadline_s=PATIENCE_S)
        return [*lasting, *(envelope for _, envelope in recent)]

    async def _say(self, gossip: GossipSupervisor, envelope: Envelope) -> None:
        for _ in range(ATTEMPTS):
            try:
                await gossip.publish(envelope)
            except UnreachableError as error:
                log.info("not gossiped yet: %s", error)
            except RefusedError as error:
                log.info("not gossiped: %s", error)
                return
            else:
                return
            await asyncio.sleep(PAUSE_S)

    async def provide(self, wanted: wire.Wanted) -> bytes:
        """A range of the log, for another member. Raises `RefusedError`, `UnreachableError`."""
        first, last = log_ranges.bounds(self._log, wanted)
        entries = [envelope.encode() async for envelope in self._client.log(first, last)]
        return log_ranges.pack(entries, self._log, wanted)


def _carried(envelope: Envelope, record: Record) -> bool:
    kinds = (*OWNERS_KINDS, *AUDITORS_KINDS, Equivocation)
    return isinstance(record, kinds) and len(envelope.encode()) <= MAX_MESSAGE_BYTES
