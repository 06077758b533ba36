"""The run's log in ranges, from peer to peer: each range proves by itself that it belongs under a signed head.

A range holds the entries from `first` on and the proof (RFC 9162) that the log with all leaves up to its last one is
extended by the log of the head. Whoever has the log up to `first` computes the root with these entries, and checks it
against the proof: an entry that is wrong, left out or added is noticed with the first range, and so is who sent it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from swarm_protocol import encoding
from swarm_protocol.errors import EncodingError, HashMismatchError, RefusedError
from swarm_protocol.gossip import wire
from swarm_protocol.log import Log, leaf_hash, verify_consistency
from swarm_protocol.records import LogHead

ENTRIES_BYTES = 2 << 20
MAX_PROOF = 130


def provide(entries: Sequence[bytes], log: Log, wanted: wire.Wanted) -> bytes:
    """The answer of somebody who has `entries`, which are those of `log`.

    Raises:
        RefusedError: they are not all here.
    """
    first, last = bounds(log, wanted)
    if len(entries) < wanted.size:
        raise RefusedError("not here")
    return pack(entries[first:last], log, wanted)


def bounds(log: Log, wanted: wire.Wanted) -> tuple[int, int]:
    """The first entry of the range that is wanted, and the one after its last.

    Raises:
        RefusedError: `log` does not have them.
    """
    last = min(wanted.first + min(wanted.count, wire.MAX_ENTRIES), wanted.size)
    if wanted.what != "log" or not wanted.first < last <= wanted.size <= log.size:
        raise RefusedError("not here")
    return wanted.first, last


def pack(entries: Sequence[bytes], log: Log, wanted: wire.Wanted) -> bytes:
    """The answer that consists of these entries of `log`, those from `wanted.first` on, as far as there is room."""
    chosen: list[bytes] = []
    room = ENTRIES_BYTES
    for entry in entries:
        room -= len(entry)
        if chosen and room < 0:
            break
        chosen.append(entry)
    proof = log.consistency_proof(wanted.first + len(chosen), wanted.size)
    return encoding.encode({"entries": chosen, "proof": list(proof)})


def checked(data: bytes, log: Log, head: LogHead) -> tuple[list[bytes], Log]:
    """The entries of a range that begins where `log` ends, and the longer log, if they belong under the head.

    Raises:
        EncodingError: not a range.
        HashMismatchError: an entry is not the log's; or `log` itself is not what the head extends.
    """
    value = wire.decoded_map(data, wire.MAX_FETCH_BYTES)
    entries, proof = wire.bytes_list(value.get("entries")), wire.bytes_list(value.get("proof"), MAX_PROOF)
    if not entries or log.size + len(entries) > head.sequence:
        raise EncodingError("a range of the log that is empty, or goes beyond its head")
    longer = deepcopy(log)
    for entry in entries:
        longer.append(leaf_hash(entry))
    verify_consistency(longer.size, head.sequence, proof, longer.root(), head.root)
    return entries, longer


def require_extended(log: Log, head: LogHead) -> None:
    """Raises `HashMismatchError` if a head of at most our size is not what our log was then: history was rewritten."""
    if head.sequence <= log.size and log.root(head.sequence) != head.root:
        raise HashMismatchError(
            f"HISTORY WAS REWRITTEN: the head of {head.sequence} leaves has the root {head.root.hex()[:16]}..., "
            f"and as many leaves that were verified here have {log.root(head.sequence).hex()[:16]}..."
        )
