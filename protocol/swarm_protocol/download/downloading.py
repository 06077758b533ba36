"""One state from many sources at once.

Each source has a window of calls that grows while it is fast. Chunks that few sources have are asked for first, in an order
of our own. A chunk is hashed before it goes anywhere. A source whose bytes are wrong is dropped for good, one that is slow
or does not answer is left alone for growing times and then dropped; what it was asked for goes to others. At the end, chunks
that keep us waiting are asked of a second source as well. The coordinator is a reserve: for what no peer has, and for
everything while the peers together are slow. Every call has a deadline, and so has the download as long as nothing comes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from swarm_protocol.calls import Bytes
from swarm_protocol.chunks import StateManifest
from swarm_protocol.download.partial import Flags, Sink
from swarm_protocol.download.picking import Picker, Window
from swarm_protocol.download.sources import Source
from swarm_protocol.errors import InvalidDataError, RefusedError, SwarmError, UnreachableError
from swarm_protocol.throttle import TokenBucket

log = logging.getLogger(__name__)

CALL_S = 30.0
STAGGER_S = 0.5
TICK_S = 0.1
GRACE_S = 1.0
RATE_S = 1.0
RESERVE_BELOW_BYTES_PER_S = 2e6
REFRESH_S = 2.0
LIMIT_S = 0.5
MORE_S = 15.0
STALL_S = 60.0
FIRST_LATENCY_S = 0.5
PATIENCE = 2.0
"""A chunk is late that takes so many times as long as the one who would bring it instead takes for a call."""

S = TypeVar("S", bound=Sink)


@dataclass(eq=False)
class _Contact:
    """A source that is being used."""

    source: Source
    window: Window
    held: Flags
    whole: bool
    asked: Flags
    calls: int = 0
    pause_until: float = 0.0
    looked_at: float = 0.0


class Download(Generic[S]):
    """One download: `run` it once. `sink` is there as soon as the manifest is known.

    Args:
        banned: keys of sources that served wrong bytes; read and added to.
        more: further sources, asked for again and again while the download lasts.
        limit: what is asked for is taken from this bucket.
        rng: the order in which this downloader asks.
        call_s: how long a call may take.
    """

    def __init__(
        self,
        root: bytes,
        size_bytes: int,
        sources: Iterable[Source],
        open_sink: Callable[[StateManifest], S],
        *,
        banned: set[bytes] | None = None,
        more: Callable[[], Awaitable[Iterable[Source]]] | None = None,
        limit: TokenBucket | None = None,
        rng: np.random.Generator | None = None,
        call_s: float = CALL_S,
    ) -> None:
        self.sink: S | None = None
        self.bytes_by_source: dict[str, int] = {}
        self._root = root
        self._size_bytes = size_bytes
        self._banned = set() if banned is None else banned
        self._sources = {one.key: one for one in sources if one.key not in self._banned}
        self._open_sink = open_sink
        self._more = more
        self._limit = limit
        self._call_s = call_s
        self._rng = np.random.default_rng() if rng is None else rng
        self._contacts: dict[bytes, _Contact] = {}
        self._meeting: set[bytes] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: dict[asyncio.Task[None], tuple[int, int]] = {}
        self._errors: dict[bytes, SwarmError] = {}
        self._peer_bytes = 0
        self._rate_since = (0.0, 0)
        self._peers_are_slow = False

    async def run(self) -> S:
        """Have the whole state in the sink.

        Raises:
            UnreachableError: nobody can be reached who has what is missing. What came is in the sink.
            RefusedError, InvalidDataError: all sources refuse, or serve something else.
            ConfigurationError: the sink does not take it.
        """
        more: asyncio.Task[None] | None = None
        try:
            manifest = await self._find_manifest()
            self.sink = sink = await asyncio.to_thread(self._open_sink, manifest)
            self._manifest, self._sink = manifest, sink
            self._picker = Picker(sink.have, self._rng)
            self._since = np.full(len(manifest.hashes), np.inf)
            self._started = self._progress_at = self._now()
            self._rate_since = (self._started, 0)
            for source in self._sources.values():
                self._meet(source)
            if self._more is not None:
                more = asyncio.create_task(self._find_more(self._more))
            while self._picker.left:
                self._assign()
                if not self._tasks and self._is_hopeless():
                    raise self._nobody()
                if self._now() - self._progress_at > STALL_S:
                    raise UnreachableError(f"no chunk of {self._root.hex()[:12]} came for {STALL_S:.0f} s")
                await self._news()
            return sink
        finally:
            await _cancel([*self._tasks, *([more] if more is not None else [])])

    def _is_hopeless(self) -> bool:
        """Whether nobody who is here has any of what is missing, or is still getting it himself: it has been deleted."""
        missing = ~self._sink.have
        return not any(not one.whole or (one.held & missing).any() for one in self._contacts.values())

    # Whom to ask

    async def _find_manifest(self) -> StateManifest:
        """Ask one source after another, without waiting long for any."""
        sources = list(self._sources.values())
        order = sorted(sources, key=lambda one: (one.reserve, self._rng.random()))
        asked: dict[asyncio.Task[StateManifest], Source] = {}
        try:
            while order or asked:
                if order:
                    source = order.pop(0)
                    asked[asyncio.create_task(source.manifest(self._root, self._size_bytes))] = source
                done, _ = await asyncio.wait(
                    asked, timeout=STAGGER_S if order else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    source = asked.pop(task)
                    try:
                        return task.result()
                    except (UnreachableError, RefusedError, InvalidDataError) as error:
                        self._drop(source, error)
            raise self._nobody()
        finally:
            await _cancel(asked)

    async def _find_more(self, find: Callable[[], Awaitable[Iterable[Source]]]) -> None:
        while True:
            await asyncio.sleep(MORE_S)
            try:
                found = await find()
            except SwarmError as error:
                log.info("no further sources: %s", error)
                continue
            for source in found:
                if source.key not in self._banned | self._contacts.keys() | self._meeting:
                    self._sources[source.key] = source
                    self._meet(source)

    def _meet(self, source: Source) -> None:
        """Find out what a source has, then use it."""
        self._meeting.add(source.key)
        self._spawn(self._look(source))

    async def _look(self, source: Source) -> None:
        try:
            flags = await source.held(self._manifest)
        except (UnreachableError, RefusedError, InvalidDataError) as error:
            self._drop(source, error)
            return
        finally:
            self._meeting.discard(source.key)
        if source.key in self._banned:
            return
        held = np.ones(len(self._manifest.hashes), np.bool_) if flags is None else flags
        contact = self._contacts.get(source.key)
        if contact is None:
            window = Window(source.max_calls, source.max_run)
            contact = _Contact(source, window, held, flags is None, np.zeros_like(held))
            self._contacts[source.key] = contact
            before = None
        else:
            before = contact.held
            contact.held, contact.whole = held, flags is None
        contact.looked_at = self._now()
        if not source.reserve:
            self._picker.note_source(before, held)

    def _drop(self, source: Source, error: SwarmError) -> None:
        """Use a source no more: for good where its bytes are wrong, and otherwise until it is found again."""
        log.info("%s is of no use for %s: %s", source.name, self._root.hex()[:12], error)
        if isinstance(error, InvalidDataError) and not source.reserve and source.key not in self._banned:
            log.warning("%s serves wrong bytes and is not asked again: %s", source.name, error)
            self._banned.add(source.key)
        self._errors[source.key] = error
        self._sources.pop(source.key, None)
        contact = self._contacts.pop(source.key, None)
        if contact is not None and not source.reserve:
            self._picker.note_source(contact.held, None)

    def _nobody(self) -> SwarmError:
        """Why there is nobody left, as what the caller can do about it."""
        errors = list(self._errors.values())
        for kind in (UnreachableError, RefusedError):
            for error in errors:
                if isinstance(error, kind):
                    return error
        return errors[0] if errors else UnreachableError(f"nobody serves {self._root.hex()[:12]}")

    # What to ask

    def _assign(self) -> None:
        """Give every source as many calls as its window, and our own limit, have room for."""
        now = self._now()
        self._look_at_rate(now)
        if self._held_back():
            self._progress_at = now
            return
        waiting_s = now - self._since
        for contact in sorted(self._contacts.values(), key=lambda one: (one.calls, self._rng.random())):
            held = self._allowed(contact, now)
            if held is None or now < contact.pause_until:
                continue
            while contact.calls < contact.window.calls and not self._held_back():
                share = 1 + self._picker.left // (4 * len(self._contacts))
                found = self._picker.pick(held, min(contact.window.run, share))
                if found is None and self._picker.all_asked:
                    patience_s = PATIENCE * (contact.window.latency_s or FIRST_LATENCY_S)
                    again = self._picker.pick_again(held, contact.asked, waiting_s, patience_s)
                    found = None if again is None else (again, 1)
                if found is None:
                    break
                self._call(contact, *found)
            if not (contact.whole or contact.calls) and now - contact.looked_at > REFRESH_S:
                contact.looked_at = now
                self._meet(contact.source)

    def _allowed(self, contact: _Contact, now: float) -> Flags | None:
        """What a source may be asked for: everything that it has, or, of a reserve, what is to be had nowhere else."""
        if not contact.source.reserve:
            return contact.held
        peers = any(not one.source.reserve for one in self._contacts.values())
        if not peers and self._meeting and now - self._started < GRACE_S:
            return None
        return contact.held if self._peers_are_slow else contact.held & self._picker.nowhere

    def _look_at_rate(self, now: float) -> None:
        since, count = self._rate_since
        if now - since >= RATE_S:
            enough = RESERVE_BELOW_BYTES_PER_S
            if self._limit is not None:
                enough = min(enough, self._limit.rate_bytes_per_s / 2)
            self._peers_are_slow = (self._peer_bytes - count) / (now - since) < enough
            self._rate_since = (now, self._peer_bytes)

    def _call(self, contact: _Contact, first: int, count: int) -> None:
        contact.calls += 1
        contact.asked[first : first + count] = True
        self._picker.ask(first, count)
        delay_s = 0.0
        if self._limit is not None:
            size = sum(self._manifest.chunk_size(index) for index in range(first, first + count))
            delay_s = self._limit.reserve(size, urgent=False)
        task = self._spawn(self._fetch(contact, first, count, delay_s))
        self._calls[task] = first, count

    def _held_back(self) -> bool:
        """Whether it is our own limit that we wait for."""
        return self._limit is not None and self._limit.backlog_s() > LIMIT_S

    async def _fetch(self, contact: _Contact, first: int, count: int, delay_s: float) -> None:
        """Ask for some chunks, and take what comes."""
        where, source = slice(first, first + count), contact.source
        try:
            await asyncio.sleep(delay_s)
            asked_at = self._now()
            self._since[where] = np.minimum(self._since[where], asked_at)
            data = await self._in_time(source, first, count)
            took_s = self._now() - asked_at
            taken = await asyncio.to_thread(self._take, first, count, data)
            self._progress_at = self._now()
            contact.window.answered(len(data), took_s)
            self.bytes_by_source[source.name] = self.bytes_by_source.get(source.name, 0) + len(data)
            self._peer_bytes += 0 if source.reserve else len(data)
            if taken < count and not contact.whole:
                self._lacks(contact, slice(first + taken, first + count))
        except UnreachableError as error:
            pause_s = error.retry_after_s or contact.window.failed()
            if pause_s is None:
                self._drop(source, error)
            else:
                contact.pause_until = self._now() + pause_s
        except RefusedError as error:
            self._errors[source.key] = error
            self._lacks(contact, where)
            if contact.whole and contact.window.failed() is None:
                self._drop(source, error)
        except InvalidDataError as error:
            self._drop(source, error)
        finally:
            contact.calls -= 1
            contact.asked[where] = False
            self._picker.unask(first, count)
            self._picker.missing[where] &= ~self._sink.have[where]
            self._since[where][self._picker.unasked(where)] = np.inf

    async def _in_time(self, source: Source, first: int, count: int) -> Bytes:
        try:
            async with asyncio.timeout(self._call_s):
                return await source.chunks(self._manifest, first, count)
        except TimeoutError:
            raise UnreachableError(f"{source.name} takes longer than {self._call_s:.0f} s for a chunk") from None

    def _lacks(self, contact: _Contact, where: slice) -> None:
        """A source does not have chunks that it was thought to have."""
        held = contact.held.copy()
        held[where] = False
        if not contact.source.reserve:
            self._picker.note_source(contact.held, held)
        contact.held = held

    def _take(self, first: int, count: int, data: Bytes) -> int:
        """Verify and keep chunks; returns how many came.

        Raises:
            InvalidDataError: other bytes than those of the chunks, or half a chunk. What came before is kept.
        """
        view, taken = memoryview(data), 0
        while view:
            if taken == count:
                raise InvalidDataError("more chunks than were asked for")
            size = self._manifest.chunk_size(first + taken)
            self._manifest.verify_chunk(first + taken, view[:size])
            if not self._sink.have[first + taken]:
                self._sink.write(first + taken, view[:size])
            view, taken = view[size:], taken + 1
        if not taken:
            raise InvalidDataError("an answer without a chunk")
        return taken

    async def _news(self) -> None:
        """Wait for something to happen, a moment at most, and end calls whose chunks came from elsewhere."""
        if not self._tasks:
            await asyncio.sleep(TICK_S)
            return
        done, _ = await asyncio.wait(self._tasks, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            self._tasks.discard(task)
            self._calls.pop(task, None)
            if not task.cancelled():
                task.result()
        for task, (first, count) in self._calls.items():
            if not self._picker.missing[first : first + count].any():
                task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        return task

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    pending = list(tasks)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
