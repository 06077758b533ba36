"""What is audited, contributions and averages: a hash chain fixed before the run, and what nodes committed to. Exact domain.

The chain's end is in the RunSpec; each round reveals the value before the last one revealed, so that nobody can choose it
after the start. A draw hashes it with the nonces that the nodes opened and with the manifest. Anybody repeats a draw from
public records.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from blake3 import blake3

from swarm_protocol.errors import HashMismatchError
from swarm_protocol.records import BeaconReveal
from swarm_protocol.spec import AuditSpec

_BEACON = "swarm-node 2026 beacon"
_NONCE = "swarm-node 2026 nonce"
_DRAW = "swarm-node 2026 draw"
_PART_DRAW = "swarm-node 2026 part draw"


@dataclass(frozen=True)
class Drawable:
    """What a draw needs to know of one committed contribution.

    `tokens` and `segments` are of the contribution as planned. `vouched_tokens` are those of the identity's contributions
    that audits accepted, by the log prefix that the plan names (`policy.Account`).
    """

    slot: int
    nonce_hash: bytes
    tokens: int
    segments: int
    vouched_tokens: int


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


def probability(audit: AuditSpec, *, tokens: int, standard_tokens: int, vouched_tokens: int) -> int:
    """How likely a contribution is audited, in units of 2^-64: certain on probation, then max(floor, 1 / (n - 9)).

    n is what audits have vouched for, in whole contributions of `standard_tokens`; 9 is the probation less one. A smaller
    contribution is drawn in proportion to its tokens.
    """
    n = vouched_tokens // standard_tokens
    if n < audit.probation:
        return 1 << 64
    share = max(int(audit.floor * 2**64), (1 << 64) // (n - audit.probation + 1))
    return min(1 << 64, share * tokens // standard_tokens)


def drawn(
    audit: AuditSpec, standard_tokens: int, reveal: BeaconReveal, commitments: Sequence[Drawable]
) -> dict[int, tuple[int, ...]]:
    """The slots of a round that are audited, ascending, each with the segments that are replayed.

    The draw of a slot is `H(value || count || (slot || nonce)... || manifest || slot)`; count and slots are u32,
    little-endian; the nonces are those that fit their commitments, in slot order. A slot is audited if the draw's first 64
    bits (little-endian) are below its `probability`, or if its nonce was not opened. On probation, and without a nonce, all
    segments are replayed, otherwise the one that the second 64 bits name, modulo their number.

    Where that is more than `audit.budget` of the tokens committed to in the round, slots without a nonce come first, then
    those with the lowest first 64 bits, as many as fit.
    """
    opened = _opened(reveal, commitments)
    prefix = _prefix(reveal, opened)
    wanted: list[tuple[bool, int, Drawable, tuple[int, ...]]] = []
    for entry in commitments:
        digest = blake3(prefix + struct.pack("<I", entry.slot), derive_key_context=_DRAW).digest()
        value, choice = struct.unpack_from("<QQ", digest)
        likely = probability(
            audit, tokens=entry.tokens, standard_tokens=standard_tokens, vouched_tokens=entry.vouched_tokens
        )
        silent, trusted = entry.slot not in opened, entry.vouched_tokens // standard_tokens >= audit.probation
        if silent or value < likely:
            whole = silent or not trusted
            wanted.append(
                (not silent, value, entry, tuple(range(entry.segments)) if whole else (choice % entry.segments,))
            )
    left = int(audit.budget * sum(entry.tokens for entry in commitments))
    chosen: dict[int, tuple[int, ...]] = {}
    for _, _, entry, segments in sorted(wanted, key=lambda one: one[:2]):
        cost = entry.tokens * len(segments) // entry.segments
        if cost <= left:
            left -= cost
            chosen[entry.slot] = segments
    return dict(sorted(chosen.items()))


def drawn_parts(
    audit: AuditSpec,
    standard_tokens: int,
    reveal: BeaconReveal,
    commitments: Sequence[Drawable],
    reducers: Mapping[int, int],
) -> tuple[int, ...]:
    """The parts of a round whose averages are audited, ascending.

    The draw of a part is the hash of the same bytes as a slot's, with the part in the slot's place and under a key of its
    own. Its average is audited if the first 64 bits are below `audit.reductions`, and certainly while its reducer is on
    probation: recomputing averages costs far less than the replay of the whole contribution, which is due then as well.

    Args:
        reducers: for each part that the manifest has a record of, what audits have vouched for of who signed it first, in
            tokens.
    """
    if not audit.reductions:
        return ()
    prefix = _prefix(reveal, _opened(reveal, commitments))
    share = int(audit.reductions * 2**64)

    def is_drawn(part: int) -> bool:
        digest = blake3(prefix + struct.pack("<I", part), derive_key_context=_PART_DRAW).digest()
        trusted = reducers[part] // standard_tokens >= audit.probation
        return not trusted or int.from_bytes(digest[:8], "little") < share

    return tuple(part for part in sorted(reducers) if is_drawn(part))


def _opened(reveal: BeaconReveal, commitments: Iterable[Drawable]) -> dict[int, bytes]:
    """The nonces that fit their commitments, by slot."""
    hashes = {entry.slot: entry.nonce_hash for entry in commitments}
    return {
        opening.slot: opening.nonce
        for opening in reveal.openings
        if hashes.get(opening.slot) == nonce_hash(opening.nonce)
    }


def _prefix(reveal: BeaconReveal, opened: Mapping[int, bytes]) -> bytes:
    nonces = b"".join(struct.pack("<I", slot) + opened[slot] for slot in sorted(opened))
    return reveal.value + struct.pack("<I", len(opened)) + nonces + reveal.manifest


def _hashed(value: bytes, times: int) -> bytes:
    if len(value) != 32:
        raise ValueError(f"a value of the beacon chain has 32 bytes, not {len(value)}")
    for _ in range(times):
        value = blake3(value, derive_key_context=_BEACON).digest()
    return value
