"""Answers that never change once they are there, kept in memory; and questions that were asked since nothing has changed.

One event loop's. Thousands who long-poll for the same plan cost one query of the database per wake-up of its topic.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from swarm_coordinator.topics import Event

MAX_ANSWER_BYTES = 64 << 20
MAX_QUESTIONS = 4096


class Answers:
    """Bounded: the answers that were not asked for longest are forgotten first."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, bytes] = OrderedDict()
        self._size_bytes = 0
        self._asked: OrderedDict[str, tuple[Event, asyncio.Task[bytes | None]]] = OrderedDict()

    def get(self, topic: str) -> bytes | None:
        """What is known of a topic."""
        if topic in self._found:
            self._found.move_to_end(topic)
        return self._found.get(topic)

    async def ask(self, topic: str, event: Event, question: Callable[[], Awaitable[bytes | None]]) -> bytes | None:
        """The answer to a question, which is asked once as long as the topic's next event is this one."""
        asked = self._asked.get(topic)
        if asked is None or asked[0] is not event:
            asked = (event, asyncio.ensure_future(_awaited(question)))
            self._asked[topic] = asked
            self._asked.move_to_end(topic)
            if len(self._asked) > MAX_QUESTIONS:
                self._asked.popitem(last=False)
        try:
            found = await asyncio.shield(asked[1])
        except Exception:
            if self._asked.get(topic) is asked:  # a database that was away is asked again
                del self._asked[topic]
            raise
        if found is not None:
            self._keep(topic, found)
        return found

    def _keep(self, topic: str, found: bytes) -> None:
        self._asked.pop(topic, None)
        if topic in self._found or len(found) > MAX_ANSWER_BYTES:
            return
        self._found[topic] = found
        self._size_bytes += len(found)
        while self._size_bytes > MAX_ANSWER_BYTES:
            _, forgotten = self._found.popitem(last=False)
            self._size_bytes -= len(forgotten)


async def _awaited(question: Callable[[], Awaitable[bytes | None]]) -> bytes | None:
    return await question()
