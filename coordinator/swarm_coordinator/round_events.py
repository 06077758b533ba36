"""What goes into the round state machine, and what comes out of it (see `rounds`).

Events say what happened; effects say what the shell has to do, in their order, in the transaction that stores the event.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm_protocol.records import Seat

ALL_DONE = "all rounds are done"
"""Why a run ends that nobody stops."""


@dataclass(frozen=True, slots=True)
class NodeReady:
    """`accepted` counts the node's contributions that audits accepted, or as many as weight asks for if it was invited.

    `trusted` says that it is beyond probation; `since` is where its first registration stands in the log. An upload of 0 is
    not known yet.
    """

    peer: bytes
    round: int
    base: bytes
    tokens_per_s: float
    can_reduce: bool
    accepted: int
    upload_bytes_per_s: int = 0
    trusted: bool = False
    since: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """These nodes repeated what they had offered, or nothing: they are here."""

    peers: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class NodeGone:
    """Its standing ended: it takes no further part."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class Committed:
    slot: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class Sketched:
    """The checkpoint worker closed the round's sketches; `selected` are the slots that averages may be made of."""

    sketch_set: bytes
    selected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PartPublished:
    record_hash: bytes
    part: int
    reducer: bytes
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PartHeld:
    record_hash: bytes


@dataclass(frozen=True, slots=True)
class Rooted:
    """The checkpoint worker applied these parts."""

    parts: tuple[bytes | None, ...]
    root: bytes


@dataclass(frozen=True, slots=True)
class Opened:
    slot: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The coordinator was away for so long; nobody's time ran meanwhile. Negative if the clock was set back."""

    away_ms: int


@dataclass(frozen=True, slots=True)
class Pause:
    """The run owner wants no round to begin for now, or wants them to begin again."""

    paused: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """The run owner wants no round to follow the one under way."""

    reason: str


Event = (
    NodeReady
    | Seen
    | NodeGone
    | Committed
    | Sketched
    | PartPublished
    | PartHeld
    | Rooted
    | Opened
    | Tick
    | Resumed
    | Pause
    | Stop
)


@dataclass(frozen=True, slots=True)
class PublishPlan:
    round: int
    base: bytes
    roster: tuple[Seat, ...]
    cursor: int
    commit_by_ms: int
    exchange_by_ms: int


@dataclass(frozen=True, slots=True)
class PublishCommitmentSet:
    round: int
    commitments: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class RequestRoot:
    """Ask the checkpoint worker to apply these part records: per part a hash, or None for a missing one."""

    round: int
    parts: tuple[bytes | None, ...]


@dataclass(frozen=True, slots=True)
class PublishManifest:
    """`sketch_set` is None in a round that needed no sketches, or got no set of them."""

    round: int
    parts: tuple[bytes | None, ...]
    base: bytes
    root: bytes
    sketch_set: bytes | None = None


@dataclass(frozen=True, slots=True)
class RevealBeacon:
    round: int
    openings: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """No round follows."""

    reason: str = ALL_DONE


Effect = PublishPlan | PublishCommitmentSet | RequestRoot | PublishManifest | RevealBeacon | Finish
