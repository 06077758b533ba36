"""Child processes that are started again when they crash, and that are gone when this process is.

A child leads its own process group, which is ended as a whole; the kernel kills it if this process is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Sequence

from swarm_protocol.processes import bound_to_parent

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
HEALTHY_S = 60.0
GRACE_S = 3.0

_running: set[asyncio.subprocess.Process] = set()


async def supervise(name: str, command: Sequence[str], *, once: bool = False) -> None:
    """Keep a child running until cancelled, with growing pauses between crashes; then end it and everything it started.

    With `once` a child that ends well has done its work, and is not started again.
    """
    loop = asyncio.get_running_loop()
    pause_s = FIRST_PAUSE_S
    while True:
        started_s = loop.time()
        process = await asyncio.create_subprocess_exec(*bound_to_parent(list(command)))
        _running.add(process)
        try:
            code = await process.wait()
        finally:
            await _end(process)
            _running.discard(process)
        if once and code == 0:
            return
        pause_s = FIRST_PAUSE_S if loop.time() - started_s > HEALTHY_S else pause_s
        log.warning("the %s ended with exit code %d and is started again in %.1f s", name, code, pause_s)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def kill_all() -> None:
    """End all children at once, with everything that they started."""
    for process in _running:
        _kill(process)


def _kill(process: asyncio.subprocess.Process) -> None:
    for kill in (process.kill, lambda: os.killpg(process.pid, signal.SIGKILL)):
        with contextlib.suppress(ProcessLookupError):
            kill()


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a child: asked first, then made to, with everything that is left of its process group."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await process.wait()
    _kill(process)
    await process.wait()
