"""What deliveries claim of their sketches, checked by a reducer: the signature, the place under its root, the part itself.

A sketch that is not that of the part which was committed to is refused, and an objection to it is signed; so is a sketch of
a part that is not sound. Two different signed Sketches of one slot are an equivocation: the second is refused, and both are
handed in.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swarm_protocol import sketching
from swarm_protocol.calls import Bytes
from swarm_protocol.client import Commitments
from swarm_protocol.errors import RefusedError
from swarm_protocol.records import MAX_SLOTS, Envelope, RoundPlan, Sketches, SketchObjection
from swarm_protocol.signing import SigningLedger
from swarm_protocol.sketch import Projection
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)


class ForgedSketchError(RefusedError):
    """The part that was committed to, and a signed sketch that is not that of a sound part.

    `objection` says so, signed; None if we have objected to that slot's sketches before, for one is enough.
    """

    def __init__(self, objection: Envelope | None) -> None:
        super().__init__("the sketch is not that of the part")
        self.objection = objection


class TwoSketchesError(RefusedError):
    """A slot's holder has signed two different Sketches: `both`, and nothing once these were given."""

    def __init__(self, *both: Envelope) -> None:
        super().__init__("other sketches of this slot were signed before")
        self.both = both


@dataclass(frozen=True)
class Claim:
    """A signed sketch of one part of a slot."""

    record: Sketches
    part: int
    sketch: bytes


class Claims:
    """The claims that one reducer is shown in one round. Thread-safe."""

    def __init__(self, spec: RunSpec, plan: RoundPlan, commitments: Commitments, ledger: SigningLedger) -> None:
        self._spec = spec
        self._plan = plan
        self._commitments = commitments
        self._ledger = ledger
        self._lock = threading.Lock()
        self._signed: dict[int, tuple[Envelope, Sketches]] = {}
        self._projections: dict[int, Projection] = {}
        self._objected: set[int] = set()
        self._equivocal: set[int] = set()

    def read(self, header: Mapping[str, Any], part: int, slot: int) -> Claim:
        """The claim in a delivery's header, if it is the slot's own.

        Raises:
            RefusedError: it has the wrong form, or (`TwoSketchesError`) it is not the one that was shown before.
            InvalidDataError: it is not signed by the slot's holder for this round, or the sketch not under the signed root.
        """
        raw, claimed, proof = header["sketches"], header["sketch"], header["sketch_proof"]
        if not isinstance(raw, bytes) or not isinstance(claimed, bytes):
            raise RefusedError("a sketch and its signed record are bytes")
        if not isinstance(proof, list) or not all(isinstance(step, bytes) for step in proof):
            raise RefusedError("a proof is a list of digests")
        record = self._record(Envelope.decode(raw), slot)
        sketching.require_sketch(self._spec, record, part, claimed, proof)
        return Claim(record, part, claimed)

    def require_true(self, claim: Claim, encoded: Bytes | memoryview, part_hash: bytes, proof: Sequence[bytes]) -> None:
        """Recompute the sketch of a part that was committed to. Blocking.

        Raises:
            ForgedSketchError: it is another one, or the part is not sound.
        """
        if self.holds(claim.part, encoded, claim.sketch):
            return
        slot = claim.record.slot
        with self._lock:
            again = slot in self._objected
            self._objected.add(slot)
        if again:
            raise ForgedSketchError(None)
        objection = SketchObjection(
            run=self._spec.run_id,
            round=self._plan.round,
            sequence=claim.part * MAX_SLOTS + slot,
            part=claim.part,
            slot=slot,
            sketches=claim.record.hash,
            part_hash=part_hash,
            proof=tuple(proof),
        )
        # After a crash the same sender may come with other sketches; one objection is all that may be signed.
        name = (objection.run, objection.kind, objection.round, objection.sequence)
        raise ForgedSketchError(self._ledger.find(*name) or self._ledger.sign(objection))

    def holds(self, part: int, encoded: Bytes | memoryview, claimed: bytes) -> bool:
        """Whether an encoded part is sound and this its sketch. Blocking."""
        with self._lock:
            where = self._projections.get(part)
        if where is None:
            where = sketching.projection(self._spec, self._commitments.closing.hash, part)
            with self._lock:
                self._projections[part] = where
        return sketching.part_matches(self._spec, where, part, encoded, claimed)

    def forget(self, part: int) -> None:
        """Free what only this part needs."""
        with self._lock:
            self._projections.pop(part, None)

    def _record(self, envelope: Envelope, slot: int) -> Sketches:
        with self._lock:
            known = self._signed.get(slot)
        if known is not None and known[0] == envelope:
            return known[1]
        holder = self._plan.roster[slot].peer
        record = envelope.open_as(Sketches, run=self._spec.run_id, round=self._plan.round, key=holder)
        sketching.require_for(record, self._commitments.closing.hash, self._commitments.by_slot[slot])
        with self._lock:
            first, signed = self._signed.setdefault(slot, (envelope, record))
            again = slot in self._equivocal
            if signed != record:
                self._equivocal.add(slot)
        if signed != record and again:
            raise TwoSketchesError
        if signed != record:
            log.error(
                "round %d: slot %d (%s) equivocates, it signed two different sketches: %s and %s",
                self._plan.round, slot, envelope.peer, first.encode().hex(), envelope.encode().hex(),
            )  # fmt: skip
            raise TwoSketchesError(first, envelope)
        return record
