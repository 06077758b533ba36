"""Credit: verified work in floating point operations, and the tree over everybody's balances that the coordinator signs.

Credit is booked twice, out of one account and into another: a contribution's is *earned* when its round is sealed (from the
run to the identity's pending), *settled* when the audit horizon has passed, or *forfeited*. Amounts are whole megaflops
(10^6 operations), so that they are exact and fit 64 bits in any run. A `CreditStatement` names the moves since the one
before, and the root over all balances after them: with a balance and its proof a certificate needs nothing else.

A statement is due before each plan, if anything moved since the last one; before a move that it would have no more room for;
and, once the run has ended, right after each record that moved something.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swarm_protocol import encoding
from swarm_protocol.errors import EncodingError
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.spec import RunSpec

FLOPS_PER_UNIT = 10**6
STATEMENT_BYTES = 1 << 19
MOVE_BYTES, ENTRY_BYTES = 96, 40


def megaflops(spec: RunSpec, tokens: int) -> int:
    """The work in training on so many tokens, in millions of floating point operations, rounded down."""
    return tokens * spec.model.flops_per_token // FLOPS_PER_UNIT


def fits(moves: int, entries: int) -> bool:
    """Whether a statement has room for so many moves with so many entries in all, which are counted at their longest."""
    return MOVE_BYTES * moves + ENTRY_BYTES * entries <= STATEMENT_BYTES


@dataclass(frozen=True, slots=True)
class Balance:
    """What an identity has, in megaflops: `pending` may still be forfeited, `settled` stays."""

    key: bytes
    pending: int = 0
    settled: int = 0
    forfeited: int = 0

    def encode(self) -> bytes:
        """Canonical bytes: a leaf of the tree of balances."""
        return encoding.encode(
            {"forfeited": self.forfeited, "key": self.key, "pending": self.pending, "settled": self.settled}
        )

    @classmethod
    def decode(cls, data: bytes) -> Balance:
        """Raises `EncodingError`."""
        value = encoding.decode(data, max_bytes=1 << 10, max_depth=1)
        fields = {"forfeited", "key", "pending", "settled"}
        if not isinstance(value, dict) or set(value) != fields:
            raise EncodingError("a balance is a map of key, pending, settled and forfeited")
        key = value["key"]
        amounts = [value[name] for name in ("pending", "settled", "forfeited")]
        if not isinstance(key, bytes) or len(key) != 32 or not all(type(one) is int and one >= 0 for one in amounts):
            raise EncodingError("a balance has a key of 32 bytes and amounts of at least 0")
        return cls(key, *(int(one) for one in amounts if isinstance(one, int)))


def tree(balances: Iterable[Balance]) -> Log:
    """The Merkle tree (RFC 6962) over the balances of everybody who ever earned, in the order of their keys."""
    return Log(leaf_hash(one.encode()) for one in sorted(balances, key=lambda one: one.key))
