"""What gossip believes and passes on: pure decisions, without a clock, a socket or a library in them.

`Gate` judges a message by its content: size, signature, run, kind, signer, round window; and it remembers names, so that
a message is passed on once and two records under one name are noticed. `Standings` judges a neighbour by what it
sent. The cheap questions come first, so that a flood of garbage costs a hash and a dictionary look-up per message.

Nothing that only its sender vouches for moves the window: rounds are counted by plans and manifests of the coordinator.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import TypeVar

from swarm_protocol.equivocation import Proved, proved_by
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.records import (
    Appointment,
    Ban,
    Dismissal,
    Envelope,
    Equivocation,
    LogHead,
    PartVerdict,
    Record,
    Role,
    RoundManifest,
    RoundPlan,
    RunEnd,
    Verdict,
)

MAX_MESSAGE_BYTES = 256 << 10
ROUNDS_BACK = 8
VERDICT_ROUNDS_BACK = 64
HEADS_BACK = 64
MAX_NAMES = 8192
MAX_KEPT_BYTES = 32 << 20
MAX_OFFICES = 1024
MAX_PROOFS = 256

OWNERS_KINDS = (RoundPlan, RoundManifest, LogHead, Appointment, Dismissal, Ban, RunEnd)
AUDITORS_KINDS = (Verdict, PartVerdict)

Name = tuple[bytes, str, int, int]
K = TypeVar("K")
V = TypeVar("V")


class Outcome(StrEnum):
    """What is done with a message: pass it on, or drop it; only `INVALID` is held against who sent it."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    IGNORED = "ignored"
    STALE = "stale"
    CONFLICT = "conflict"
    INVALID = "invalid"


@dataclass(frozen=True)
class Decision:
    """`conflict` is the encoded record that was there before under the same name, where there was another one."""

    outcome: Outcome
    reason: str = ""
    record: Record | None = None
    conflict: bytes | None = None


class Gate:
    """What one run's messages have to be. `auditors` are keys that are known to hold that office from the start."""

    def __init__(self, run: bytes, coordinator: bytes, *, auditors: Iterable[bytes] = ()) -> None:
        self.run = run
        self.coordinator = coordinator
        self.newest_round: int | None = None
        self._auditors = set(auditors)
        self._dismissed: set[bytes] = set()
        self._seen: OrderedDict[bytes, Decision] = OrderedDict()
        self._names: OrderedDict[Name, bytes] = OrderedDict()
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._heads: list[int] = []
        self._rosters: OrderedDict[int, frozenset[bytes]] = OrderedDict()
        self._proofs: OrderedDict[Name, bytes] = OrderedDict()
        self._lasting: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def judge(self, data: bytes) -> Decision:
        """What to do with a message. Accepting it changes what is accepted next."""
        if len(data) > MAX_MESSAGE_BYTES:
            return Decision(Outcome.INVALID, f"{len(data)} bytes where at most {MAX_MESSAGE_BYTES} are allowed")
        digest = sha256(data).digest()
        before = self._seen.get(digest)
        if before is not None:
            self._seen.move_to_end(digest)
            return before
        decision = self._judge(data)
        if decision.outcome in (Outcome.ACCEPTED, Outcome.INVALID):
            again = Outcome.INVALID if decision.outcome is Outcome.INVALID else Outcome.DUPLICATE
            _put(self._seen, digest, Decision(again, decision.reason), MAX_NAMES)
        return decision

    def kept(self, record_hash: bytes) -> bytes | None:
        """A recent message by its record's hash."""
        return self._kept.get(record_hash)

    def newest(self) -> list[bytes]:
        """What a newcomer needs first: appointments, dismissals and proofs, and the newest of what moves."""
        return [*self._lasting.values(), *self._proofs.values()]

    def _judge(self, data: bytes) -> Decision:
        try:
            envelope = Envelope.decode(data)
            record = envelope.open()
        except InvalidDataError as error:
            return Decision(Outcome.INVALID, str(error))
        if record.run != self.run:
            return Decision(Outcome.INVALID, f"a {record.kind} of another run")
        refused = self._unsuitable(envelope, record)
        if refused is not None:
            return refused
        name = (envelope.key, record.kind, record.round, record.sequence)
        known = self._names.get(name)
        if known == record.hash:
            return Decision(Outcome.DUPLICATE, "the same record, encoded in the same way, signed twice")
        if known is not None and not isinstance(record, Equivocation):
            return Decision(Outcome.CONFLICT, "another record under the same name", record, self._kept.get(known))
        self._accept(name, data, record)
        return Decision(Outcome.ACCEPTED, record=record)

    def _unsuitable(self, envelope: Envelope, record: Record) -> Decision | None:
        """Why a signed record of the run is not passed on; None if it is."""
        if isinstance(record, Equivocation):
            return self._unproved(record)
        if isinstance(record, OWNERS_KINDS):
            if envelope.key != self.coordinator:
                return Decision(Outcome.INVALID, f"a {record.kind} that the coordinator did not sign")
        elif isinstance(record, AUDITORS_KINDS):
            if envelope.key not in self._auditors and envelope.key != self.coordinator:
                # Its appointment may be on its way.
                return Decision(Outcome.IGNORED, f"a {record.kind} by a key that is not known to be an auditor's")
        else:
            return Decision(Outcome.INVALID, f"a {record.kind} has no place in gossip")
        return self._out_of_window(record)

    def _out_of_window(self, record: Record) -> Decision | None:
        newest = self.newest_round
        if isinstance(record, LogHead):
            if len(self._heads) >= HEADS_BACK and record.sequence < self._heads[0]:
                return Decision(Outcome.STALE, f"a head of {record.sequence} leaves, older than the last {HEADS_BACK}")
            return None
        if isinstance(record, AUDITORS_KINDS):
            if newest is None or record.round > newest:
                return Decision(Outcome.IGNORED, f"a {record.kind} of a round that is not known yet")
            if record.round < newest - VERDICT_ROUNDS_BACK:
                return Decision(Outcome.STALE, f"a {record.kind} of round {record.round}; round {newest} is under way")
            return None
        if isinstance(record, RoundPlan | RoundManifest) and newest is not None and record.round < newest - ROUNDS_BACK:
            return Decision(Outcome.STALE, f"a {record.kind} of round {record.round}; round {newest} is under way")
        return None

    def _unproved(self, report: Equivocation) -> Decision | None:
        try:
            proved = proved_by(report)
        except InvalidDataError as error:
            return Decision(Outcome.INVALID, f"an equivocation that proves nothing: {error}")
        if not self._concerns_us(proved):
            # Keys are free: proofs about strangers would be a flood that costs nothing.
            return Decision(Outcome.IGNORED, "an equivocation by a key that takes no part in the run")
        if (proved.key, proved.kind, proved.round, proved.sequence) in self._proofs:
            return Decision(Outcome.DUPLICATE, "an equivocation that was proved before")
        return None

    def _concerns_us(self, proved: Proved) -> bool:
        key = proved.key
        if key == self.coordinator or key in self._auditors:
            return True
        return any(key in roster for roster in self._rosters.values())

    def _accept(self, name: Name, data: bytes, record: Record) -> None:
        _put(self._names, name, record.hash, MAX_NAMES)
        self._kept[record.hash] = data
        self._kept_bytes += len(data)
        while self._kept_bytes > MAX_KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= len(oldest)
        if isinstance(record, RoundPlan | RoundManifest):
            self.newest_round = max(record.round, self.newest_round or 0)
        if isinstance(record, RoundPlan):
            _put(self._rosters, record.round, frozenset(seat.peer for seat in record.roster), ROUNDS_BACK)
        elif isinstance(record, LogHead):
            self._heads = sorted([*self._heads, record.sequence])[-HEADS_BACK:]
        elif isinstance(record, Appointment):
            in_office = record.role is Role.AUDITOR and record.key not in self._dismissed
            if in_office and len(self._auditors) < MAX_OFFICES:
                self._auditors.add(record.key)
        elif isinstance(record, Dismissal):
            self._auditors.discard(record.key)
            self._dismissed.add(record.key)
        elif isinstance(record, Equivocation):
            proved = proved_by(record)
            _put(self._proofs, (proved.key, proved.kind, proved.round, proved.sequence), data, MAX_PROOFS)
        self._remember(data, record)

    def _remember(self, data: bytes, record: Record) -> None:
        """Keep what a newcomer needs: who holds an office, and of plans, manifests, heads and the end the newest."""
        if isinstance(record, Appointment | Dismissal):
            _put(self._lasting, (record.kind, record.sequence), data, MAX_OFFICES)
            return
        if isinstance(record, Equivocation | Verdict | PartVerdict | Ban):
            return
        number = record.sequence if isinstance(record, LogHead) else record.round
        for kind, before in list(self._lasting):
            if kind == record.kind:
                if before >= number:
                    return
                del self._lasting[(kind, before)]
        _put(self._lasting, (record.kind, number), data, MAX_OFFICES)


MESSAGES_PER_S = 20.0
MESSAGES_AT_ONCE = 100.0
WORST_SCORE = -50.0
RECOVERY_PER_S = 0.5
BANNED_S = 600.0
MAX_NEIGHBOURS = 4096

PENALTY = {Outcome.INVALID: 10.0, Outcome.STALE: 1.0, Outcome.IGNORED: 0.25}
OVER_RATE_PENALTY = 1.0


@dataclass
class Neighbour:
    """What is known of a neighbour: how much more it may say now, and its score, 0 at best."""

    allowance: float = MESSAGES_AT_ONCE
    score: float = 0.0
    at_s: float = 0.0


@dataclass
class Standings:
    """Rates and scores by neighbour, also of those that have left; below `WORST_SCORE` they are dropped and banned."""

    neighbours: OrderedDict[str, Neighbour] = field(default_factory=OrderedDict)
    banned_until_s: OrderedDict[str, float] = field(default_factory=OrderedDict)

    def heard(self, peer: str, now_s: float) -> bool:
        """A neighbour sends a message. False if it sends more than is allowed: then the message is dropped unread."""
        found = self._advanced(peer, now_s)
        if found.allowance < 1.0:
            found.score -= OVER_RATE_PENALTY
            return False
        found.allowance -= 1.0
        return True

    def note(self, peer: str, outcome: Outcome, now_s: float) -> None:
        """What its message turned out to be."""
        self._advanced(peer, now_s).score -= PENALTY.get(outcome, 0.0)

    def punish(self, peer: str, penalty: float, now_s: float) -> None:
        """It did something else that nobody honest does."""
        self._advanced(peer, now_s).score -= penalty

    def score(self, peer: str, now_s: float) -> float:
        return self._advanced(peer, now_s).score

    def to_drop(self, peer: str, now_s: float) -> bool:
        """Whether a neighbour is to be dropped now; it is banned then."""
        if self._advanced(peer, now_s).score > WORST_SCORE:
            return False
        del self.neighbours[peer]
        _put(self.banned_until_s, peer, now_s + BANNED_S, MAX_NEIGHBOURS)
        return True

    def is_banned(self, peer: str, now_s: float) -> bool:
        until_s = self.banned_until_s.get(peer)
        if until_s is None:
            return False
        if now_s >= until_s:
            del self.banned_until_s[peer]
            return False
        return True

    def _advanced(self, peer: str, now_s: float) -> Neighbour:
        found = self.neighbours.get(peer)
        if found is None:
            found = Neighbour(at_s=now_s)
            _put(self.neighbours, peer, found, MAX_NEIGHBOURS)
        passed_s = max(0.0, now_s - found.at_s)
        found.allowance = min(MESSAGES_AT_ONCE, found.allowance + passed_s * MESSAGES_PER_S)
        found.score = min(0.0, found.score + passed_s * RECOVERY_PER_S)
        found.at_s = max(found.at_s, now_s)
        return found


def _put(kept: OrderedDict[K, V], key: K, value: V, limit: int) -> None:
    """Put a value in as the newest, and let the oldest go beyond the limit."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > limit:
        kept.popitem(last=False)
