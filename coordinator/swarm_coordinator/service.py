"""One run as a service: a single writer with group commits, a clock that ticks, long-polls that wake after commits.

`submit` returns when the record and everything that follows from it is on disk. A caller that is cancelled cancels no
transaction.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from functools import partial
from typing import TypeVar, cast

from sqlalchemy.exc import SQLAlchemyError

from swarm_coordinator.answers import Answers
from swarm_coordinator.certificates import Certificates
from swarm_coordinator.db.archive import Archive, opened
from swarm_coordinator.db.engine import open_database
from swarm_coordinator.journal import Change, Journal, LostOfficeError, Receipt
from swarm_coordinator.kept_evidence import missing
from swarm_coordinator.mirror import Mirror
from swarm_coordinator.opening import Opener
from swarm_coordinator.rounds import State
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.sharing import ANSWER_S, CAMPAIGN_S, INBOX, Sharing, answered, away, reply
from swarm_coordinator.sharing import topic as topic_of_answer
from swarm_coordinator.store import Store
from swarm_coordinator.topics import Event, Topics
from swarm_protocol.ancestry import Ancestor
from swarm_protocol.certificate import Certificate
from swarm_protocol.errors import RefusedError, SwarmError
from swarm_protocol.identity import Identity
from swarm_protocol.records import Envelope, Evidence, PartVerdict, Record, Role, Verdict
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

TICK_S = 0.25
ALIVE_S = 2.0
MAX_GROUP = 256
LINGER_S = 0.005
"""How long the writer waits for company: a transaction costs some milliseconds, however many records are in it."""


T = TypeVar("T")


def steady_clock() -> Callable[[], int]:
    """Unix time in milliseconds that does not jump when somebody sets the machine's clock."""
    started_ms, origin = time.time_ns() // 1_000_000, time.monotonic_ns()
    return lambda: started_ms + (time.monotonic_ns() - origin) // 1_000_000


class Service:
    """Open it with `open_service`."""

    def __init__(
        self,
        journal: Journal,
        store: Store,
        clock: Callable[[], int],
        ancestors: tuple[Ancestor, ...] = (),
        gossip: Callable[[], list[str]] = list,
    ) -> None:
        self.store = store
        self.ancestors = ancestors
        self.gossip = gossip
        self._journal = journal
        self._clock = clock
        self._topics = Topics()
        self._answers = Answers()
        self._opener = Opener()
        self._recent: dict[str, tuple[float, object]] = {}
        self._certificates = Certificates(journal.spec)
        self._signed_head = (0, b"")
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[Change, asyncio.Future[object]]] = []
        self._draining: asyncio.Task[None] | None = None
        self._shared: Sharing | None = None
        self._leads = True
        self._broken: str | None = None
        self._ticked_s = self._loop.time()
        self.on_commit: Callable[[float], None] = lambda seconds: None

    @property
    def spec(self) -> RunSpec:
        return self._journal.spec

    @property
    def state(self) -> State:
        """Where the rounds are, as of the last commit."""
        return self._journal.state

    @property
    def log_head(self) -> tuple[int, bytes]:
        """Size and root of the log, as of the last commit."""
        return self._journal.log_head

    @property
    def failure(self) -> str | None:
        """Why this run cannot be served any more, if that is so."""
        return self._broken or self._journal.failure

    @property
    def now_ms(self) -> int:
        """The service's own time."""
        return self._clock()

    def signed_head(self) -> tuple[int, bytes, bytes]:
        """Size and root of the log as of the last commit, and the encoded Envelope of its LogHead."""
        size, root = self.log_head
        return size, root, self._head(size)

    def inclusion_proof(self, leaf: int, size: int | None) -> tuple[int, tuple[bytes, ...]]:
        """That a leaf is in the log of `size` leaves, by default of all; the size and the proof.

        Raises:
            RefusedError: the log is not that long, or has no such leaf.
        """
        size = self._logged(size)
        if leaf >= size:
            raise RefusedError(f"a log of {size} leaves has no leaf {leaf}", status=404, code="no-such-leaf")
        return size, self._journal.log.inclusion_proof(leaf, size)

    def consistency_proof(self, old: int, size: int | None) -> tuple[int, tuple[bytes, ...]]:
        """That the log of `size` leaves, by default all, extends that of `old`; the size and the proof.

        Raises:
            RefusedError: the log is not that long.
        """
        size = self._logged(size)
        if old > size:
            raise RefusedError(f"a log of {size} leaves extends none of {old}", status=404, code="no-such-size")
        return size, self._journal.log.consistency_proof(old, size)

    async def certificate(self, key: bytes) -> Certificate | None:
        """What an identity has earned, signed; None if no statement has it yet."""

        def log_proof(leaf: int) -> tuple[tuple[bytes, ...], bytes]:
            size = max(self.log_head[0], leaf + 1)
            return self._journal.log.inclusion_proof(leaf, size), self._head(size)

        return await self.read(lambda archive: self._certificates.of(archive, key, log_proof))

    def _head(self, size: int) -> bytes:
        newest, signed = self._signed_head
        if not signed or newest != size:
            signed = self._journal.signed_head(size).encode()
            self._signed_head = (size, signed)
        return signed

    def _logged(self, size: int | None) -> int:
        committed, _ = self.log_head
        if size is not None and size > committed:
            raise RefusedError(f"the log has {committed} leaves, not {size}", status=404, code="no-such-size")
        return committed if size is None else size

    @property
    def tick_age_s(self) -> float:
        """How long ago the clock ticked last."""
        return self._loop.time() - self._ticked_s

    @property
    def recovering(self) -> bool:
        """Whether the run was restored, and nodes are asked for what was signed last."""
        return self._journal.recovering

    @property
    def stopping(self) -> bool:
        """Whether the coordinator is going away."""
        return self._topics.closed

    async def submit(
        self,
        data: bytes,
        token: str | None,
        checked: Callable[[Envelope, Record], None] = lambda envelope, record: None,
    ) -> Receipt:
        """Accept an encoded envelope. `checked` is called once its signature was checked, and may refuse it.

        Raises:
            InvalidDataError: not a record, or not signed.
            RefusedError: a record that is not accepted, and why.
        """
        envelope = Envelope.decode(data)
        record = await self._opener.open(envelope)
        checked(envelope, record)
        if isinstance(record, Verdict | PartVerdict) and record.evidence is not None:
            await self._require_evidence(record.evidence)
        if self._shared is not None and not self._leads:
            return await self._ask(self._shared, envelope, token)
        receipt = await self._commit(self._journal.offer(envelope, record, token))
        assert isinstance(receipt, Receipt)
        return receipt

    async def _require_evidence(self, digest: bytes) -> None:
        """Refuse a verdict whose evidence is known, and not here."""
        row = await self.read(lambda archive: archive.by_hash(digest))
        record = None if row is None else opened(row)
        if isinstance(record, Evidence) and (lacking := await asyncio.to_thread(missing, self.store, record)):
            reason = f"{lacking} pieces of the evidence are not here; hand them in before the verdict"
            raise RefusedError(reason, status=409, code="evidence-missing")

    async def _ask(self, shared: Sharing, envelope: Envelope, token: str | None) -> Receipt:
        """Have the process that drives the run accept a record."""
        number = await asyncio.to_thread(shared.inbox.put, envelope, token, self._clock())
        try:
            answer = await self.poll(
                topic_of_answer(number), lambda archive: answered(archive.session, number), ANSWER_S
            )
        finally:
            await asyncio.shield(asyncio.to_thread(shared.inbox.forget, number))
        if isinstance(answer, Receipt):
            return answer
        raise answer if isinstance(answer, RefusedError) else away()

    async def share(self, shared: Sharing, take_over: Callable[[], Journal], *, leads: bool) -> None:
        """Serve the run together with other processes until cancelled; `take_over` opens the run for writing."""
        self._shared, self._leads = shared, leads
        try:
            await self._share(shared, take_over)
        except Exception as error:
            log.exception("this process has lost touch with the others")
            self._broken = f"this process has lost touch with the others: {error}"

    async def _share(self, shared: Sharing, take_over: Callable[[], Journal]) -> None:
        told: asyncio.Queue[Sequence[str]] = asyncio.Queue()

        def hear(topics: Sequence[str]) -> None:
            self._loop.call_soon_threadsafe(told.put_nowait, topics)

        shared.listen(hear)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._campaign(shared, take_over))
            while True:
                heard = [await told.get()]
                while not told.empty():
                    heard.append(told.get_nowait())
                topics = {topic for group in heard for topic in group}
                missed = [] in heard
                try:
                    if self._leads:
                        if missed or INBOX in topics:
                            await self._answer(shared)
                    else:
                        await self._follow(topics, missed=missed)
                except SQLAlchemyError as error:
                    log.warning("the database does not answer: %s", error)

    async def _follow(self, topics: set[str], *, missed: bool) -> None:
        """Take note of what the driver committed."""
        journal = self._journal
        if isinstance(journal, Mirror) and (missed or topics - {INBOX}):
            await self._write(journal.refresh)
            self._topics.wake(self._topics.all() if missed else topics)

    async def _answer(self, shared: Sharing) -> None:
        """Carry out what other processes were given."""
        while questions := await asyncio.to_thread(shared.inbox.pending):
            changes = (self._commit(reply(self._journal, question)) for question in questions)
            for question, result in zip(questions, await asyncio.gather(*changes, return_exceptions=True), strict=True):
                if isinstance(result, BaseException):
                    log.error("a record that another process was given failed: %s", result)
                    await asyncio.to_thread(shared.inbox.forget, question.id)

    async def _campaign(self, shared: Sharing, take_over: Callable[[], Journal]) -> None:
        """Drive the run as soon as nobody else does."""
        while not self._leads:
            await asyncio.sleep(CAMPAIGN_S)
            if not await asyncio.to_thread(shared.campaign):
                continue
            try:
                before, self._journal = self._journal, await self._write(take_over)
            except (SQLAlchemyError, SwarmError) as error:
                log.warning("the run cannot be taken over: %s", error)
                await asyncio.to_thread(shared.resign)
                continue
            log.warning("this process drives the run now")
            self._leads = True
            before.close()
            self._topics.wake(self._topics.all())
            await self._answer(shared)

    async def tick(self) -> None:
        """Let the phases that are over end, and do what the run owner has ordered."""
        if not self._leads:
            self._ticked_s = self._loop.time()
            return
        await self._write(lambda: self._wake(self._journal.tick(self._clock())))
        await self._write(lambda: self._wake(self._journal.carry_out_orders(self._clock())))
        self._ticked_s = self._loop.time()

    async def appoint(self, role: Role, key: bytes) -> bool:
        """Give a key an office, once. False if that has to wait until a restored run goes on, or is not ours to do."""
        return self._leads and await self._write(lambda: self._journal.appoint(role, key, self._clock()))

    async def mark_alive(self) -> None:
        """Note that the coordinator is up, and when nodes were last heard of."""
        if self._leads:
            await self._write(lambda: self._journal.mark_alive(self._clock()))

    async def read(self, query: Callable[[Archive], T]) -> T:
        """Run a query on what is committed."""
        return await asyncio.to_thread(self._journal.read, query)

    async def recent(self, name: str, query: Callable[[Archive], T], age_s: float) -> T:
        """What a query found at most so long ago; it is known by its name."""
        now_s = self._loop.time()
        found = self._recent.get(name)
        if found is None or now_s - found[0] > age_s:
            found = self._recent[name] = (now_s, await self.read(query))
        return cast(T, found[1])

    async def lasting(self, topic: str, query: Callable[[Archive], bytes | None], wait_s: float) -> bytes | None:
        """As `poll`, for what never changes once it is there: however many wait, one query is made per wake-up."""
        deadline_s = self._loop.time() + wait_s
        while True:
            known = self._answers.get(topic)
            if known is not None:
                return known
            event = self._topics.event(topic)
            found = await self._answers.ask(topic, event, lambda: self.read(query))
            if found is not None or not await self._woken(event, deadline_s):
                return found

    async def poll(self, topic: str, query: Callable[[Archive], T | None], wait_s: float) -> T | None:
        """Run a query until it finds something, again whenever the topic wakes; None after `wait_s`."""
        deadline_s = self._loop.time() + wait_s
        while True:
            event = self._topics.event(topic)
            found = await self.read(query)
            if found is not None or not await self._woken(event, deadline_s):
                return found

    async def _woken(self, event: Event, deadline_s: float) -> bool:
        """Wait for an event; False if it is no use to wait, or any longer."""
        remaining_s = deadline_s - self._loop.time()
        if remaining_s <= 0 or self._topics.closed:
            return False
        try:
            async with asyncio.timeout(remaining_s):
                await event.wait()
        except TimeoutError:
            return False
        return True

    def stop_waiting(self) -> None:
        """Answer all long-polls now: the coordinator is going away."""
        self._topics.close()

    async def run_clock(self) -> None:
        """Tick until cancelled."""
        alive_s = self._loop.time()
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.tick()
                if self._loop.time() - alive_s >= ALIVE_S:
                    alive_s = self._loop.time()
                    await self.mark_alive()
            except SQLAlchemyError:
                log.exception("the database refused a write; is the disk full?")
            except LostOfficeError:
                return  # `failure` says so, and whoever serves the run ends

    async def close(self) -> None:
        self.stop_waiting()
        if self._draining is not None:
            await self._draining
        self._opener.close()
        await asyncio.to_thread(self._writer.shutdown)
        self._journal.close()
        if self._shared is not None:
            await asyncio.to_thread(self._shared.close)

    async def _commit(self, change: Change) -> object:
        """The result of a change once it is on disk, in one transaction with others that came meanwhile."""
        done: asyncio.Future[object] = self._loop.create_future()
        self._waiting.append((change, done))
        if self._draining is None or self._draining.done():
            self._draining = self._loop.create_task(self._drain())
        return await done

    async def _drain(self) -> None:
        while self._waiting:
            if len(self._waiting) < MAX_GROUP:
                await asyncio.sleep(LINGER_S)
            group = self._waiting[:MAX_GROUP]
            del self._waiting[:MAX_GROUP]
            changes = [change for change, _ in group]
            results, topics = await self._write(lambda: self._journal.commit(changes, self._clock()))  # noqa: B023
            self._topics.wake(topics)
            for (_, done), result in zip(group, results, strict=True):
                if done.cancelled():
                    continue
                if isinstance(result, Exception):
                    done.set_exception(result)
                else:
                    done.set_result(result)

    async def _write(self, change: Callable[[], T]) -> T:
        def timed() -> T:
            started_s = time.perf_counter()
            try:
                return change()
            finally:
                self.on_commit(time.perf_counter() - started_s)

        return await self._loop.run_in_executor(self._writer, copy_context().run, timed)

    def _wake(self, topics: set[str]) -> None:
        self._loop.call_soon_threadsafe(self._topics.wake, topics)


@asynccontextmanager
async def open_service(directory: RunDirectory, clock: Callable[[], int] | None = None) -> AsyncIterator[Service]:
    """The service of the run in a directory, its offices given to the keys that are there; its clock does not run yet.

    Raises:
        ConfigurationError: there is no run, or it is damaged.
    """
    clock = clock or steady_clock()
    shared = None
    if directory.shared():
        shared = Sharing(open_database(directory.database_url()), directory.spec().run_id)
    leads = shared is None or shared.campaign()
    ancestors = directory.ancestors()
    journal = (Journal if leads else Mirror).open(directory, clock())
    service = Service(journal, Store(directory.objects_url()), clock, ancestors, directory.gossip)
    sharing = None
    try:
        if shared is not None:
            take_over = partial(_taken_over, directory, clock)
            sharing = asyncio.create_task(service.share(shared, take_over, leads=leads))
        if leads:
            for role, key in offices(directory):
                await service.appoint(role, key)
        yield service
    finally:
        if sharing is not None:
            sharing.cancel()
            await asyncio.wait([sharing])
        await service.close()


def _taken_over(directory: RunDirectory, clock: Callable[[], int]) -> Journal:
    return Journal.open(directory, clock())


def offices(directory: RunDirectory) -> list[tuple[Role, bytes]]:
    """Who is to have an office, by the keys and appointments in a run's directory.

    Raises:
        ConfigurationError: a file is damaged.
    """
    found = [(Role.AUDITOR, Identity.load(path).public_key) for path in directory.auditor_keys()]
    found += [(Role.AUDITOR, key) for key in directory.appointed()]
    if directory.worker_key.exists():
        found.insert(0, (Role.CHECKPOINT_WORKER, Identity.load(directory.worker_key).public_key))
    return found
