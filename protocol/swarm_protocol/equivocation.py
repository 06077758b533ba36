"""Equivocation: two different records that one key signed under one name. They prove it by themselves.

Nobody signs a name twice by accident (see `signing`), so whoever holds both records can show them to anybody, later and
offline. What a signer says of itself and may say anew (heartbeats, addresses, registrations) proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm_protocol.errors import InvalidDataError
from swarm_protocol.records import Addresses, Envelope, Equivocation, Ready, Registration, TransportKey

SAID_ANEW = (Ready, Addresses, Registration, TransportKey)


@dataclass(frozen=True)
class Proved:
    """Whose key it is, and the name under which it signed two records."""

    key: bytes
    kind: str
    round: int
    sequence: int

    @property
    def what(self) -> str:
        return f"signed two different records of kind {self.kind} for round {self.round}, sequence {self.sequence}"


def prove(first: Envelope, second: Envelope, *, run: bytes) -> Proved:
    """What two signed records prove.

    Raises:
        InvalidDataError: they are no equivocation in this run; says why.
    """
    one, other = first.open(), second.open()
    if first.key != second.key:
        raise InvalidDataError("two records by different signers")
    if one.run != run or other.run != run:
        raise InvalidDataError("a record of another run")
    if (one.kind, one.round, one.sequence) != (other.kind, other.round, other.sequence):
        raise InvalidDataError("two records under different names")
    if isinstance(one, SAID_ANEW):
        raise InvalidDataError(f"a {one.kind} may be signed anew")
    if one.hash == other.hash:
        raise InvalidDataError("the same record twice")
    return Proved(first.key, one.kind, one.round, one.sequence)


def proved_by(report: Equivocation) -> Proved:
    """What a report proves, whoever signed it.

    Raises:
        InvalidDataError: nothing; says why.
    """
    proved = prove(Envelope.decode(report.first), Envelope.decode(report.second), run=report.run)
    if proved.round != report.round:
        raise InvalidDataError("the report names another round than its records")
    return proved
