"""Checking signatures beside the event loop: those that come together are checked together, in a thread of their own.

A signature takes a tenth of a millisecond without the lock of the interpreter; handing one over to a thread, half of that.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from swarm_protocol.records import Envelope, Record

MAX_GROUP = 64


class Opener:
    """One event loop's."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="opener")
        self._waiting: list[tuple[Envelope, asyncio.Future[Record]]] = []
        self._draining: asyncio.Task[None] | None = None

    async def open(self, envelope: Envelope) -> Record:
        """The record, after its signature was checked.

        Raises:
            InvalidDataError: not a record, or not signed.
        """
        done: asyncio.Future[Record] = asyncio.get_running_loop().create_future()
        self._waiting.append((envelope, done))
        if self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain())
        return await done

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            group, self._waiting = self._waiting[:MAX_GROUP], self._waiting[MAX_GROUP:]
            results = await loop.run_in_executor(self._thread, _opened, [envelope for envelope, _ in group])
            for (_, done), result in zip(group, results, strict=True):
                if done.cancelled():
                    continue
                if isinstance(result, Exception):
                    done.set_exception(result)
                else:
                    done.set_result(result)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _opened(envelopes: list[Envelope]) -> list[Record | Exception]:
    results: list[Record | Exception] = []
    for envelope in envelopes:
        try:
            results.append(envelope.open())
        except Exception as error:  # noqa: BLE001  # handed on to whom it concerns
            results.append(error)
    return results
