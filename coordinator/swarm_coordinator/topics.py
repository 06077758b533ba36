"""What long-polls wait on: named topics that are woken after a commit. One event loop's; not thread-safe.

Thousands may wait for one topic. They are let go some at a time, so that whoever comes meanwhile is not kept waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

AT_ONCE = 50


class Event:
    """Happens once."""

    def __init__(self) -> None:
        self._happened = False
        self._waiting: list[asyncio.Future[None]] = []

    async def wait(self) -> None:
        """Return once it has happened."""
        if self._happened:
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def happen(self) -> None:
        self._happened = True
        self._let_go()

    def _let_go(self) -> None:
        group, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
        for turn in group:
            if not turn.done():
                turn.set_result(None)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._let_go)


class Topics:
    """Take the event of a topic, look, and only then wait on it: a wake-up between is not lost."""

    def __init__(self) -> None:
        self._events: dict[str, Event] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def event(self, topic: str) -> Event:
        """Happens at the next `wake` of the topic."""
        return self._events.setdefault(topic, Event())

    def all(self) -> list[str]:
        """Every topic that somebody waits for."""
        return list(self._events)

    def wake(self, topics: Iterable[str]) -> None:
        for topic in topics:
            event = self._events.pop(topic, None)
            if event is not None:
                event.happen()

    def close(self) -> None:
        """Wake everybody: the coordinator is going away."""
        self._closed = True
        self.wake(self.all())
