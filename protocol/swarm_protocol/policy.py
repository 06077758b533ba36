"""What verdicts amount to: the outcome of an audit, an identity's standing, what becomes of its credit. Pure functions.

An `Account` is all that the policy knows of an identity. It follows from the log alone, so that anybody can repeat every
draw and every decision: the coordinator keeps it up to date, and a verifier folds the log's records into the same.

    contribution sealed    its tokens are pending credit
    accepted               the tokens are vouched for: audits of this identity become rarer
    rejected               standing ends, all pending credit is forfeited
    inconclusive           the contribution's credit is forfeited, and nothing else: nobody was caught
    unavailable            the same, and probation starts anew; `max_unavailable` within the window end the standing
    average rejected       standing ends, all pending credit is forfeited; no other audit of an average has an effect
    `horizon` rounds later what is still pending, and not in an open audit, is settled
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from blake3 import blake3

from swarm_protocol.records import Outcome
from swarm_protocol.spec import AuditSpec

AGREEING_AUDITORS = 2
CROSS_CHECK_ONE_IN = 8


@dataclass(frozen=True, slots=True)
class Account:
    """What the log says of an identity. `unavailable` are the rounds of such audits within the window, ascending."""

    vouched_tokens: int = 0
    accepted: int = 0
    unavailable: tuple[int, ...] = ()
    ended: str | None = None


@dataclass(frozen=True, slots=True)
class Ruling:
    """What a resolved audit does: the account after it, and whose pending credit is lost."""

    account: Account
    forfeits_contribution: bool
    forfeits_everything: bool


def ruling(account: Account, outcome: Outcome, *, round: int, tokens: int, policy: AuditSpec) -> Ruling:
    """The effect of a resolved audit of a contribution of `tokens` in `round` on its identity."""
    match outcome:
        case Outcome.ACCEPTED:
            vouched = replace(account, vouched_tokens=account.vouched_tokens + tokens, accepted=account.accepted + 1)
            return Ruling(vouched, forfeits_contribution=False, forfeits_everything=False)
        case Outcome.REJECTED:
            ended = account.ended or f"an audit rejected its contribution to round {round}"
            return Ruling(replace(account, ended=ended), forfeits_contribution=True, forfeits_everything=True)
        case Outcome.UNAVAILABLE:
            account = _unavailable(account, round, policy)
            return Ruling(account, forfeits_contribution=True, forfeits_everything=account.ended is not None)
        case _:
            return Ruling(account, forfeits_contribution=True, forfeits_everything=False)


def reduction_ruling(account: Account, outcome: Outcome, reason: str, *, round: int, policy: AuditSpec) -> Ruling:
    """The effect of a resolved audit of an average in `round` on the identity that made it.

    A reducer that does not serve its own input is `unavailable`, as with a contribution, but for that contribution's
    credit. Inputs that others do not serve are nobody's fault that could be shown, hence `inconclusive`.
    """
    if outcome is Outcome.REJECTED:
        account = replace(account, ended=account.ended or reason)
        return Ruling(account, forfeits_contribution=False, forfeits_everything=True)
    if outcome is Outcome.UNAVAILABLE:
        account = _unavailable(account, round, policy)
        return Ruling(account, forfeits_contribution=False, forfeits_everything=account.ended is not None)
    return Ruling(account, forfeits_contribution=False, forfeits_everything=False)


def _unavailable(account: Account, round: int, policy: AuditSpec) -> Account:
    """Probation starts anew; too many such rounds within the window end the standing."""
    rounds = sorted({*account.unavailable, round})
    lately = tuple(one for one in rounds if one > rounds[-1] - policy.unavailable_window)
    account = replace(account, vouched_tokens=0, unavailable=lately)
    if len(lately) >= policy.max_unavailable:
        reason = f"its evidence was unavailable in {len(lately)} audits within {policy.unavailable_window} rounds"
        account = replace(account, ended=account.ended or reason)
    return account


def resolve(
    verdicts: Mapping[bytes, Outcome], auditors: int, policy: AuditSpec, *, acceptances: int = 1
) -> Outcome | None:
    """The outcome of an audit, or None while another auditor has to look.

    In this order: enough auditors rejected; enough accepted and none rejected; two agree; all agree, though they are fewer
    than two; all have spoken without agreement, which is inconclusive.

    Args:
        verdicts: at most one per auditor, by the auditor's key.
        auditors: how many may look.
        acceptances: how many are enough (see `acceptances_needed`).
    """
    votes = Counter(verdicts.values())
    if not votes:
        return None
    if votes[Outcome.REJECTED] >= policy.rejecting_auditors:
        return Outcome.REJECTED
    if votes[Outcome.ACCEPTED] >= min(acceptances, auditors) and not votes[Outcome.REJECTED]:
        return Outcome.ACCEPTED
    for outcome in (Outcome.ACCEPTED, Outcome.UNAVAILABLE, Outcome.INCONCLUSIVE):
        if votes[outcome] >= AGREEING_AUDITORS:
            return outcome
    if votes.total() < auditors:
        return None
    if votes[Outcome.ACCEPTED] and not votes[Outcome.REJECTED]:
        return Outcome.ACCEPTED
    if votes[Outcome.UNAVAILABLE] == votes.total():
        return Outcome.UNAVAILABLE
    return Outcome.INCONCLUSIVE


def acceptances_needed(audited: bytes) -> int:
    """Two for one audit in `CROSS_CHECK_ONE_IN`, else one: an auditor that accepts everything unseen is found out.

    `audited` is the hash of the commitment or of the part record.
    """
    return 2 if int.from_bytes(blake3(b"cross-check" + audited).digest()[:4], "little") % CROSS_CHECK_ONE_IN == 0 else 1


def whose_turn(audited: bytes, auditors: Iterable[bytes], voted: Collection[bytes]) -> bytes:
    """The auditor who should look next, so that several share the work without talking: by rendezvous hash.

    Others may step in when it does not come to it. Empty where everybody has voted.
    """
    waiting = sorted(key for key in auditors if key not in voted)
    return max(waiting, key=lambda key: blake3(audited + key).digest(), default=b"")
