"""Faults in the exchange, put there on purpose by tests and by `swarm-node join --fault`: never by chance.

A fault is ACTION:POINT:ROUND, for example `kill:receiving:1`. It happens once, at the first time that this point comes in
that round. `kill` and `freeze` stop this process (SIGKILL, SIGSTOP); `slow` lets it wait at the point, every time;
`garbage` at `sketching` signs noise in place of sketches, at `delivering` sends it in place of parts, at `serving` in place
of averages, and at `seeding` in place of chunks of the round's checkpoint. Reducers lie as well: `equivocate` at `serving`
gives peers other bytes with a second signed record, at `published` hands a second record to the coordinator; `misreport` at
`reducing` averages fewer slots than its record says, `leave-out` does without a slot that has its receipt.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from enum import StrEnum

from swarm_protocol.errors import ConfigurationError
from swarm_protocol.identity import Identity
from swarm_protocol.records import Envelope, PartRecord

SLOW_S = 60.0


class Point(StrEnum):
    """Where in a round: in the order in which they come."""

    OPENING = "opening"
    SKETCHING = "sketching"
    DELIVERING = "delivering"
    RECEIVING = "receiving"
    REDUCING = "reducing"
    PUBLISHED = "published"
    SERVING = "serving"
    SEEDING = "seeding"


class Action(StrEnum):
    KILL = "kill"
    FREEZE = "freeze"
    SLOW = "slow"
    GARBAGE = "garbage"
    EQUIVOCATE = "equivocate"
    MISREPORT = "misreport"
    LEAVE_OUT = "leave-out"


@dataclass(frozen=True)
class Fault:
    """`onwards`: in every round from this one on."""

    action: Action
    point: Point
    round: int
    onwards: bool = False

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
        lies = self._does(Action.GARBAGE, point, round_number) or self._does(Action.EQUIVOCATE, point, round_number)
        return bytes(byte ^ 0x5A for byte in content) if lies else content

    def vouched(self, envelope: Envelope, record: PartRecord, identity: Identity) -> Envelope:
        """The record with which our average is served."""
        return _other(record, identity) if self._does(Action.EQUIVOCATE, Point.SERVING, record.round) else envelope

    def published(self, record: PartRecord, identity: Identity) -> list[Envelope]:
        """What is published beside our record of a part."""
        return [_other(record, identity)] if self._does(Action.EQUIVOCATE, Point.PUBLISHED, record.round) else []

    def averaged(
        self, round_number: int, inputs: dict[int, bytes], own: int | None
    ) -> tuple[dict[int, bytes], list[int]]:
        """The inputs that are averaged, of these by slot, and the slots that the record claims."""
        fewer = dict(inputs)
        others = [slot for slot in inputs if slot != own]
        if others and len(inputs) > 1:
            del fewer[others[0]]
        if self._does(Action.LEAVE_OUT, Point.REDUCING, round_number):
            return fewer, list(fewer)
        return (fewer if self._does(Action.MISREPORT, Point.REDUCING, round_number) else inputs), list(inputs)

    def _does(self, action: Action, point: Point, round_number: int) -> bool:
        return any(fault.action is action for fault in self._here(point, round_number))

    def _here(self, point: Point, round_number: int) -> list[Fault]:
        return [
            fault
            for fault in self.planned
            if fault.point is point and (fault.round == round_number or (fault.onwards and fault.round < round_number))
        ]


def _other(record: PartRecord, identity: Identity) -> Envelope:
    """A second record of the same part, signed past the ledger."""
    return Envelope.sign(identity, PartRecord(**{**record.model_dump(), "result": bytes(32)}))


NONE = Faults()
