"""A round's draw, as soon as its beacon value is revealed: whom it names, and the audits that are opened for them.

Within one transaction. What decides is `swarm_protocol.draw`: everybody computes the same from the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.tables import CONTRIBUTION, MOOT, AuditRow, RoundRow
from swarm_protocol import encoding
from swarm_protocol.draw import Drawable, drawn, drawn_parts
from swarm_protocol.records import BeaconReveal, Commitment, RoundManifest, RoundPlan
from swarm_protocol.spec import RunSpec


class Draws:
    """The draw of one round: `contributions` are those that count, by slot, and `row` is the round's."""

    def __init__(
        self,
        archive: Archive,
        spec: RunSpec,
        row: RoundRow,
        contributions: Mapping[int, Commitment],
        reveal: BeaconReveal,
    ) -> None:
        self._archive = archive
        self._spec = spec
        self._contributions = contributions
        self._reveal = reveal
        self._plan = archive.stored(RoundPlan, row.plan)
        self._vouched = _vouched(row)
        self._candidates = [
            Drawable(
                slot=slot,
                nonce_hash=commitment.nonce_hash,
                tokens=commitment.tokens,
                segments=len(spec.segments(self._plan.roster[slot].steps)),
                vouched_tokens=self._vouched[slot],
            )
            for slot, commitment in contributions.items()
        ]
        archive.prefetch(seat.peer for seat in self._plan.roster)

    def open_contributions(self) -> set[int]:
        """Open an audit for each contribution that is drawn; the slots on probation that are not."""
        spec = self._spec
        chosen = drawn(spec.audit, spec.standard_tokens, self._reveal, self._candidates)
        for slot, segments in chosen.items():
            self._open(slot, CONTRIBUTION, self._contributions[slot].hash, segments)
        return {
            slot
            for slot in self._contributions.keys() - chosen.keys()
            if self._vouched[slot] // spec.standard_tokens < spec.audit.probation
        }

    def open_averages(self) -> None:
        """Open an audit for each average of the manifest that is drawn."""
        spec = self._spec
        names = self._archive.stored(RoundManifest, self._reveal.manifest).parts
        slots: dict[int, int] = {}
        for part, name in enumerate(names):
            stored = None if name is None else self._archive.by_hash(name)
            slot = None if stored is None else self._plan.slot_of(stored.signer)
            if slot is not None:
                slots[part] = slot
        reducers = {part: self._vouched[slot] for part, slot in slots.items()}
        for part in drawn_parts(spec.audit, spec.standard_tokens, self._reveal, self._candidates, reducers):
            audited = names[part]
            assert audited is not None
            self._open(slots[part], part, audited, ())

    def _open(self, slot: int, part: int, audited: bytes, segments: Iterable[int]) -> None:
        peer = self._plan.roster[slot].peer
        node = self._archive.node(peer)
        self._archive.session.add(
            AuditRow(
                run=self._archive.run,
                round=self._plan.round,
                slot=slot,
                part=part,
                peer=peer,
                audited=audited,
                segments=encoding.encode(list(segments)),
                outcome=None if node is None or node.ended_reason is None else MOOT,
            )
        )


def _vouched(row: RoundRow) -> list[int]:
    """What audits had vouched for when the round was planned, by slot."""
    found = encoding.decode(row.vouched, max_bytes=1 << 20)
    assert isinstance(found, list)
    return [int(tokens) for tokens in found if isinstance(tokens, int)]
