"""`swarm-coordinator` with a sampler beside it: python coordinator_profiled.py STACKS ARGUMENT...

Every few milliseconds each thread's stack is noted, weighed with the CPU time that the thread took since the last look, so
that threads that wait weigh nothing. Now and then and at the end the file STACKS gets one line per stack: frames joined by
`;`, a space, and microseconds. A sample is taken when the sampler gets the interpreter's lock: C code that holds it is
charged to its caller.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections import Counter
from functools import cache
from pathlib import Path
from types import FrameType

from swarm_coordinator.cli import main

PERIOD_S = 0.005
WRITE_S = 10.0


class Sampler(threading.Thread):
    def __init__(self, target: Path) -> None:
        super().__init__(name="sampler", daemon=True)
        self._target = target
        self._stacks: Counter[str] = Counter()

    def run(self) -> None:
        mine, before, written_s = threading.get_ident(), dict[int, int](), time.monotonic()
        while True:
            time.sleep(PERIOD_S)
            if time.monotonic() - written_s > WRITE_S:
                self.write()
                written_s = time.monotonic()
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident == mine or ident not in names:
                    continue
                try:
                    spent = time.clock_gettime_ns(time.pthread_getcpuclockid(ident))
                except OSError:
                    continue  # it has ended
                took = spent - before.get(ident, spent)
                before[ident] = spent
                if took:
                    self._stacks[f"{names[ident].rstrip('0123456789_')};{_stack(frame)}"] += took // 1000

    def write(self) -> None:
        """Replace the file by what is known."""
        lines = [f"{stack} {spent}\n" for stack, spent in self._stacks.copy().most_common()]
        self._target.write_text("".join(lines))


def _stack(frame: FrameType | None) -> str:
    frames = []
    while frame is not None:
        code = frame.f_code
        frames.append(f"{_module(code.co_filename)}:{code.co_qualname}")
        frame = frame.f_back
    return ";".join(reversed(frames))


@cache
def _module(filename: str) -> str:
    """The file by its place in its package, as `swarm_coordinator/journal.py`."""
    roots = [root for root in sys.path if root and filename.startswith(f"{root}/")]
    return filename.removeprefix(max(roots, key=len, default="")).lstrip("/")


def run() -> None:
    sampler, sys.argv = Sampler(Path(sys.argv[1])), ["swarm-coordinator", *sys.argv[2:]]
    atexit.register(sampler.write)
    sampler.start()
    main()


if __name__ == "__main__":
    run()
