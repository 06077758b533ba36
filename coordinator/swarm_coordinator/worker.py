"""The checkpoint worker: follows the checkpoint, off the nodes' path, and is everybody's first peer.

In a round that needs sketches it says which count and what they select (`selecting`). It fetches each average that a
reducer published, checks it, keeps its bytes and says so; once the exchange of a round is closed it does the outer step and
reports the root that the manifest will name; it stores every checkpoint's chunks, deletes those that are not kept
(`collecting`), gets back what the store has lost (`restoring`), and has each checkpoint evaluated by another process
(`evaluating`). It holds no secrets but its key, and stopping it stops nothing that nodes have begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from swarm_coordinator.collecting import Collector, Records
from swarm_coordinator.db.signing import open_ledger
from swarm_coordinator.evaluating import Evaluator, wants_sample
from swarm_coordinator.restoring import Restoring
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.selecting import Selecting
from swarm_coordinator.serving import StoredStates
from swarm_coordinator.store import Store
from swarm_protocol import checkpoint as checkpoints
from swarm_protocol import parts, sketching, training
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import content_hash
from swarm_protocol.client import Commitments, CoordinatorClient
from swarm_protocol.dht import HOLDING_TTL_S
from swarm_protocol.download import ChunkDesk
from swarm_protocol.errors import InvalidDataError, RefusedError, SwarmError, UnreachableError
from swarm_protocol.files import write_atomic
from swarm_protocol.http import persist
from swarm_protocol.identity import Identity, peer_id
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import (
    Addresses,
    CheckpointReport,
    Evaluation,
    Holding,
    PartHeld,
    PartRecord,
    Record,
    RoundPlan,
)
from swarm_protocol.signing import SigningLedger

log = logging.getLogger(__name__)

PATIENCE_S = 24 * 3600.0
START_PATIENCE_S = 120.0
POLL_S = 10.0
FETCH_TIMEOUT_S = 15.0
RETRY_S = 1.0
ATTEMPT_SHARE = 0.2
OTHERS_ASKED = 3
PARALLEL = 4

T = TypeVar("T")


async def run(directory: Path, url: str, host: str | None = None) -> None:
    """Work until the run is finished, or until cancelled.

    `host` is where the coordinator listens for nodes, if that is elsewhere than at `url`: peers come from there as well.

    Raises:
        SwarmError: the worker cannot do its work here.
    """
    home = RunDirectory(directory)
    identity = Identity.load(home.worker_key)
    client = await persist(lambda: CoordinatorClient.connect(url), deadline_s=START_PATIENCE_S)
    async with client:
        training.configure(1)
        listen = f"/ip4/{_host(host or url)}/tcp/{_port(directory / 'worker' / 'peer-port')}"
        plane = await PeerPlane.start(home.worker_key, client.spec.run_id, listen=[listen])
        try:
            with (
                open_ledger(home, directory / "worker" / "signed.db", identity) as ledger,
                contextlib.ExitStack() as stack,
            ):
                store, evaluator, collector = Store(home.objects_url()), Evaluator(directory), None
                if home.config().objects.keep == "snapshots":
                    records = stack.enter_context(contextlib.closing(Records(home)))
                    collector = Collector(client.spec, store, records.live)
                await CheckpointWorker(client, plane, ledger, store, evaluator, collector).run()
        finally:
            await plane.close()


def _host(url: str) -> str:
    """The address to listen on, by that of the coordinator or its URL: loopback for a coordinator on loopback."""
    host = url if "://" not in url else url.split("://")[-1].split("/")[0].rsplit(":", 1)[0]
    return "127.0.0.1" if host in ("127.0.0.1", "localhost") else "0.0.0.0"  # noqa: S104  # peers come from anywhere


def _port(path: Path) -> int:
    """The port of the first start, for ever: nodes know it."""
    if path.exists():
        return int(path.read_text())
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = int(listener.getsockname()[1])
    write_atomic(path, str(port).encode())
    return port


class CheckpointWorker:
    """One run's checkpoint worker."""

    def __init__(
        self,
        client: CoordinatorClient,
        plane: PeerPlane,
        ledger: SigningLedger,
        store: Store,
        evaluator: Evaluator,
        collector: Collector | None = None,
    ) -> None:
        self._client = client
        self._spec = client.spec
        self._plane = plane
        self._ledger = ledger
        self._store = store
        self._evaluator = evaluator
        self._evaluations: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
        self._sealed = asyncio.Event()
        self._waiting: list[bytes] = []
        self._collector = collector
        self._storing = asyncio.Lock()
        self._restoring = Restoring(client, plane, store, self._storing)

    async def run(self) -> None:
        """Follow the run round by round until its last one is sealed and evaluated."""
        addresses = tuple(await self._plane.addresses())
        here = self._ledger.sign_next(
            lambda sequence: Addresses(run=self._spec.run_id, round=0, sequence=sequence, multiaddrs=addresses)
        )
        await self._patiently(lambda: self._client.post(here))
        await self._plane.serve(ChunkDesk(StoredStates(self._store).find).handlers)
        round_number, root = await self._patiently(self._client.latest_checkpoint)
        checkpoint = await self._restoring.checkpoint(round_number, root)
        await self._catch_up()
        self._newest = checkpoint
        announcing = asyncio.create_task(self._announce())
        others = [
            announcing,
            asyncio.create_task(self._evaluate()),
            asyncio.create_task(self._restoring.rest(round_number)),
        ]
        try:
            while checkpoint.round < self._spec.rounds.count:
                try:
                    checkpoint = await self._round(checkpoint)
                except RefusedError as error:
                    if error.code != "run-finished":
                        raise
                    break
                self._newest = checkpoint
                self._sealed.set()
                self._want_evaluated(checkpoint.round, checkpoint.root)
                if self._collector is not None and self._collector.due and not self._storing.locked():
                    others = [*(one for one in others if not one.done()), asyncio.create_task(self._collect_garbage())]
            await self._evaluations.join()
            await self._collect_garbage()
            log.info("the run's last checkpoint is sealed and evaluated")
            await announcing  # still everybody's first peer
        finally:
            for task in others:
                task.cancel()
            await self._evaluator.close()

    async def _announce(self) -> None:
        """Say in the DHT that the newest checkpoint is to be had here as well, until cancelled."""
        while True:
            self._sealed.clear()
            newest = self._newest
            record = partial(self._holding, newest.round, newest.root)
            try:
                envelope = await asyncio.to_thread(self._ledger.sign_next, record)
                await self._plane.directory.hold(newest.root, envelope)
            except UnreachableError as error:
                log.info("nobody hears which checkpoint is here: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HOLDING_TTL_S / 3):
                    await self._sealed.wait()

    def _holding(self, round_number: int, root: bytes, sequence: int) -> Holding:
        return Holding(run=self._spec.run_id, round=round_number, sequence=sequence, root=root)

    async def _round(self, checkpoint: Checkpoint) -> Checkpoint:
        plan = await self._until(lambda: self._client.plan(checkpoint.round, wait_s=POLL_S))
        commitments = await self._until(lambda: self._client.commitments(plan, wait_s=POLL_S))
        selecting = asyncio.create_task(self._select(plan, commitments))
        collecting = asyncio.create_task(self._collect(plan, commitments, selecting))
        try:
            chosen = await self._until(lambda: self._client.sealing(plan.round, wait_s=POLL_S))
        finally:
            collecting.cancel()
            selecting.cancel()
            for outcome in await asyncio.gather(collecting, selecting, return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.error("collecting the averages of round %d failed: %s", plan.round, outcome)
        averages = await self._averages(plan, chosen)
        following = await asyncio.to_thread(checkpoints.advance, self._spec, checkpoint, averages)
        async with self._storing:
            await asyncio.to_thread(self._store.put_state, *following.buffers)
        await self._sign_and_post(
            CheckpointReport(
                run=self._spec.run_id, round=plan.round, base=plan.base, parts=tuple(chosen), root=following.root
            )
        )
        return following

    async def _averages(self, plan: RoundPlan, chosen: list[bytes | None]) -> list[bytes | None]:
        """The bytes of the part records that a round is sealed with; they were held, or would not have been chosen."""
        averages: list[bytes | None] = []
        for name in chosen:
            if name is None:
                averages.append(None)
                continue
            envelope = await self._patiently(lambda name=name: self._client.record(name))  # type: ignore[misc]
            record = envelope.open_as(PartRecord, run=self._spec.run_id)
            others = [seat.peer for seat in plan.roster if seat.peer != envelope.key]
            while (average := await self._fetch([envelope.key, *others], record)) is None:
                log.error("the average %s is not in the object store, and no node has it", record.result.hex())
                await asyncio.sleep(RETRY_S)
            await asyncio.to_thread(self._store.put, record.result, average)
            averages.append(average)
        return averages

    async def _collect_garbage(self) -> None:
        """Delete what nothing needs any more; no checkpoint is stored meanwhile."""
        if self._collector is None:
            return
        async with self._storing:
            try:
                await asyncio.to_thread(self._collector.collect, self._waiting)
            except Exception as error:  # noqa: BLE001  # the store's or the database's: the run goes on, and the next turn tries again
                log.warning("garbage is not collected now: %s", error)

    # Averages

    async def _select(self, plan: RoundPlan, commitments: Commitments) -> set[int]:
        """The slots that averages may be made of: all that committed, or those that sketches select."""
        if not sketching.needed(self._spec.exchange.aggregator, plan.roster, commitments.by_slot):
            return set(commitments.by_slot)
        selecting = Selecting(self._client, self._plane, self._store, self._ledger, plan, commitments)
        return {one.slot for one in (await selecting.close()).selected}

    async def _collect(self, plan: RoundPlan, commitments: Commitments, selecting: asyncio.Task[set[int]]) -> None:
        """Fetch, check and keep every average that is published, as it comes; until cancelled."""
        reducers = {seat.peer for seat in plan.roster if seat.reducer}
        gate = asyncio.Semaphore(PARALLEL)
        sources: dict[bytes, list[bytes]] = {}
        count = 0
        async with asyncio.TaskGroup() as tasks:
            while True:
                found = await self._patiently(
                    lambda: self._client.part_records(plan.round, after=count, wait_s=POLL_S)  # noqa: B023
                )
                for envelope in found or []:
                    try:
                        record = envelope.open_as(PartRecord, run=self._spec.run_id, round=plan.round)
                        if envelope.key not in reducers or record.commitment_set != commitments.closing.hash:
                            raise InvalidDataError("a part record that is not of this round")
                        if not set(record.slots) <= await selecting:
                            raise InvalidDataError("a part record over slots that are not selected")
                    except InvalidDataError as error:
                        log.warning("round %d: %s", plan.round, error)
                        continue
                    # A backup may come to the same average as the first reducer, and sign the same record.
                    if record.hash in sources:
                        sources[record.hash].insert(0, envelope.key)
                    else:
                        sources[record.hash] = [envelope.key]
                        tasks.create_task(self._hold(plan, sources[record.hash], record, gate))
                count += len(found or [])
                if not found:
                    await asyncio.sleep(0.1)

    async def _hold(self, plan: RoundPlan, reducers: list[bytes], record: PartRecord, gate: asyncio.Semaphore) -> None:
        if record.size_bytes != parts.encoded_part_bytes(self._spec, record.part):
            return
        while True:
            async with gate:
                others = [seat.peer for seat in plan.roster if seat.peer not in reducers][:OTHERS_ASKED]
                average = await self._fetch([*reducers, *others], record)
            if average is not None:
                break
            await asyncio.sleep(RETRY_S)
        try:
            await asyncio.to_thread(checkpoints.decode_average, self._spec, record.part, average)
        except InvalidDataError as error:
            signer = peer_id(reducers[0])
            log.warning("part %d of round %d by %s is not sound: %s", record.part, record.round, signer, error)
            return
        await asyncio.to_thread(self._store.put, record.result, average)
        held = await asyncio.to_thread(
            self._ledger.sign_next,
            lambda sequence: PartHeld(
                run=self._spec.run_id, round=record.round, sequence=sequence, part_record=record.hash
            ),
        )
        try:
            await self._patiently(lambda: self._client.post(held))
        except RefusedError as error:
            log.info("part %d of round %d is held too late: %s", record.part, record.round, error)

    async def _fetch(self, sources: list[bytes], record: PartRecord) -> bytes | None:
        """The average's bytes, from our store or from the first of these peers that has them."""
        kept = await asyncio.to_thread(self._store.get, record.result)
        if kept is not None:
            return kept
        for source in sources:
            try:
                _, found = await self._plane.call(
                    source,
                    {"op": "get", "hash": record.result},
                    max_answer_bytes=record.size_bytes,
                    timeout_s=min(FETCH_TIMEOUT_S, max(1.0, ATTEMPT_SHARE * self._spec.rounds.exchange_s)),
                )
                if content_hash(found) == record.result:
                    return bytes(found)
                log.warning("%s serves other bytes for part %d than its record names", peer_id(source), record.part)
            except (UnreachableError, RefusedError, InvalidDataError) as error:
                log.info("part %d of round %d: %s", record.part, record.round, error)
        return None

    # Held-out loss

    async def _catch_up(self) -> None:
        """Queue the sealed checkpoints that have no evaluation yet: the newest, and any that a crash left out."""
        status = await self._patiently(self._client.status)
        sealed = [(0, self._spec.checkpoint), *((one["round"] + 1, one["root"]) for one in status["history"])]
        known = {one["round"] for one in status["evaluations"]}
        for number, root in sealed:
            if number not in known:
                self._want_evaluated(number, bytes.fromhex(root))

    def _want_evaluated(self, number: int, root: bytes) -> None:
        self._waiting.append(root)
        self._evaluations.put_nowait((number, root))

    async def _evaluate(self) -> None:
        rounds = self._spec.rounds.count
        while True:
            number, root = await self._evaluations.get()
            try:
                found = self._ledger.find(self._spec.run_id, Evaluation.kind, number, 0)
                if found is None:
                    one = await self._evaluator.measure(root, sample=wants_sample(number, rounds))
                    record = Evaluation(
                        run=self._spec.run_id,
                        round=number,
                        root=root,
                        loss=one.loss,
                        tokens=one.tokens,
                        sample=one.sample,
                    )
                    await self._sign_and_post(record)
                else:
                    await self._patiently(lambda: self._client.post(found))  # noqa: B023
            except (SwarmError, ValidationError) as error:
                log.warning("checkpoint %d is not evaluated: %s", number, error)
            finally:
                self._waiting.remove(root)
                self._evaluations.task_done()

    # Small things

    async def _sign_and_post(self, record: Record) -> None:
        # What was signed before a crash is what counts; a new measurement of the same thing is dropped.
        stored = self._ledger.find(record.run, record.kind, record.round, record.sequence)
        envelope = await asyncio.to_thread(self._ledger.sign, record) if stored is None else stored
        await self._patiently(lambda: self._client.post(envelope))

    async def _patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        return await persist(attempt, deadline_s=PATIENCE_S)

    async def _until(self, attempt: Callable[[], Awaitable[T | None]]) -> T:
        """Repeat a long-poll until there is something."""
        while True:
            found = await self._patiently(attempt)
            if found is not None:
                return found
