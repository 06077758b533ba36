"""What the coordinator signs about the log and the ledger: receipts, heads, credit; and how a run ends, or a standing."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field, Strict

from swarm_protocol.records.base import Bytes32, Frozen, Reason, Record, Round, Slot

MAX_MOVES = 4096


class Receipt(Record):
    """The coordinator has accepted a record. The sequence is its leaf: the plan of round `round` is made from a log with it.

    `leaf_hash` is the log's hash of the encoded envelope, `record` the record's own.
    """

    kind: ClassVar[str] = "receipt"
    record: Bytes32
    leaf_hash: Bytes32


class LogHead(Record):
    """The root of the run's log when it had as many leaves as the sequence says. Of round 0, whatever the round is."""

    kind: ClassVar[str] = "log-head"
    root: Bytes32


class Ban(Record):
    """The run owner ends an identity's standing. The sequence is the coordinator's own count of bans."""

    kind: ClassVar[str] = "ban"
    key: Bytes32
    reason: Reason


class RunEnd(Record):
    """No round follows: `round` rounds were sealed, and `root` is the last checkpoint."""

    kind: ClassVar[str] = "run-end"
    root: Bytes32
    reason: Reason


class Move(StrEnum):
    """What happens to the credit of a contribution: from the run to pending, and from there to either of the others."""

    EARNED = "earned"
    SETTLED = "settled"
    FORFEITED = "forfeited"


class CreditEntry(Frozen):
    """The contribution of a slot in a round, and the work in it, in units of a million floating point operations."""

    round: Round
    slot: Slot
    megaflops: Annotated[int, Field(ge=0, lt=1 << 62)]


class CreditMove(Frozen):
    """Entries that move together, by round and slot; `cause` is the hash of the record that it follows from."""

    move: Annotated[Move, Strict(False)]
    cause: Bytes32
    entries: Annotated[tuple[CreditEntry, ...], Strict(False), Field(min_length=1, max_length=MAX_MOVES)]


class CreditStatement(Record):
    """Everything that happened to credit since the statement before. The sequence counts statements.

    `checkpoint` is the newest sealed one, `balances` the root over everybody's balances after these moves, of which there are
    `accounts` (see `ledger`).
    """

    kind: ClassVar[str] = "credit"
    checkpoint: Bytes32
    moves: Annotated[tuple[CreditMove, ...], Strict(False), Field(min_length=1, max_length=MAX_MOVES)]
    balances: Bytes32
    accounts: Annotated[int, Field(ge=0, lt=1 << 53)]
