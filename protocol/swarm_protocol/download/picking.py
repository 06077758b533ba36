"""Which chunks to ask for next, and of whom how many at once: decisions without I/O or clock."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from swarm_protocol.chunks import CHUNK_BYTES
from swarm_protocol.download.partial import Flags

MAX_CALLS = 4
MAX_RUN = 8
RUN_S = 0.25
FAST_S = 1.0
SLOW_S = 4.0
MAX_ASKED = 3
FIRST_PAUSE_S = 0.5
MAX_FAILURES = 4


class Window:
    """How much is asked of one source at once: more while it is fast, less once it is slow, nothing for a while if it fails.

    `calls` is the number of calls at a time, `run` the number of neighbouring chunks in a call; `latency_s` is what a call
    took of late, `None` before the first one.
    """

    def __init__(self, max_calls: int = MAX_CALLS, max_run: int = MAX_RUN) -> None:
        self._max_calls = max_calls
        self._max_run = max_run
        self.calls = min(2, max_calls)
        self.run = 1
        self.latency_s: float | None = None
        self.failures = 0

    def answered(self, size_bytes: int, took_s: float) -> None:
        """A call brought `size_bytes`, all right."""
        self.failures = 0
        self.latency_s = took_s if self.latency_s is None else 0.7 * self.latency_s + 0.3 * took_s
        if took_s < FAST_S:
            self.calls = min(self._max_calls, self.calls + 1)
        elif took_s > SLOW_S:
            self.calls = max(1, self.calls - 1)
        fitting = int(RUN_S * size_bytes / max(took_s, 1e-6) / CHUNK_BYTES)
        self.run = max(1, min(self._max_run, 2 * self.run, fitting))

    def failed(self) -> float | None:
        """A call brought nothing: for how long to leave the source alone, or None for ever."""
        self.failures += 1
        self.calls, self.run = 1, 1
        return None if self.failures >= MAX_FAILURES else FIRST_PAUSE_S * 2 ** (self.failures - 1)


class Picker:
    """Which chunks are missing, asked for, and where to be had.

    Chunks that few sources have come first; among equals the order is this downloader's own, so that those who start
    together ask for different ones and can then serve each other.
    """

    def __init__(self, have: Flags, rng: np.random.Generator) -> None:
        self.missing: Flags = ~have
        self._order = rng.random(len(have))
        self._sources = np.zeros(len(have), np.int32)
        self._asked = np.zeros(len(have), np.int32)

    @property
    def left(self) -> int:
        """How many chunks are missing."""
        return int(np.count_nonzero(self.missing))

    @property
    def nowhere(self) -> Flags:
        """The chunks that no source is known to have."""
        return self._sources <= 0

    @property
    def all_asked(self) -> bool:
        """Whether every missing chunk has been asked of somebody."""
        return not (self.missing & (self._asked == 0)).any()

    def note_source(self, before: Flags | None, now: Flags | None) -> None:
        """A source has other chunks than before; None is none."""
        for flags, step in ((before, -1), (now, 1)):
            if flags is not None:
                self._sources[flags] += step

    def pick(self, held: Flags, run: int) -> tuple[int, int] | None:
        """First and number of neighbouring chunks that nobody was asked for, up to `run`."""
        wanted = self.missing & (self._asked == 0) & held
        candidates = np.flatnonzero(wanted)
        if not len(candidates):
            return None
        first = int(candidates[np.argmin(self._sources[candidates] + self._order[candidates])])
        count = 1
        while count < run and first + count < len(wanted) and wanted[first + count]:
            count += 1
        return first, count

    def pick_again(
        self, held: Flags, asked_here: Flags, waiting_s: npt.NDArray[np.float64], patience_s: float
    ) -> int | None:
        """At the end: a chunk that somebody else has been asked for for longer than `patience_s`; the longest first.

        Args:
            asked_here: what this source was asked for.
            waiting_s: float64 per chunk, how long ago it was first asked for.
        """
        wanted = self.missing & held & ~asked_here & (self._asked > 0) & (self._asked < MAX_ASKED)
        candidates = np.flatnonzero(wanted & (waiting_s > patience_s))
        return int(candidates[np.argmax(waiting_s[candidates])]) if len(candidates) else None

    def ask(self, first: int, count: int) -> None:
        self._asked[first : first + count] += 1

    def unask(self, first: int, count: int) -> None:
        self._asked[first : first + count] -= 1

    def unasked(self, where: slice) -> Flags:
        """Of these chunks, those that nobody is asked for now."""
        free: Flags = self._asked[where] == 0
        return free
