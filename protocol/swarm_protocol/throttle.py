"""A token bucket: bytes leave, or come, at no more than a rate, the urgent ones first.

Urgent bytes wait for urgent bytes only; all others wait for everything. So a round's exchange does not queue behind chunks
that somebody downloads, and what is over goes to them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

BURST_BYTES = 1 << 18


class TokenBucket:
    """Thread-safe. After a pause `burst_bytes` go at once; a message goes whole, and the next one pays for it.

    Over any time of t seconds at most `rate_bytes_per_s * t + burst_bytes`, and the last message, are let through, urgent
    and not; what was promised to bytes that are not urgent before urgent ones came is let through as well.
    """

    def __init__(
        self, rate_bytes_per_s: float, burst_bytes: float = BURST_BYTES, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if rate_bytes_per_s <= 0:
            raise ValueError("a rate is above 0")
        self.rate_bytes_per_s = rate_bytes_per_s
        self._burst_s = burst_bytes / rate_bytes_per_s
        self._clock = clock
        self._lock = threading.Lock()
        self._urgent = self._all = clock() - self._burst_s

    def reserve(self, size_bytes: int, *, urgent: bool = True) -> float:
        """Take `size_bytes`; returns the seconds after which they may go."""
        with self._lock:
            now = self._clock()
            earliest, cost_s = now - self._burst_s, size_bytes / self.rate_bytes_per_s
            self._all = max(self._all, earliest) + cost_s
            if not urgent:
                return max(0.0, self._all - cost_s - now)
            self._urgent = max(self._urgent, earliest) + cost_s
            return max(0.0, self._urgent - cost_s - now)

    def backlog_s(self) -> float:
        """How long bytes that are not urgent would wait now."""
        with self._lock:
            return max(0.0, self._all - self._clock())

    async def wait(self, size_bytes: int, *, urgent: bool = True) -> None:
        """Take `size_bytes` and wait until they may go. Bytes that are given up while waiting are paid for all the same."""
        delay_s = self.reserve(size_bytes, urgent=urgent)
        if delay_s:
            await asyncio.sleep(delay_s)
