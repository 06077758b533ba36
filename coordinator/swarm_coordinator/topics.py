"""What long-polls wait on: named topics that are woken after a commit. One event loop's; not thread-safe."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable


class Topics:
    """Take the event of a topic, look, and only then wait on it: a wake-up between is not lost."""

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def event(self, topic: str) -> asyncio.Event:
        """Set at the next `wake` of the topic."""
        return self._events.setdefault(topic, asyncio.Event())

    def wake(self, topics: Iterable[str]) -> None:
        for topic in topics:
            event = self._events.pop(topic, None)
            if event is not None:
                event.set()

    def close(self) -> None:
        """Wake everybody: the coordinator is going away."""
        self._closed = True
        self.wake(list(self._events))
