"""The ledger as the log tells it: every movement of credit, everybody's balance, and when a statement of them is due. Pure.

`history` tells it what happens; here it follows who earned, forfeited and settled what, in the order in which the
coordinator has to book it, and each `CreditStatement` in the log is held against that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from swarm_protocol.errors import InvalidDataError
from swarm_protocol.ledger import Balance, fits, megaflops, tree
from swarm_protocol.records import (
    MAX_MOVES,
    BeaconReveal,
    CreditEntry,
    CreditMove,
    CreditStatement,
    Move,
    Record,
    RoundManifest,
    RoundPlan,
    RunEnd,
)
from swarm_protocol.round_history import Round, Stands
from swarm_protocol.spec import RunSpec

Place = tuple[int, int]
"""A contribution: its round and slot."""


@dataclass(frozen=True)
class Due:
    """What a statement has to say."""

    checkpoint: bytes
    round: int
    moves: tuple[CreditMove, ...]
    balances: bytes
    accounts: int


class LedgerHistory:
    """`balances` are those of everybody who ever earned; `ended` is the run's end, once it has one."""

    def __init__(self, spec: RunSpec) -> None:
        self.balances: dict[bytes, Balance] = {}
        self.ended: RunEnd | None = None
        self.statements = 0
        self._spec = spec
        self._sealed: RoundManifest | None = None
        self._pending: dict[int, dict[int, tuple[bytes, int]]] = {}
        self._pending_of: defaultdict[bytes, set[Place]] = defaultdict(set)
        self._open: Counter[Place] = Counter()
        self._open_of: Counter[bytes] = Counter()
        self._unstated: list[CreditMove] = []
        self._unstated_entries = 0
        self._due: list[Due] = []
        self._plan_is_next = False

    @property
    def sealed_rounds(self) -> int:
        return 0 if self._sealed is None else self._sealed.round + 1

    @property
    def checkpoint(self) -> bytes:
        """The root of the newest sealed one."""
        return bytes.fromhex(self._spec.checkpoint) if self._sealed is None else self._sealed.root

    @property
    def overdue(self) -> bool:
        """Whether the log may not end here: a statement has to follow."""
        return bool(self._due)

    def expect(self, record: Record) -> None:
        """Check that a record may come now.

        Raises:
            InvalidDataError: a credit statement is due, or is not.
        """
        if self._due and not isinstance(record, CreditStatement):
            raise InvalidDataError(f"a {record.kind} where a credit statement was due")
        if isinstance(record, RoundPlan) and self._unstated:
            raise InvalidDataError(
                f"the plan of round {record.round} without the credit statement that was due before it"
            )
        if self._plan_is_next and not isinstance(record, RoundPlan):
            raise InvalidDataError(f"a {record.kind} after a credit statement that no plan follows")
        self._plan_is_next = False

    # What moves credit

    def seal(self, found: Round, manifest: RoundManifest, stands: Stands) -> None:
        """A round is sealed: its contributions are earned, and lost at once where standing has ended."""
        roster, number = found.plan.roster, manifest.round
        earned = {
            slot: (roster[slot].peer, megaflops(self._spec, commitment.tokens))
            for slot, commitment in found.commitments.items()
        }
        self._sealed = manifest
        self._pending[number] = {}
        self._move(Move.EARNED, manifest, [(number, slot, *work) for slot, work in earned.items()])
        self.forfeit(manifest, ((number, slot) for slot, (peer, _) in earned.items() if not stands(peer)))
        self.settle(manifest)

    def draw(self, found: Round, reveal: BeaconReveal) -> None:
        """Audits were drawn: who is on probation and not among them earns nothing."""
        for (slot, _), audit in found.audits.items():
            if audit.outcome is None:
                self._open[reveal.round, slot] += 1
                self._open_of[audit.peer] += 1
        tokens, probation = self._spec.standard_tokens, self._spec.audit.probation
        unaudited = [
            (reveal.round, slot)
            for slot in found.commitments
            if (slot, None) not in found.audits and found.vouched[slot] // tokens < probation
        ]
        self.forfeit(reveal, unaudited)

    def closed(self, peer: bytes, place: Place) -> None:
        """An audit of a contribution, or of an average by its slot, has an outcome."""
        self._open[place] -= 1
        self._open_of[peer] -= 1

    def forfeit(self, cause: Record, places: Iterable[Place]) -> None:
        """What is pending of these contributions is lost."""
        self._move(Move.FORFEITED, cause, self._still_pending(places))

    def forfeit_all(self, cause: Record, peer: bytes) -> None:
        """All that is pending of an identity is lost."""
        self.forfeit(cause, list(self._pending_of.get(peer, ())))

    def settle(self, cause: Record) -> None:
        """What is due, and in no open audit, stays. At the end all is due but of those with any audit open."""
        if self.ended is not None:
            due = [place for peer, places in self._pending_of.items() if not self._open_of[peer] for place in places]
        else:
            last = self.sealed_rounds - 1 - self._spec.audit.horizon
            rounds = [number for number in self._pending if number <= last]
            due = [
                (number, slot) for number in rounds for slot in self._pending[number] if not self._open[number, slot]
            ]
        self._move(Move.SETTLED, cause, self._still_pending(due))

    def end(self, record: RunEnd) -> None:
        """No round follows."""
        if self.ended is not None:
            raise InvalidDataError("a second end of the run")
        if (record.round, record.root) != (self.sealed_rounds, self.checkpoint):
            raise InvalidDataError(f"the run's end names round {record.round} and another checkpoint than the last one")
        self.ended = record
        self.settle(record)

    def close_record(self) -> None:
        """A record and all that follows from it is noted: once the run has ended, what it moved has to be stated."""
        if self.ended is not None and self._unstated:
            self._cut()

    # Statements

    def state(self, said: CreditStatement) -> None:
        """Check a statement against what follows, and that it is due."""
        if not self._due:
            if not self._unstated:
                raise InvalidDataError(f"credit statement {said.sequence} that is not due")
            self._cut()
            self._plan_is_next = True
        due = self._due.pop(0)
        if said.sequence != self.statements:
            raise InvalidDataError(f"credit statement {said.sequence} where {self.statements} was due")
        if said.moves != due.moves:
            raise InvalidDataError(f"credit statement {said.sequence}: {_difference(said.moves, due.moves)}")
        if (said.balances, said.accounts) != (due.balances, due.accounts):
            raise InvalidDataError(f"credit statement {said.sequence} has other balances than follow from its moves")
        if (said.checkpoint, said.round) != (due.checkpoint, due.round):
            raise InvalidDataError(f"credit statement {said.sequence} names another checkpoint than the newest one")
        self.statements += 1

    def _cut(self) -> None:
        balances = tree(self.balances.values())
        number = max(self.sealed_rounds - 1, 0)
        self._due.append(Due(self.checkpoint, number, tuple(self._unstated), balances.root(), balances.size))
        self._unstated, self._unstated_entries = [], 0

    def _move(self, move: Move, cause: Record, items: list[tuple[int, int, bytes, int]]) -> None:
        items.sort(key=lambda item: item[:2])
        for start in range(0, len(items), MAX_MOVES):
            some = items[start : start + MAX_MOVES]
            if not fits(len(self._unstated) + 1, self._unstated_entries + len(some)):
                self._cut()
            entries = tuple(CreditEntry(round=number, slot=slot, megaflops=work) for number, slot, _, work in some)
            self._unstated.append(CreditMove(move=move, cause=cause.hash, entries=entries))
            self._unstated_entries += len(entries)
            for item in some:
                self._book(move, *item)

    def _book(self, move: Move, number: int, slot: int, peer: bytes, work: int) -> None:
        before = self.balances.get(peer, Balance(peer))
        if move is Move.EARNED:
            self._pending[number][slot] = (peer, work)
            self._pending_of[peer].add((number, slot))
            self.balances[peer] = replace(before, pending=before.pending + work)
            return
        del self._pending[number][slot]
        self._pending_of[peer].remove((number, slot))
        if not self._pending_of[peer]:
            del self._pending_of[peer]
        if not self._pending[number]:
            del self._pending[number]
        if move is Move.SETTLED:
            self.balances[peer] = replace(before, pending=before.pending - work, settled=before.settled + work)
        else:
            self.balances[peer] = replace(before, pending=before.pending - work, forfeited=before.forfeited + work)

    def _still_pending(self, places: Iterable[Place]) -> list[tuple[int, int, bytes, int]]:
        return [
            (number, slot, *self._pending[number][slot])
            for number, slot in places
            if slot in self._pending.get(number, {})
        ]


def totals(balances: Mapping[bytes, Balance]) -> Balance:
    """The sum over everybody, under no key."""
    found = balances.values()
    return Balance(
        b"", sum(one.pending for one in found), sum(one.settled for one in found), sum(one.forfeited for one in found)
    )


def _difference(said: tuple[CreditMove, ...], follows: tuple[CreditMove, ...]) -> str:
    """Where two lists of moves part, in words."""
    for place, (one, other) in enumerate(zip(said, follows, strict=False)):
        if (one.move, one.cause) != (other.move, other.cause):
            return f"move {place} is {_cause(one)}, {_cause(other)} follows"
        if one.entries != other.entries:
            wrong = sorted({*one.entries} ^ {*other.entries}, key=lambda entry: (entry.round, entry.slot))[0]
            here = _amount(one, wrong.round, wrong.slot)
            due = _amount(other, wrong.round, wrong.slot)
            return f"slot {wrong.slot} of round {wrong.round} has {here} {one.move} in it, {due} follows"
    return f"it has {len(said)} moves where {len(follows)} follow"


def _cause(move: CreditMove) -> str:
    return f"{move.move} because of {move.cause.hex()[:12]}"


def _amount(move: CreditMove, number: int, slot: int) -> str:
    found = [one.megaflops for one in move.entries if (one.round, one.slot) == (number, slot)]
    return f"{found[0]} megaflops" if found else "nothing"
