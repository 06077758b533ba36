"""What verdicts amount to: the outcome of an audit, and whether an identity keeps its standing. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from blake3 import blake3

from swarm_protocol.records import Outcome
from swarm_protocol.spec import AuditSpec

AGREEING_AUDITORS = 2


def resolve(verdicts: Mapping[bytes, Outcome], auditors: int, policy: AuditSpec) -> Outcome | None:
    """The outcome of an audit, or None while another auditor has to look.

    In this order: enough auditors rejected; one accepted and none rejected; two agree; all agree, though they are fewer
    than two; all have spoken without agreement, which is inconclusive.

    Args:
        verdicts: at most one per auditor, by the auditor's key.
        auditors: how many are appointed.
    """
    votes = Counter(verdicts.values())
    if votes[Outcome.REJECTED] >= policy.rejecting_auditors:
        return Outcome.REJECTED
    if votes[Outcome.ACCEPTED] and not votes[Outcome.REJECTED]:
        return Outcome.ACCEPTED
    for outcome in (Outcome.ACCEPTED, Outcome.UNAVAILABLE, Outcome.INCONCLUSIVE):
        if votes[outcome] >= AGREEING_AUDITORS:
            return outcome
    if not votes or votes.total() < auditors:
        return None
    if votes[Outcome.UNAVAILABLE] == votes.total():
        return Outcome.UNAVAILABLE
    return Outcome.INCONCLUSIVE


def whose_turn(commitment: bytes, auditors: Iterable[bytes], voted: Collection[bytes]) -> bytes:
    """The auditor who should look next, so that several share the work without talking: by rendezvous hash.

    Others may step in when it does not come to it. Empty where everybody has voted.
    """
    waiting = [key for key in auditors if key not in voted]
    return max(waiting, key=lambda key: blake3(commitment + key).digest(), default=b"")


def standing_ends(rejected: int, unavailable: int, policy: AuditSpec) -> str | None:
    """Why an identity with these audit outcomes loses its standing, or None if it keeps it."""
    if rejected:
        return "an audit rejected a contribution"
    if unavailable >= policy.max_unavailable:
        return f"evidence was unavailable in {unavailable} audits"
    return None
