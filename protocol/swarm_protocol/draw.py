"""Who is audited: a hash chain fixed before the run, mixed with what the nodes committed to. Exact domain.

The chain's end is in the RunSpec; each round reveals the value before the last one revealed, so that nobody can choose it
after the start. A draw hashes it with the nonces that the nodes opened and with the manifest. Anybody repeats a draw from
public records.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from swarm_protocol.errors import HashMismatchError
from swarm_protocol.records import BeaconReveal
from swarm_protocol.spec import AuditSpec

_BEACON = "swarm-node 2026 beacon"
_NONCE = "swarm-node 2026 nonce"
_DRAW = "swarm-node 2026 draw"


@dataclass(frozen=True)
class Drawable:
    """What a draw needs to know of one committed contribution.

    `earlier_contributions` counts the commitments of this identity in the commitment sets of earlier rounds.
    """

    slot: int
    peer: bytes
    earlier_contributions: int
    nonce_hash: bytes


def chain_end(seed: bytes, rounds: int) -> bytes:
    """What the RunSpec seals: the 32-byte seed, hashed once per round of the run."""
    return _hashed(seed, rounds)


def chain_value(seed: bytes, round: int, rounds: int) -> bytes:
    """The value that round `round` of `rounds` reveals; it hashes to that of the round before, in round 0 to the end.

    Raises:
        ValueError: the run has no such round.
    """
    if not 0 <= round < rounds:
        raise ValueError(f"round {round} of a run of {rounds}")
    return _hashed(seed, rounds - 1 - round)


def verify_value(value: bytes, previous: bytes) -> None:
    """Check a revealed value against the round before's (in round 0: the chain's end, from the spec).

    Raises:
        HashMismatchError: the chain was left.
    """
    if _hashed(value, 1) != previous:
        raise HashMismatchError("the beacon's value does not belong to the chain that the run was started with")


def nonce_hash(nonce: bytes) -> bytes:
    """What a commitment says of the nonce that its node opens after the manifest."""
    return blake3(nonce, derive_key_context=_NONCE).digest()


def drawn(audit: AuditSpec, reveal: BeaconReveal, commitments: Sequence[Drawable]) -> list[int]:
    """The slots of a round that are audited, ascending.

    A slot is audited if its identity is on probation, if its nonce was not opened, or if the first 64 bits
    (little-endian) of `H(value || count || (slot || nonce)... || manifest || slot)` are below `rate * 2^64`; count and slots
    are u32, little-endian; the nonces are those that fit their commitments, in slot order.
    """
    hashes = {entry.slot: entry.nonce_hash for entry in commitments}
    opened = {
        opening.slot: opening.nonce
        for opening in reveal.openings
        if hashes.get(opening.slot) == nonce_hash(opening.nonce)
    }
    nonces = b"".join(struct.pack("<I", slot) + opened[slot] for slot in sorted(opened))
    prefix = reveal.value + struct.pack("<I", len(opened)) + nonces + reveal.manifest
    bound = int(audit.rate * 2**64)

    def chosen(entry: Drawable) -> bool:
        if entry.earlier_contributions < audit.probation or entry.slot not in opened:
            return True
        digest = blake3(prefix + struct.pack("<I", entry.slot), derive_key_context=_DRAW).digest()
        return int.from_bytes(digest[:8], "little") < bound

    return sorted(entry.slot for entry in commitments if chosen(entry))


def _hashed(value: bytes, times: int) -> bytes:
    if len(value) != 32:
        raise ValueError(f"a value of the beacon chain has 32 bytes, not {len(value)}")
    for _ in range(times):
        value = blake3(value, derive_key_context=_BEACON).digest()
    return value
