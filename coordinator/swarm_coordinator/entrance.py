"""Who may register in a run: anybody, who knows the run's token, who was invited, or who is on the allow-list.

An invitation is a secret that is good for so many identities; of it only the BLAKE3 hash is kept. Whoever comes by one has
weight from its first contribution on, in any mode. An identity that has registered needs its invitation no more.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3
from sqlalchemy import select
from sqlalchemy.orm import Session

from swarm_coordinator.config import Mode
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.tables import AllowedRow, InviteRow
from swarm_protocol.errors import ConfigurationError, RefusedError
from swarm_protocol.identity import peer_id

_INVITATION = "swarm-node 2026 invitation"
_ASK = "get one from the run owner and join with --token TOKEN"


@dataclass(frozen=True)
class Entrance:
    """`token` is the one that all share in mode `token`."""

    mode: Mode
    token: str | None

    def __post_init__(self) -> None:
        if self.mode == "token" and not self.token:
            raise ConfigurationError(
                'admission.mode is "token", and the run has none: write it into the file `token`, or choose another mode'
            )

    def admit(self, archive: Archive, key: bytes, presented: str | None, now_ms: int) -> InviteRow | None:
        """Let an identity register. Returns the invitation that this uses up, if any.

        Raises:
            RefusedError: `token`, `invite-used`, `invite-expired` or `not-allowed`; the sentence says what to do.
        """
        node = archive.node(key)
        invite = None if presented is None else archive.session.get(InviteRow, (archive.run, token_hash(presented)))
        if node is not None and (node.invited or (self.mode == "invite" and invite is None)):
            return None
        if self.mode == "allow-list" and archive.session.get(AllowedRow, (archive.run, key)) is None:
            raise RefusedError(
                f"this run takes only identities that its owner has allowed; ask for {peer_id(key)} to be allowed",
                status=403,
                code="not-allowed",
            )
        if invite is not None:
            return _usable(invite, now_ms)
        if self.mode == "invite":
            raise RefusedError(f"this run asks for an invitation; {_ASK}", status=401, code="token")
        if self.mode == "token" and not self._is_the_token(presented):
            raise RefusedError(f"this run asks for a token; {_ASK}", status=401, code="token")
        return None

    def _is_the_token(self, presented: str | None) -> bool:
        return hmac.compare_digest((presented or "").encode(), (self.token or "").encode())


def _usable(invite: InviteRow, now_ms: int) -> InviteRow:
    if invite.expires_ms is not None and now_ms >= invite.expires_ms:
        raise RefusedError(
            "this invitation has expired or was withdrawn; ask the run owner for another",
            status=403,
            code="invite-expired",
        )
    if invite.used >= invite.uses:
        times = "once" if invite.uses == 1 else f"{invite.uses} times"
        raise RefusedError(
            f"this invitation was good for joining {times}, and that is used up; ask the run owner for another",
            status=403,
            code="invite-used",
        )
    return invite


def token_hash(token: str) -> bytes:
    """What is stored of an invitation's token, 32 bytes."""
    return blake3(token.encode(), derive_key_context=_INVITATION).digest()


def invite(session: Session, run: bytes, *, label: str, uses: int, now_ms: int, expires_ms: int | None) -> str:
    """A new invitation. Its token is returned, and nowhere else."""
    token = secrets.token_urlsafe(24)
    session.add(
        InviteRow(
            run=run,
            token_hash=token_hash(token),
            label=label,
            uses=uses,
            used=0,
            created_ms=now_ms,
            expires_ms=expires_ms,
        )
    )
    return token


def invitations(session: Session, run: bytes) -> Sequence[InviteRow]:
    """All of a run, oldest first."""
    return session.scalars(select(InviteRow).filter_by(run=run).order_by(InviteRow.created_ms, InviteRow.label)).all()


def withdraw(session: Session, run: bytes, which: str, now_ms: int) -> int:
    """Let invitations expire now: those with this label, or the one whose hash begins so (8 digits at least)."""
    found = 0
    for row in invitations(session, run):
        by_hash = len(which) >= 8 and row.token_hash.hex().startswith(which.lower())
        if row.label == which or by_hash:
            row.expires_ms = now_ms if row.expires_ms is None else min(row.expires_ms, now_ms)
            found += 1
    return found


def allow(session: Session, run: bytes, key: bytes, label: str) -> None:
    """Put an identity on the allow-list, or give it another label."""
    session.merge(AllowedRow(run=run, key=key, label=label))


def disallow(session: Session, run: bytes, key: bytes) -> bool:
    """Take an identity off the allow-list; False if it was not there."""
    row = session.get(AllowedRow, (run, key))
    if row is not None:
        session.delete(row)
    return row is not None


def allowed(session: Session, run: bytes) -> Sequence[AllowedRow]:
    return session.scalars(select(AllowedRow).filter_by(run=run).order_by(AllowedRow.label, AllowedRow.key)).all()
