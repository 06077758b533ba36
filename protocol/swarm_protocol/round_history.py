"""One round as the log tells it, record by record, up to the draw of its audits. Pure, no I/O.

`history` checks who signed and who stands, and says what audits had vouched for when the round was planned; here each record
is checked against those of the round before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from swarm_protocol.draw import Drawable, drawn, drawn_parts, nonce_hash, verify_value
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.records import (
    BeaconReveal,
    Commitment,
    CommitmentSet,
    NonceOpening,
    Outcome,
    PartRecord,
    RoundManifest,
    RoundPlan,
    SlotHash,
    SlotNonce,
)
from swarm_protocol.spec import RunSpec

Stands = Callable[[bytes], bool]
"""Whether an identity is registered and in good standing by now."""


class Moot(StrEnum):
    """What became of an audit of somebody whose standing ended before: nobody looks any more."""

    MOOT = "moot"


@dataclass
class Drawn:
    """An audit that the log calls for: `segments` are replayed, none for an average; `outcome` is None while it is open."""

    peer: bytes
    audited: bytes
    segments: tuple[int, ...]
    outcome: Outcome | Moot | None = None
    verdicts: dict[bytes, Outcome] = field(default_factory=dict)


@dataclass
class Round:
    """A round that was planned, filled in as the log goes on. Its methods raise `InvalidDataError`, which says what is wrong.

    `vouched` is what audits had vouched for when the round was planned, by slot, in tokens. `commitments` are those in the
    log, from the closing set on those that count. `part_records` are by their hash, each with the slot that signed it first.
    `audits` are by slot and part; the part is None for the contribution.
    """

    spec: RunSpec
    plan: RoundPlan
    vouched: tuple[int, ...]
    commitments: dict[int, Commitment] = field(default_factory=dict)
    closing: CommitmentSet | None = None
    part_records: dict[bytes, tuple[int, PartRecord]] = field(default_factory=dict)
    manifest: RoundManifest | None = None
    openings: dict[int, bytes] = field(default_factory=dict)
    reveal: BeaconReveal | None = None
    audits: dict[tuple[int, int | None], Drawn] = field(default_factory=dict)

    def commit(self, commitment: Commitment) -> None:
        slot = commitment.slot
        tokens = self.plan.roster[slot].steps * self.spec.tokens_per_step
        if self.closing is not None or (commitment.plan, commitment.tokens) != (self.plan.hash, tokens):
            raise InvalidDataError(f"the commitment of slot {slot} is late, of another plan, or not to {tokens} tokens")
        if slot in self.commitments:
            raise InvalidDataError(f"a second commitment of slot {slot} in round {commitment.round}")
        self.commitments[slot] = commitment

    def close(self, closing: CommitmentSet, stands: Stands) -> None:
        """Exactly those count that are in the log, of identities that still stand."""
        roster = self.plan.roster
        counted = {slot: self.commitments[slot] for slot in sorted(self.commitments) if stands(roster[slot].peer)}
        named = tuple(SlotHash(slot=slot, hash=commitment.hash) for slot, commitment in counted.items())
        if self.closing is not None or closing.plan != self.plan.hash or closing.commitments != named:
            raise InvalidDataError(
                f"the commitment set of round {closing.round} does not name the commitments that came in before it"
            )
        self.commitments, self.closing = counted, closing

    def average(self, reducer: bytes, record: PartRecord) -> None:
        slot = self.plan.slot_of(reducer)
        if slot is None or not self.plan.roster[slot].reducer or record.sequence != record.part:
            raise InvalidDataError(f"an average of part {record.part} by slot {slot}, which is no reducer of it")
        if self.closing is None or self.manifest is not None or record.commitment_set != self.closing.hash:
            raise InvalidDataError(f"the average of part {record.part} is late, or of another commitment set")
        if slot not in self.commitments:
            raise InvalidDataError(f"an average of part {record.part} by slot {slot}, which committed to nothing")
        self.part_records.setdefault(record.hash, (slot, record))

    def seal(self, manifest: RoundManifest) -> None:
        names = (self.plan.hash, None if self.closing is None else self.closing.hash, self.plan.base)
        if (manifest.plan, manifest.commitment_set, manifest.base) != names:
            raise InvalidDataError(f"the manifest of round {manifest.round} is of another plan, commitment set or base")
        for part, name in enumerate(manifest.parts):
            if name is not None and (name not in self.part_records or self.part_records[name][1].part != part):
                raise InvalidDataError(
                    f"the manifest of round {manifest.round} names an average of part {part} that is not in the log"
                )
        if self.manifest is not None:
            raise InvalidDataError(f"a second manifest of round {manifest.round}")
        self.manifest = manifest

    def open_nonce(self, opening: NonceOpening) -> None:
        slot, commitment = opening.slot, self.commitments.get(opening.slot)
        if self.manifest is None or self.reveal is not None or slot in self.openings:
            raise InvalidDataError(f"slot {slot} opens its nonce of round {opening.round} at the wrong time, or twice")
        if commitment is None or nonce_hash(opening.nonce) != commitment.nonce_hash:
            raise InvalidDataError(f"slot {slot} opens a nonce that it did not commit to")
        self.openings[slot] = opening.nonce

    def draw(self, reveal: BeaconReveal, stands: Stands) -> None:
        """The beacon's value is revealed: open the audits that follow from it."""
        if self.manifest is None or self.reveal is not None or reveal.manifest != self.manifest.hash:
            raise InvalidDataError(
                f"a beacon value of round {reveal.round} that is not over its manifest, or a second one"
            )
        verify_value(reveal.value, self.plan.previous_beacon)
        opened = tuple(SlotNonce(slot=slot, nonce=self.openings[slot]) for slot in sorted(self.openings))
        if reveal.openings != opened:
            raise InvalidDataError(
                f"the beacon value of round {reveal.round} does not go with the nonces that were opened before it"
            )
        self.reveal = reveal
        spec = self.spec
        candidates = [
            Drawable(
                slot=slot,
                nonce_hash=commitment.nonce_hash,
                tokens=commitment.tokens,
                segments=len(spec.segments(self.plan.roster[slot].steps)),
                vouched_tokens=self.vouched[slot],
            )
            for slot, commitment in self.commitments.items()
        ]
        for slot, segments in drawn(spec.audit, spec.standard_tokens, reveal, candidates).items():
            self._open_audit(slot, None, self.commitments[slot].hash, segments, stands)
        names = {part: name for part, name in enumerate(self.manifest.parts) if name is not None}
        slots = {part: self.part_records[name][0] for part, name in names.items()}
        reducers = {part: self.vouched[slot] for part, slot in slots.items()}
        for part in drawn_parts(spec.audit, spec.standard_tokens, reveal, candidates, reducers):
            self._open_audit(slots[part], part, names[part], (), stands)

    def _open_audit(
        self, slot: int, part: int | None, audited: bytes, segments: tuple[int, ...], stands: Stands
    ) -> None:
        peer = self.plan.roster[slot].peer
        self.audits[slot, part] = Drawn(peer, audited, segments, None if stands(peer) else Moot.MOOT)
