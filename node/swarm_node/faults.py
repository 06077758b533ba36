"""Faults in the exchange, put there on purpose by tests and by `swarm-node join --fault`: never by chance.

A fault is ACTION:POINT:ROUND, for example `kill:receiving:1`. It happens once, at the first time that this point comes in
that round. `kill` and `freeze` stop this process (SIGKILL, SIGSTOP); `slow` lets it wait at the point, every time;
`garbage` at `delivering` sends noise in place of parts, and at `serving` in place of averages.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from enum import StrEnum

from swarm_protocol.errors import ConfigurationError

SLOW_S = 60.0


class Point(StrEnum):
    """Where in a round: in the order in which they come."""

    OPENING = "opening"
    DELIVERING = "delivering"
    RECEIVING = "receiving"
    REDUCING = "reducing"
    PUBLISHED = "published"
    SERVING = "serving"


class Action(StrEnum):
    KILL = "kill"
    FREEZE = "freeze"
    SLOW = "slow"
    GARBAGE = "garbage"


@dataclass(frozen=True)
class Fault:
    action: Action
    point: Point
    round: int

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Raises `ConfigurationError`."""
        try:
            action, point, number = text.split(":")
            return cls(Action(action), Point(point), int(number))
        except ValueError as error:
            raise ConfigurationError(
                f"a fault is ACTION:POINT:ROUND, with {'|'.join(Action)} at {'|'.join(Point)}, not {text!r}"
            ) from error


@dataclass(frozen=True)
class Faults:
    """The faults of one node; as a rule none."""

    planned: tuple[Fault, ...] = ()

    async def at(self, point: Point, round_number: int) -> None:
        """A point was reached."""
        for fault in self._here(point, round_number):
            if fault.action is Action.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault.action is Action.FREEZE:
                os.kill(os.getpid(), signal.SIGSTOP)
            elif fault.action is Action.SLOW:
                await asyncio.sleep(SLOW_S)

    def tamper(self, point: Point, round_number: int, content: bytes | bytearray) -> bytes | bytearray:
        """What is sent in place of `content`."""
        garbage = any(fault.action is Action.GARBAGE for fault in self._here(point, round_number))
        return bytes(byte ^ 0x5A for byte in content) if garbage else content

    def _here(self, point: Point, round_number: int) -> list[Fault]:
        return [fault for fault in self.planned if (fault.point, fault.round) == (point, round_number)]


NONE = Faults()
