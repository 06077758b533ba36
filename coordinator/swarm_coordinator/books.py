"""The run's books: accounts and credit, kept up to date as rounds are sealed and audits resolved. One transaction's work.

What happens to them is decided by `swarm_protocol.policy`; here it is looked up and stored.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import exists, func, select, update
from sqlalchemy.orm import Session

from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.tables import CONTRIBUTION, AuditRow, CreditRow, CreditStatus, NodeRow
from swarm_protocol import encoding, policy
from swarm_protocol.policy import Account
from swarm_protocol.records import Commitment, Outcome, RoundPlan
from swarm_protocol.spec import AuditSpec

MAX_ROUNDS_BYTES = 1 << 16


class Books:
    """Accounts and credit of one run, within a transaction."""

    def __init__(self, session: Session, archive: Archive, audit: AuditSpec) -> None:
        self._session = session
        self._archive = archive
        self._audit = audit

    def vouched_tokens(self, key: bytes) -> int:
        """What audits have vouched for, of an identity; 0 for an unknown one."""
        node = self._archive.node(key)
        return 0 if node is None else node.vouched_tokens

    def credit(self, plan: RoundPlan, contributions: Mapping[int, Commitment]) -> None:
        """A round is sealed: the tokens of its contributions are pending credit."""
        for slot, commitment in contributions.items():
            peer = plan.roster[slot].peer
            node = self._archive.node(peer)
            ended = node is None or node.ended_reason is not None
            self._session.add(
                CreditRow(
                    run=self._archive.run,
                    round=plan.round,
                    slot=slot,
                    peer=peer,
                    tokens=commitment.tokens,
                    status=CreditStatus.FORFEITED if ended else CreditStatus.PENDING,
                    reason="standing had ended" if ended else None,
                )
            )
        self._session.flush()

    def resolved(self, audit: AuditRow, outcome: Outcome, reason: str) -> str | None:
        """An audit came to an end. Returns why the node's standing ends, if it does by this."""
        audit.outcome, audit.reason = outcome.value, reason
        node = self._archive.node(audit.peer)
        credit = self._session.get(CreditRow, (self._archive.run, audit.round, audit.slot))
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
            self._forfeit(CreditRow.round == audit.round, CreditRow.slot == audit.slot, reason=reason)
        if ruling.forfeits_everything:
            self._forfeit(CreditRow.peer == audit.peer, reason=ruling.account.ended or reason)
        return ruling.account.ended if before.ended is None else None

    def ended(self, key: bytes, reason: str) -> None:
        """An identity's standing ended by something else than an audit: all its pending credit is lost."""
        self._forfeit(CreditRow.peer == key, reason=reason)

    def unaudited(self, round_number: int, slot: int) -> None:
        """A contribution on probation for whose audit the budget did not suffice earns nothing."""
        self._forfeit(
            CreditRow.round == round_number, CreditRow.slot == slot, reason="on probation, and over the audit budget"
        )

    def settle(self, sealed_round: int, *, finished: bool) -> None:
        """Settle pending credit that is due and in no open audit.

        When the run is over all of it is due, but for that of identities of which any audit is open: a reject forfeits it.
        """
        last = sealed_round if finished else sealed_round - self._audit.horizon
        mine = (AuditRow.run == CreditRow.run, AuditRow.outcome.is_(None))
        if finished:
            audited = exists().where(*mine, AuditRow.peer == CreditRow.peer)
        else:
            audited = exists().where(*mine, AuditRow.round == CreditRow.round, AuditRow.slot == CreditRow.slot)
        due = (CreditRow.run == self._archive.run, CreditRow.status == CreditStatus.PENDING, CreditRow.round <= last)
        self._session.execute(update(CreditRow).where(*due, ~audited).values(status=CreditStatus.SETTLED))

    def _forfeit(self, *which: object, reason: str) -> None:
        pending = (CreditRow.run == self._archive.run, CreditRow.status == CreditStatus.PENDING)
        statement = update(CreditRow).where(*pending, *which)  # type: ignore[arg-type]
        self._session.execute(statement.values(status=CreditStatus.FORFEITED, reason=reason))


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


def totals(session: Session, run: bytes) -> dict[bytes, dict[str, int]]:
    """Tokens of credit by identity and status."""
    found: dict[bytes, dict[str, int]] = {}
    query = select(CreditRow.peer, CreditRow.status, func.sum(CreditRow.tokens)).where(CreditRow.run == run)
    for peer, status, tokens in session.execute(query.group_by(CreditRow.peer, CreditRow.status)):
        found.setdefault(peer, {})[status] = int(tokens)
    return found
