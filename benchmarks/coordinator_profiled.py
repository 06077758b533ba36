"""`swarm-coordinator` with a sampler beside it: python coordinator_profiled.py STACKS ARGUMENT...

Every few milliseconds each thread's stack is noted, weighed with the CPU time that the thread took since the last look, so
that threads that wait weigh nothing. At the end the file STACKS has one line per stack: frames joined by `;`, a space, and
microseconds. A sample is taken when the sampler gets the interpreter's lock: C code that holds it is charged to its caller.
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


class Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="sampler", daemon=True)
        self.stacks: Counter[str] = Counter()

    def run(self) -> None:
        mine, before = threading.get_ident(), dict[int, int]()
        while True:
            time.sleep(PERIOD_S)
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
                    self.stacks[f"{names[ident].rstrip('0123456789_')};{_stack(frame)}"] += took // 1000


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
    target, sys.argv = Path(sys.argv[1]), ["swarm-coordinator", *sys.argv[2:]]
    sampler = Sampler()

    def write() -> None:
        lines = [f"{stack} {spent}" for stack, spent in list(sampler.stacks.most_common())]
        target.write_text("\n".join(lines) + "\n")

    atexit.register(write)
    sampler.start()
    main()


if __name__ == "__main__":
    run()
