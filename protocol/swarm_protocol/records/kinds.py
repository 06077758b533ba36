"""Every kind of record, by its name."""

from __future__ import annotations

from swarm_protocol.records.audits import BeaconReveal, Equivocation, Evidence, NonceOpening, PartVerdict, Verdict
from swarm_protocol.records.base import Record
from swarm_protocol.records.checkpoints import CheckpointManifest
from swarm_protocol.records.ledger import Ban, CreditStatement, LogHead, Receipt, RunEnd
from swarm_protocol.records.rounds import (
    Addresses,
    Appointment,
    CheckpointReport,
    Commitment,
    CommitmentSet,
    Dismissal,
    Evaluation,
    Holding,
    PartHeld,
    PartRecord,
    Ready,
    Registration,
    RoundManifest,
    RoundPlan,
    TransportKey,
)
from swarm_protocol.records.sketches import PartReceipt, Sketches, SketchObjection, SketchSet

KINDS: dict[str, type[Record]] = {
    record.kind: record
    for record in (
        Registration, Appointment, Dismissal, Addresses, Holding, Ready, RoundPlan, Commitment, CommitmentSet, Sketches,
        SketchObjection, SketchSet, PartRecord, PartReceipt, PartHeld, CheckpointReport, RoundManifest, CheckpointManifest,
        NonceOpening, BeaconReveal, Evidence, Verdict, PartVerdict, Equivocation, Evaluation, Receipt, LogHead, Ban, RunEnd,
        CreditStatement, TransportKey,
    )
}  # fmt: skip
