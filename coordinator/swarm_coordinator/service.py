"""One run as a service: a single writer thread, a clock that ticks, and long-polls that wake after commits.

`submit` returns when the record and everything that follows from it is on disk. A caller that is cancelled cancels no
transaction.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from swarm_coordinator.db.archive import Archive
from swarm_coordinator.journal import Journal, Receipt
from swarm_coordinator.rounds import State
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.store import Store
from swarm_coordinator.topics import Topics
from swarm_protocol.errors import RefusedError
from swarm_protocol.identity import Identity
from swarm_protocol.records import Envelope, Record, Role
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

TICK_S = 0.25
ALIVE_S = 2.0

T = TypeVar("T")


def steady_clock() -> Callable[[], int]:
    """Unix time in milliseconds that does not jump when somebody sets the machine's clock."""
    started_ms, origin = time.time_ns() // 1_000_000, time.monotonic_ns()
    return lambda: started_ms + (time.monotonic_ns() - origin) // 1_000_000


class Service:
    """Open it with `open_service`."""

    def __init__(self, journal: Journal, store: Store, clock: Callable[[], int]) -> None:
        self.store = store
        self._journal = journal
        self._clock = clock
        self._topics = Topics()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._loop = asyncio.get_running_loop()
        self._logged = journal.log_head[0]
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
    def tick_age_s(self) -> float:
        """How long ago the clock ticked last."""
        return self._loop.time() - self._ticked_s

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
        record = await asyncio.to_thread(envelope.open)
        checked(envelope, record)

        def change() -> Receipt:
            answer, topics = self._journal.submit(envelope, record, token, self._clock())
            self._wake(topics)
            if isinstance(answer, RefusedError):
                raise answer
            return answer

        return await self._write(change)

    async def tick(self) -> None:
        """Let the phases that are over end."""
        await self._write(lambda: self._wake(self._journal.tick(self._clock())))
        self._ticked_s = self._loop.time()

    async def appoint(self, role: Role, key: bytes) -> None:
        """Give a key an office, once."""
        await self._write(lambda: self._journal.appoint(role, key, self._clock()))

    async def read(self, query: Callable[[Archive], T]) -> T:
        """Run a query on what is committed."""
        return await asyncio.to_thread(self._journal.read, query)

    async def poll(self, topic: str, query: Callable[[Archive], T | None], wait_s: float) -> T | None:
        """Run a query until it finds something, again whenever the topic wakes; None after `wait_s`."""
        deadline_s = self._loop.time() + wait_s
        while True:
            event = self._topics.event(topic)
            found = await self.read(query)
            remaining_s = deadline_s - self._loop.time()
            if found is not None or remaining_s <= 0 or self._topics.closed:
                return found
            try:
                async with asyncio.timeout(remaining_s):
                    await event.wait()
            except TimeoutError:
                return None

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
                    await self._write(lambda: self._journal.mark_alive(self._clock()))
            except SQLAlchemyError:
                log.exception("the database refused a write; is the disk full?")

    async def close(self) -> None:
        self.stop_waiting()
        await asyncio.to_thread(self._writer.shutdown)
        self._journal.close()

    async def _write(self, change: Callable[[], T]) -> T:
        def timed() -> T:
            started_s = time.perf_counter()
            try:
                return change()
            finally:
                self.on_commit(time.perf_counter() - started_s)

        return await self._loop.run_in_executor(self._writer, copy_context().run, timed)

    def _wake(self, topics: set[str]) -> None:
        size, _ = self._journal.log_head
        if size != self._logged:
            self._logged = size
            topics = topics | {"log"}
        self._loop.call_soon_threadsafe(self._topics.wake, topics)


@asynccontextmanager
async def open_service(directory: RunDirectory, clock: Callable[[], int] | None = None) -> AsyncIterator[Service]:
    """The service of the run in a directory, its offices given to the keys that are there; its clock does not run yet.

    Raises:
        ConfigurationError: there is no run, or it is damaged.
    """
    clock = clock or steady_clock()
    service = Service(Journal.open(directory, clock()), Store(directory.objects), clock)
    try:
        if directory.worker_key.exists():
            await service.appoint(Role.CHECKPOINT_WORKER, Identity.load(directory.worker_key).public_key)
        for path in directory.auditor_keys():
            await service.appoint(Role.AUDITOR, Identity.load(path).public_key)
        for key in directory.appointed():
            await service.appoint(Role.AUDITOR, key)
        yield service
    finally:
        await service.close()
