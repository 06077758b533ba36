"""Child processes of the demo: started with their output in a log file, and gone when the demo is."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from swarm_protocol import processes
from swarm_protocol.errors import SwarmError

STOP_S = 8.0


class ChildError(SwarmError):
    """A process that should be running has ended."""


class Child:
    """One process and its log."""

    def __init__(self, name: str, command: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self._log = log
        # One OpenMP thread each: several processes share these cores, and spinning threads would starve them.
        quiet = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                processes.bound_to_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**quiet, **os.environ, "PYTHONUNBUFFERED": "1", **environment},
            )

    def running(self) -> bool:
        return self._process.poll() is None

    def ended_badly(self) -> bool:
        return self._process.poll() not in (None, 0)

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, or None if it runs on."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, number: int) -> None:
        if self.running():
            self._process.send_signal(number)

    def last_lines(self, count: int = 12) -> str:
        """The end of its log, for a message."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-count:])


class Swarm:
    """All children; `stop` leaves none of them."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._logs.mkdir(parents=True, exist_ok=True)
        self._children: dict[str, Child] = {}

    def start(self, name: str, command: list[str], environment: Mapping[str, str] | None = None) -> Child:
        child = Child(name, command, self._logs / f"{name}.log", environment or {})
        self._children[name] = child
        return child

    def check(self, name: str) -> None:
        """Raises `ChildError`, with the end of its log, if this child does not run any more."""
        child = self._children[name]
        if not child.running():
            raise ChildError(f"the {name} has ended:\n{child.last_lines()}")

    def stop(self) -> None:
        """Ask the newest first, so that no node sees its coordinator go; then insist."""
        children = list(reversed(self._children.values()))
        # The second signal tells a volunteer not to finish its contribution first.
        for number in (signal.SIGTERM, signal.SIGTERM):
            for child in children:
                child.signal(number)
            time.sleep(0.05)
        end = time.monotonic() + STOP_S
        for child in children:
            if child.wait(max(0.0, end - time.monotonic())) is None:
                child.signal(signal.SIGKILL)
                child.wait(STOP_S)
