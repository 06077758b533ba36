"""Getting any checkpoint of a run the cheapest way there is: whole, or by deltas from one that is held or kept.

Averages come from whoever is likely to have them: our own disk, their reducers and others of their rounds while these keep
them, and last the coordinator. What is not to be had one way is tried another way; every step ends at the root that a signed
manifest names.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

import numpy as np

from swarm_protocol import chunks, deltas, fetch, parts
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.client import CoordinatorClient, SealedRound
from swarm_protocol.deltas import Link, Way
from swarm_protocol.errors import HashMismatchError, InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.identity import peer_id
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import PartRecord, RoundPlan

log = logging.getLogger(__name__)

Bytes = bytes | bytearray
Whole = Callable[[int, bytes], Awaitable[Checkpoint]]
Find = Callable[[bytes], Bytes | None]

PAGE = 100
AT_ONCE = 4
OTHERS_ASKED = 2
CALL_S = 5.0


class CatchUp:
    """Checkpoints of one run. `how` says how the last one was come by, `received_bytes` what all of them cost.

    Args:
        whole: fetches a checkpoint by its round and root; from the coordinator, if nothing is given.
        find: an average by its hash, if it is here already. Called in a thread.
        chain: the checkpoints before a round, newest first, at most so many; the coordinator's list, if nothing is given.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        plane: PeerPlane | None = None,
        *,
        whole: Whole | None = None,
        find: Find = lambda digest: None,
        chain: Callable[[int, int], Awaitable[list[Link]]] | None = None,
    ) -> None:
        self._client = client
        self._spec = client.spec
        self._plane = plane
        self._whole = whole or self._fetch
        self._find = find
        self._page = chain or self._listed
        self._reached: Checkpoint | None = None
        self._avoided: set[bytes] = set()
        self.how = ""
        self.received_bytes = 0

    async def checkpoint(self, round_number: int, root: bytes, held: Checkpoint | None = None) -> Checkpoint:
        """What round `round_number` starts from. What is broken off goes on where it was when it is asked for again.

        Args:
            held: a checkpoint that is here already; one that is no part of this run's chain is of no use, and does no harm.

        Raises:
            UnreachableError: somebody that is needed does not answer; try again.
            RefusedError, InvalidDataError: it is not to be had; the reason of the last way that was tried.
        """
        have = {one.round: one for one in (held, self._reached) if one is not None}
        chain = await self._chain(round_number, root, {number: one.root for number, one in have.items()})
        self._avoided.clear()
        failure: RefusedError | InvalidDataError | None = None
        for way in self._ways(chain, have):
            try:
                start = have[way.start.round] if way.held else await self._take_whole(way.start)
                found = await self._follow(start, way.deltas)
            except (RefusedError, InvalidDataError) as error:
                log.warning("checkpoint %d is not to be had by %s: %s", round_number, way, error)
                failure = error
                continue
            if found.root != root:
                raise HashMismatchError(
                    f"the signed rounds lead to another checkpoint {round_number} than {root.hex()}"
                )
            self._reached = None
            self.how = f"by {way}, about {way.size_bytes:,} bytes; whole it has {chain[-1].size_bytes:,}"
            return found
        assert failure is not None
        raise failure

    def _ways(self, chain: Sequence[Link], have: dict[int, Checkpoint]) -> Iterable[Way]:
        held = {number: one.root for number, one in have.items()}
        yield from deltas.ways(chain, held, deltas.round_bytes(self._spec))
        if not chain[-1].whole:  # others than the coordinator may have it
            yield Way(chain[-1], False, 0, chain[-1].size_bytes)

    async def _chain(self, round_number: int, root: bytes, held: dict[int, bytes]) -> list[Link]:
        """The checkpoints up to this one, oldest first, as far back as it may be of use."""
        chain: list[Link] = []
        each = deltas.round_bytes(self._spec)
        while not deltas.far_enough(chain, held, each):
            page = await self._page(chain[0].round if chain else round_number + 1, PAGE)
            expected = chain[0].round - 1 if chain else round_number
            if not page or [link.round for link in page] != list(range(expected, expected - len(page), -1)):
                raise InvalidDataError(f"the coordinator's list of checkpoints has a gap at {expected}")
            chain = [*reversed(page), *chain]
        if chain[-1].root != root:
            raise HashMismatchError(f"the coordinator lists another checkpoint {round_number} than {root.hex()}")
        return chain

    async def _listed(self, before: int, limit: int) -> list[Link]:
        answer = await self._client.json("/checkpoints", before=before, limit=limit)
        entries = answer.get("checkpoints")
        if not isinstance(entries, list):
            raise InvalidDataError("the coordinator's list of checkpoints is no list")
        return [Link.parse(entry) for entry in entries[:limit]]

    async def _fetch(self, round_number: int, root: bytes) -> Checkpoint:
        return await fetch.checkpoint(self._client, round_number, root)

    async def _take_whole(self, link: Link) -> Checkpoint:
        found = await self._whole(link.round, link.root)
        self.received_bytes += link.size_bytes
        self._reached = found
        return found

    async def _follow(self, checkpoint: Checkpoint, count: int) -> Checkpoint:
        last = checkpoint.round + count
        while checkpoint.round < last:
            checkpoint = await self._delta(checkpoint, recent=last - checkpoint.round <= self._spec.rounds.keep_rounds)
            self._reached = checkpoint
        return checkpoint

    async def _delta(self, base: Checkpoint, *, recent: bool) -> Checkpoint:
        """Apply the averages of the round that starts from this checkpoint."""
        plan = await self._client.plan(base.round)
        sealed = None if plan is None else await self._client.manifest(plan)
        if plan is None or sealed is None:
            raise InvalidDataError(f"round {base.round} is not sealed")
        pseudo_gradient = np.zeros(self._spec.num_trainable, np.float32)
        gate = asyncio.Semaphore(AT_ONCE)

        async def fill(part: int, name: bytes) -> None:
            async with gate:
                average = await self.average(plan, sealed, name, recent=recent)
                await asyncio.to_thread(deltas.decode, self._spec, part, average, pseudo_gradient)

        named = [(part, name) for part, name in enumerate(sealed.manifest.parts) if name is not None]
        await _all(fill(part, name) for part, name in named)
        return await asyncio.to_thread(deltas.applied, self._spec, base, sealed.manifest, pseudo_gradient)

    async def average(self, plan: RoundPlan, sealed: SealedRound, name: bytes, *, recent: bool = True) -> Bytes:
        """The bytes of an average that a sealed round names by its part record. Peers are asked for `recent` ones only.

        Raises:
            UnreachableError, RefusedError, InvalidDataError
        """
        record, reducer = sealed.part_records[name]
        if record.size_bytes != parts.encoded_part_bytes(self._spec, record.part):
            raise InvalidDataError(f"the average of part {record.part} of round {record.round} has an impossible size")
        found = await asyncio.to_thread(self._find, record.result)
        if found is not None:
            return found
        found = await self._from_peers(plan, record, reducer) if recent and self._plane is not None else None
        if found is None:
            found = await self._client.chunk(record.result, max_bytes=record.size_bytes)
        self.received_bytes += len(found)
        return found

    async def _from_peers(self, plan: RoundPlan, record: PartRecord, reducer: bytes) -> Bytes | None:
        assert self._plane is not None
        here = self._plane.identity.public_key
        others = [seat.peer for seat in plan.roster if seat.peer not in (reducer, here)]
        turn = record.part % max(1, len(others))
        for peer in [reducer, *[*others[turn:], *others[:turn]][:OTHERS_ASKED]]:
            if peer == here or peer in self._avoided:
                continue
            try:
                _, data = await self._plane.call(
                    peer,
                    {"op": "get", "hash": record.result},
                    max_answer_bytes=record.size_bytes,
                    timeout_s=CALL_S,
                )
            except UnreachableError as error:
                self._avoided.add(peer)
                log.info("part %d of round %d: %s", record.part, record.round, error)
            except (RefusedError, InvalidDataError) as error:
                log.info("part %d of round %d is not had from a peer: %s", record.part, record.round, error)
            else:
                if await asyncio.to_thread(chunks.content_hash, data) == record.result:
                    return data
                self._avoided.add(peer)
                log.warning("%s serves other bytes than the average that it was asked for", peer_id(peer))
        return None


async def _all(work: Iterable[Awaitable[None]]) -> None:
    """Do these at once; where one fails, end the others and raise what it raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
