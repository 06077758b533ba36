"""Certificates of credit, made of the newest statement (see `swarm_protocol.certificate`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from swarm_coordinator.books import stated_balances
from swarm_coordinator.db.archive import Archive
from swarm_protocol.certificate import FORMAT, Certificate, CertifiedBalance, LoggedStatement
from swarm_protocol.ledger import Balance, tree
from swarm_protocol.log import Log
from swarm_protocol.records import CreditStatement
from swarm_protocol.spec import RunSpec

LogProof = Callable[[int], tuple[tuple[bytes, ...], bytes]]
"""For a leaf: its inclusion proof, and the encoded Envelope of the LogHead that it leads to."""


@dataclass(frozen=True)
class _Stated:
    """The newest statement, and all balances after it, in the order of their tree."""

    envelope: bytes
    leaf: int
    places: dict[bytes, int]
    balances: list[Balance]
    tree: Log


class Certificates:
    """Those of one run. The tree over all balances is made once per statement. From any thread."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._lock = Lock()
        self._newest: _Stated | None = None

    def of(self, archive: Archive, key: bytes, log_proof: LogProof) -> Certificate | None:
        """An identity's certificate; None if no statement has its balance yet."""
        stated, node = self._stated(archive), archive.node(key)
        if stated is None or node is None or key not in stated.places:
            return None
        index = stated.places[key]
        balance = stated.balances[index]
        proof, head = log_proof(stated.leaf)
        return Certificate(
            format=FORMAT,
            name=node.name,
            team=node.team,
            spec=self._spec.encode().hex(),
            statement=stated.envelope.hex(),
            balance=CertifiedBalance(
                key=key.hex(), pending=balance.pending, settled=balance.settled, forfeited=balance.forfeited
            ),
            index=index,
            proof=[digest.hex() for digest in stated.tree.inclusion_proof(index)],
            log=LoggedStatement(leaf=stated.leaf, proof=[digest.hex() for digest in proof], head=head.hex()),
        )

    def _stated(self, archive: Archive) -> _Stated | None:
        rows = archive.newest(CreditStatement.kind, 1)
        if not rows:
            return None
        row = rows[0]
        assert row.leaf is not None
        with self._lock:
            if self._newest is None or self._newest.leaf != row.leaf:
                balances = stated_balances(archive.session, archive.run)
                places = {one.key: index for index, one in enumerate(balances)}
                self._newest = _Stated(row.envelope, row.leaf, places, balances, tree(balances))
            return self._newest
