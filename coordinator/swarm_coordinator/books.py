"""The run's books: accounts and credit, kept up to date as rounds are sealed and audits resolved. One transaction's work.

What happens to them is decided by `swarm_protocol.policy`; here it is looked up and stored. Every movement of credit is
written three times: as rows of the ledger, at its contribution, and in its identity's sums. What the log then has to say of
it is fixed in `swarm_protocol.ledger`, and followed by anybody with `ledger_history`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sqlalchemy import exists, func, insert, select, tuple_, update
from sqlalchemy.orm import Session

from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.tables import CONTRIBUTION, AuditRow, CreditRow, CreditStatus, LedgerRow, NodeRow
from swarm_coordinator.db.writing import Stored
from swarm_protocol import encoding, policy
from swarm_protocol.ledger import Balance, fits, megaflops, tree
from swarm_protocol.policy import Account
from swarm_protocol.records import (
    MAX_MOVES,
    Commitment,
    CreditEntry,
    CreditMove,
    CreditStatement,
    Move,
    Outcome,
    RoundPlan,
)
from swarm_protocol.spec import RunSpec

MAX_ROUNDS_BYTES = 1 << 16

RUN = "run"
"""The account that credit is earned from; the others are a `CreditStatus` of the contribution's identity."""

ACCOUNTS = {
    Move.EARNED: (RUN, CreditStatus.PENDING.value),
    Move.SETTLED: (CreditStatus.PENDING.value, CreditStatus.SETTLED.value),
    Move.FORFEITED: (CreditStatus.PENDING.value, CreditStatus.FORFEITED.value),
}
"""Out of which account a movement goes, and into which."""

_MOVES = {credit: move for move, (_, credit) in ACCOUNTS.items()}
_UNSYNCHRONIZED = {"synchronize_session": False}


@dataclass(frozen=True, slots=True)
class Cause:
    """The record that a movement follows from: its hash, and its place in the log."""

    hash: bytes
    leaf: int

    @classmethod
    def of(cls, stored: Stored) -> Cause:
        assert stored.leaf is not None
        return cls(stored.hash, stored.leaf)


@dataclass(frozen=True, slots=True)
class Work:
    """A contribution's credit."""

    round: int
    slot: int
    peer: bytes
    megaflops: int
    commitment: bytes


class Books:
    """Accounts and credit of one run, within a transaction. `sign` stores a statement that is due."""

    def __init__(
        self, session: Session, archive: Archive, spec: RunSpec, sign: Callable[[CreditStatement], object]
    ) -> None:
        self._session = session
        self._archive = archive
        self._run = archive.run
        self._spec = spec
        self._audit = spec.audit
        self._sign = sign

    def vouched_tokens(self, key: bytes) -> int:
        """What audits have vouched for, of an identity; 0 for an unknown one."""
        node = self._archive.node(key)
        return 0 if node is None else node.vouched_tokens

    def earn(self, plan: RoundPlan, contributions: Mapping[int, Commitment], cause: Cause) -> None:
        """A round is sealed: its contributions are pending credit, lost at once where standing has ended."""
        query = select(NodeRow.key, NodeRow.team, NodeRow.ended_reason).filter_by(run=self._run)
        nodes = {key: (team, ended) for key, team, ended in self._session.execute(query)}
        works = [
            Work(plan.round, slot, plan.roster[slot].peer, megaflops(self._spec, one.tokens), one.hash)
            for slot, one in sorted(contributions.items())
        ]
        if works:
            rows = [
                {
                    "run": self._run,
                    "round": work.round,
                    "slot": work.slot,
                    "peer": work.peer,
                    "tokens": contributions[work.slot].tokens,
                    "megaflops": work.megaflops,
                    "commitment": work.commitment,
                    "status": CreditStatus.PENDING.value,
                    "team": nodes[work.peer][0],
                }
                for work in works
            ]
            self._session.execute(insert(CreditRow), rows)
        self._move(Move.EARNED, works, cause)
        lost = [work for work in works if nodes[work.peer][1] is not None]
        self._move(Move.FORFEITED, lost, cause, "standing had ended")

    def resolved(self, audit: AuditRow, outcome: Outcome, reason: str, cause: Cause) -> str | None:
        """An audit came to an end. Returns why the node's standing ends, if it does by this."""
        audit.outcome, audit.reason = outcome.value, reason
        node = self._archive.node(audit.peer)
        credit = self._session.get(CreditRow, (self._run, audit.round, audit.slot))
        if node is None or credit is None:
            return None
        before = _account(node)
        if audit.part == CONTRIBUTION:
            ruling = policy.ruling(before, outcome, round=audit.round, tokens=credit.tokens, policy=self._audit)
            node.rejected += outcome is Outcome.REJECTED
            node.unavailable += outcome is Outcome.UNAVAILABLE
        else:
            ruling = policy.reduction_ruling(before, outcome, reason, round=audit.round, policy=self._audit)
        _store(node, ruling.account)
        if ruling.forfeits_contribution:
            lost = self._pending(CreditRow.round == audit.round, CreditRow.slot == audit.slot)
            self._move(Move.FORFEITED, lost, cause, reason)
        if ruling.forfeits_everything:
            self.forfeit(audit.peer, ruling.account.ended or reason, cause)
        return ruling.account.ended if before.ended is None else None

    def forfeit(self, key: bytes, reason: str, cause: Cause) -> None:
        """An identity's standing ended: all its pending credit is lost."""
        self._move(Move.FORFEITED, self._pending(CreditRow.peer == key), cause, reason)

    def unaudited(self, round_number: int, slots: Collection[int], cause: Cause) -> None:
        """Contributions on probation for whose audit the budget did not suffice earn nothing."""
        lost = [work for work in self._pending(CreditRow.round == round_number) if work.slot in slots]
        self._move(Move.FORFEITED, lost, cause, "on probation, and over the audit budget")

    def settle(self, cause: Cause) -> None:
        """Settle pending credit that is due and in no open audit.

        Once the run has ended all of it is due, but for that of identities of which any audit is open: a reject forfeits it.
        """
        sealed = self._archive.last_sealed()
        if sealed is None:
            return
        waiting = (AuditRow.run == self._run, AuditRow.outcome.is_(None))
        if self._archive.ended():
            due = self._pending(CreditRow.peer.not_in(select(AuditRow.peer).where(*waiting)))
        else:
            audited = exists().where(*waiting, AuditRow.round == CreditRow.round, AuditRow.slot == CreditRow.slot)
            due = self._pending(CreditRow.round <= sealed.round - self._audit.horizon, ~audited)
        self._move(Move.SETTLED, due, cause)

    def state(self) -> None:
        """Sign a statement of what moved since the last one, if anything did."""
        unstated = (LedgerRow.run == self._run, LedgerRow.statement.is_(None))
        query = select(
            LedgerRow.position, LedgerRow.credit, LedgerRow.cause, LedgerRow.round, LedgerRow.slot, LedgerRow.megaflops
        )
        rows = self._session.execute(query.where(*unstated).order_by(LedgerRow.seq)).all()
        if not rows:
            return
        moves = []
        for (_, credit, cause), some in groupby(rows, key=lambda row: row[:3]):
            entries = tuple(CreditEntry(round=row.round, slot=row.slot, megaflops=row.megaflops) for row in some)
            moves.append(CreditMove(move=_MOVES[credit], cause=cause, entries=entries))
        sequence = self._archive.statements()
        stated = update(LedgerRow).where(*unstated).values(statement=sequence)
        self._session.execute(stated, execution_options=_UNSYNCHRONIZED)
        balances = tree(stated_balances(self._session, self._run))
        sealed = self._archive.last_sealed()
        assert sealed is not None
        assert sealed.root is not None
        self._sign(
            CreditStatement(
                run=self._run,
                round=sealed.round,
                sequence=sequence,
                checkpoint=sealed.root,
                moves=tuple(moves),
                balances=balances.root(),
                accounts=balances.size,
            )
        )

    def _pending(self, *which: Any) -> list[Work]:
        """The pending contributions for which this holds, by round and slot."""
        query = select(CreditRow.round, CreditRow.slot, CreditRow.peer, CreditRow.megaflops, CreditRow.commitment)
        query = query.where(CreditRow.run == self._run, CreditRow.status == CreditStatus.PENDING.value, *which)
        return [Work(*row) for row in self._session.execute(query.order_by(CreditRow.round, CreditRow.slot))]

    def _move(self, move: Move, works: Sequence[Work], cause: Cause, reason: str | None = None) -> None:
        """Book a movement; one that a statement has no room for goes into the next one."""
        for start in range(0, len(works), MAX_MOVES):
            some = works[start : start + MAX_MOVES]
            unstated = (LedgerRow.run == self._run, LedgerRow.statement.is_(None))
            counts = select(func.count(), func.count(LedgerRow.position.distinct())).where(*unstated)
            entries, moves = self._session.execute(counts).one()
            if not fits(moves + 1, entries + len(some)):
                self.state()
                moves = 0
            self._book(move, some, cause, moves, reason)

    def _book(self, move: Move, works: Sequence[Work], cause: Cause, position: int, reason: str | None) -> None:
        debit, credit = ACCOUNTS[move]
        last = self._session.scalar(select(func.max(LedgerRow.seq)).filter_by(run=self._run))
        first = 0 if last is None else last + 1
        rows = [
            {
                "run": self._run,
                "seq": first + number,
                "round": work.round,
                "slot": work.slot,
                "peer": work.peer,
                "debit": debit,
                "credit": credit,
                "megaflops": work.megaflops,
                "commitment": work.commitment,
                "cause": cause.hash,
                "leaf": cause.leaf,
                "position": position,
            }
            for number, work in enumerate(works)
        ]
        self._session.execute(insert(LedgerRow), rows)
        moved = (LedgerRow.run == self._run, LedgerRow.seq >= first)
        if move is not Move.EARNED:
            places = tuple_(CreditRow.round, CreditRow.slot).in_(select(LedgerRow.round, LedgerRow.slot).where(*moved))
            brought = update(CreditRow).where(CreditRow.run == self._run, places).values(status=credit, reason=reason)
            self._session.execute(brought, execution_options=_UNSYNCHRONIZED)
        amount = select(func.sum(LedgerRow.megaflops)).where(*moved, LedgerRow.peer == NodeRow.key).scalar_subquery()
        sums = {credit: NodeRow.__table__.c[credit] + amount}
        if debit != RUN:
            sums[debit] = NodeRow.__table__.c[debit] - amount
        whose = (NodeRow.run == self._run, NodeRow.key.in_(select(LedgerRow.peer).where(*moved)))
        self._session.execute(update(NodeRow).where(*whose).values(sums), execution_options=_UNSYNCHRONIZED)


def stated_balances(session: Session, run: bytes) -> list[Balance]:
    """Everybody's balance after the newest statement, by key. What moved since then is taken back."""
    unstated = (LedgerRow.run == run, LedgerRow.statement.is_(None))
    since = session.scalar(select(func.min(LedgerRow.seq)).where(*unstated))
    earliest = (
        select(func.min(LedgerRow.seq)).where(LedgerRow.run == run, LedgerRow.peer == NodeRow.key).scalar_subquery()
    )
    columns = (NodeRow.key, NodeRow.pending, NodeRow.settled, NodeRow.forfeited)
    query = select(*columns).where(NodeRow.run == run, earliest.is_not(None) if since is None else earliest < since)
    accounts = [status.value for status in CreditStatus]
    sums = {
        key: dict(zip(accounts, amounts, strict=True)) for key, *amounts in session.execute(query.order_by(NodeRow.key))
    }
    moves = select(LedgerRow.peer, LedgerRow.debit, LedgerRow.credit, LedgerRow.megaflops).where(*unstated)
    for peer, debit, credit, moved in session.execute(moves):
        if peer in sums:
            sums[peer][credit] -= moved
            if debit != RUN:
                sums[peer][debit] += moved
    return [Balance(key, *amounts.values()) for key, amounts in sums.items()]


def _account(node: NodeRow) -> Account:
    rounds = encoding.decode(node.unavailable_rounds, max_bytes=MAX_ROUNDS_BYTES)
    assert isinstance(rounds, list)
    return Account(
        vouched_tokens=node.vouched_tokens,
        accepted=node.accepted,
        unavailable=tuple(int(number) for number in rounds if isinstance(number, int)),
        ended=node.ended_reason,
    )


def _store(node: NodeRow, account: Account) -> None:
    node.vouched_tokens, node.accepted = account.vouched_tokens, account.accepted
    node.unavailable_rounds = encoding.encode(list(account.unavailable))
    node.ended_reason = account.ended
