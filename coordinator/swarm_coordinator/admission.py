"""Whether a signed record is accepted, and what event it means to the round state machine.

The signature was checked already. A refusal is a `RefusedError` whose status and code tell the sender what to do: `early`
(try again later), `closed` (too late: drop it), `wrong-base` (fetch the right checkpoint), `not-registered` (register
first), `standing-ended`, `run-finished`, `upgrade`; every other code is a fault of the record. Who may register at all is
decided by `entrance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.tables import CONTRIBUTION
from swarm_coordinator.round_events import (
    ALL_DONE,
    Committed,
    Event,
    NodeReady,
    Opened,
    PartHeld,
    PartPublished,
    Rooted,
    Sketched,
)
from swarm_coordinator.rounds import Phase, State
from swarm_protocol import PROTOCOL_VERSION, equivocation, evidence, parts, records, sketching
from swarm_protocol.draw import nonce_hash
from swarm_protocol.errors import InvalidDataError, RefusedError
from swarm_protocol.records import Record, Role
from swarm_protocol.spec import RunSpec

UPGRADE_COMMAND = "pip install --upgrade swarm-node"

_ORDER = list(Phase)


@dataclass(frozen=True)
class Applicant:
    """Who hands in a record."""

    key: bytes


def admit(archive: Archive, spec: RunSpec, state: State, applicant: Applicant, record: Record) -> Event | None:
    """The event that follows from a record, or None if the rounds do not depend on it.

    The record was not seen before, or is a heartbeat.

    Raises:
        RefusedError: says why.
    """
    if record.run != spec.run_id:
        _refuse(404, "wrong-run", f"this is run {spec.run_id.hex()}; the record belongs to run {record.run.hex()}")
    if record.round > spec.rounds.count:
        _refuse(422, "no-such-round", f"the run has {spec.rounds.count} rounds; there is no round {record.round}")
    match record:
        case records.Registration():
            _admit_registration(archive, applicant, record)
            return None
        case records.Ready():
            _require_standing(archive, applicant)
            return _admit_ready(archive, spec, state, applicant, record)
        case records.Commitment():
            _require_standing(archive, applicant)
            return _admit_commitment(archive, spec, state, applicant, record)
        case records.PartRecord():
            _require_standing(archive, applicant)
            return _admit_part_record(archive, spec, state, applicant, record)
        case records.Sketches():
            _require_standing(archive, applicant)
            _admit_sketches(archive, state, applicant, record)
            return None
        case records.SketchObjection():
            _require_standing(archive, applicant)
            _admit_objection(archive, spec, state, applicant, record)
            return None
        case records.SketchSet():
            _require_office(archive, applicant, Role.CHECKPOINT_WORKER)
            return _admit_sketch_set(archive, state, record)
        case records.NonceOpening():
            _require_standing(archive, applicant)
            return _admit_opening(archive, state, applicant, record)
        case records.PartHeld():
            _require_office(archive, applicant, Role.CHECKPOINT_WORKER)
            return _admit_part_held(state, record)
        case records.CheckpointReport():
            _require_office(archive, applicant, Role.CHECKPOINT_WORKER)
            return _admit_report(state, record)
        case records.Addresses():
            _require_office(archive, applicant, Role.CHECKPOINT_WORKER)
            return None
        case records.Evaluation():
            _require_office(archive, applicant, Role.CHECKPOINT_WORKER)
            _admit_evaluation(archive, spec, record)
            return None
        case records.Evidence():
            _require_office(archive, applicant, Role.AUDITOR)
            _admit_evidence(archive, spec, applicant, record)
            return None
        case records.Verdict():
            _require_office(archive, applicant, Role.AUDITOR)
            _admit_verdict(archive, applicant, record)
            return None
        case records.PartVerdict():
            _require_office(archive, applicant, Role.AUDITOR)
            _admit_part_verdict(archive, applicant, record)
            return None
        case records.Equivocation():
            _require_standing_or_office(archive, applicant)
            _admit_equivocation(archive, record)
            return None
        case _:
            raise RefusedError(f"only the coordinator signs a {record.kind}", status=403, code="not-yours")


def _admit_registration(archive: Archive, applicant: Applicant, record: records.Registration) -> None:
    if record.protocol != PROTOCOL_VERSION:
        _refuse(
            426,
            "upgrade",
            f"this run speaks protocol {PROTOCOL_VERSION} and your node protocol {record.protocol}; "
            f"run: {UPGRADE_COMMAND}",
        )
    node = archive.node(applicant.key)
    if node is not None and node.ended_reason is not None:
        _refuse(403, "standing-ended", f"this identity can take no further part in the run: {node.ended_reason}")


def _admit_ready(
    archive: Archive, spec: RunSpec, state: State, applicant: Applicant, record: records.Ready
) -> NodeReady:
    if state.phase is Phase.FINISHED:
        _refuse(410, "run-finished", finished(state))
    if record.round < state.round:
        _refuse(409, "closed", f"round {record.round} is over; this is round {state.round}")
    if record.round > state.round and not (record.round == state.round + 1 and state.phase is Phase.OPENING):
        _refuse(409, "early", f"round {record.round} has no checkpoint yet; this is round {state.round}")
    base = state.base if record.round == state.round else state.root
    if record.base != base:
        expected = "" if base is None else base.hex()
        _refuse(409, "wrong-base", f"round {record.round} starts from checkpoint {expected}; fetch it first")
    node = archive.node(applicant.key)
    assert node is not None
    return NodeReady(
        applicant.key,
        record.round,
        record.base,
        record.tokens_per_s,
        record.can_reduce,
        max(node.accepted, spec.exchange.weight_after) if node.invited else node.accepted,
        record.upload_bytes_per_s,
        trusted=node.vouched_tokens // spec.standard_tokens >= spec.audit.probation,
        since=node.leaf,
    )


def finished(state: State) -> str:
    """What somebody is told who comes after the end."""
    return f"the run has finished: {state.stopping or ALL_DONE}; thank you"


def _admit_commitment(
    archive: Archive, spec: RunSpec, state: State, applicant: Applicant, record: records.Commitment
) -> Committed:
    _require_phase(state, record, Phase.TRAINING)
    _require_slot(state, applicant, record.slot)
    stored = archive.round(state.round)
    if stored is None or record.plan != stored.plan:
        _refuse(422, "wrong-plan", f"the commitment names another plan than that of round {state.round}")
    tokens = state.roster[record.slot].steps * spec.tokens_per_step
    if record.tokens != tokens:
        _refuse(422, "wrong-tokens", f"slot {record.slot} trains on {tokens} tokens, not {record.tokens}")
    if record.slot in state.commitments:
        _refuse(409, "already-committed", f"slot {record.slot} has committed to a contribution already")
    return Committed(record.slot, record.hash)


def _admit_sketches(archive: Archive, state: State, applicant: Applicant, record: records.Sketches) -> None:
    _require_sketching(state, record)
    _require_slot(state, applicant, record.slot)
    commitment = _commitment(archive, state, record.slot)
    if state.sketch_set is not None:
        _refuse(409, "closed", f"the sketches of round {state.round} are closed")
    stored = archive.round(state.round)
    assert stored is not None
    assert stored.commitment_set is not None
    try:
        sketching.require_for(record, stored.commitment_set, commitment)
    except InvalidDataError as error:
        _refuse(422, "wrong-sketches", str(error))


def _admit_objection(
    archive: Archive, spec: RunSpec, state: State, applicant: Applicant, record: records.SketchObjection
) -> None:
    _require_sketching(state, record)
    _require_reducer(state, applicant)
    if record.part >= state.policy.parts or record.sequence != record.part * records.MAX_SLOTS + record.slot:
        _refuse(422, "wrong-part", f"a run of {state.policy.parts} parts, and a sequence made of part and slot")
    commitment = _commitment(archive, state, record.slot)
    try:
        sketching.require_committed(spec, record, commitment)
    except InvalidDataError as error:
        _refuse(422, "wrong-part", f"not a part that slot {record.slot} committed to: {error}")


def _admit_sketch_set(archive: Archive, state: State, record: records.SketchSet) -> Sketched:
    _require_sketching(state, record)
    stored = archive.round(state.round)
    if stored is None or record.commitment_set != stored.commitment_set:
        _refuse(422, "wrong-commitment-set", "the sketch set names another commitment set than this round's")
    counted, excluded = [one.slot for one in record.counted], [one.slot for one in record.excluded]
    selected = tuple(one.slot for one in record.selected)
    ascending = all(slots == sorted(set(slots)) for slots in (counted, excluded, list(selected)))
    candidates = list(sketching.candidates(state.roster, state.committed))
    if not ascending or sorted(counted + excluded) != candidates or not set(selected) <= set(counted):
        _refuse(
            422, "wrong-slots", "a sketch set counts or excludes each slot with weight, and selects from the counted"
        )
    if record.sequence != 0 or state.sketch_set is not None:
        _refuse(409, "closed", f"the sketches of round {state.round} are closed already")
    for one in record.counted:
        known = archive.find(records.Sketches.kind, state.round, one.slot, state.roster[one.slot].peer)
        if known is None or known.hash != one.hash:
            _refuse(422, "unknown-record", f"no sketches {one.hash.hex()} of slot {one.slot} came in")
    return Sketched(record.hash, selected)


def _admit_part_record(
    archive: Archive, spec: RunSpec, state: State, applicant: Applicant, record: records.PartRecord
) -> PartPublished:
    _require_phase(state, record, Phase.EXCHANGING)
    _require_reducer(state, applicant)
    if record.part >= state.policy.parts or record.sequence != record.part:
        _refuse(422, "wrong-part", f"a run of {state.policy.parts} parts, and a record whose sequence is its part")
    stored = archive.round(state.round)
    if stored is None or record.commitment_set != stored.commitment_set:
        _refuse(422, "wrong-commitment-set", "the part record names another commitment set than this round's")
    if state.needs_sketches and state.sketch_set is None:
        _refuse(409, "early", f"an average of round {state.round} comes after its sketch set")
    if list(record.slots) != sorted(set(record.slots)) or not set(record.slots) <= set(state.averaged):
        _refuse(422, "wrong-slots", "slots of a part record are ascending, each once, have committed, and are selected")
    size_bytes = parts.encoded_part_bytes(spec, record.part)
    if record.size_bytes != size_bytes:
        _refuse(422, "wrong-size", f"part {record.part} has {size_bytes} encoded bytes, not {record.size_bytes}")
    return PartPublished(record.hash, record.part, applicant.key, record.slots)


def _admit_part_held(state: State, record: records.PartHeld) -> PartHeld:
    _require_phase(state, record, Phase.EXCHANGING)
    if all(average.record_hash != record.part_record for average in state.averages):
        _refuse(422, "unknown-record", f"no part record {record.part_record.hex()} was published in this round")
    return PartHeld(record.part_record)


def _admit_report(state: State, record: records.CheckpointReport) -> Rooted:
    _require_phase(state, record, Phase.SEALING)
    if record.base != state.base or record.parts != state.parts:
        _refuse(
            422, "wrong-parts", f"round {state.round} is sealed with another base or other parts; ask for them again"
        )
    return Rooted(record.parts, record.root)


def _admit_opening(archive: Archive, state: State, applicant: Applicant, record: records.NonceOpening) -> Opened:
    _require_phase(state, record, Phase.OPENING)
    _require_slot(state, applicant, record.slot)
    committed = state.commitments.get(record.slot)
    if committed is None:
        _refuse(422, "not-committed", f"slot {record.slot} has no commitment in round {state.round}")
    if nonce_hash(record.nonce) != archive.stored(records.Commitment, committed).nonce_hash:
        _refuse(422, "wrong-nonce", "this is not the nonce that the commitment hashed")
    if record.slot in state.openings:
        _refuse(409, "already-opened", f"slot {record.slot} has opened its nonce already")
    return Opened(record.slot, record.nonce)


def _admit_evaluation(archive: Archive, spec: RunSpec, record: records.Evaluation) -> None:
    before = archive.round(record.round - 1) if record.round else None
    root = None if before is None else before.root
    if record.root != (bytes.fromhex(spec.checkpoint) if record.round == 0 else root):
        _refuse(422, "unknown-checkpoint", f"round {record.round} does not start from this checkpoint")


def _admit_evidence(archive: Archive, spec: RunSpec, applicant: Applicant, record: records.Evidence) -> None:
    audit = archive.audit(record.round, record.slot, CONTRIBUTION if record.part is None else record.part)
    if audit is not None and audit.peer == applicant.key:
        _refuse(403, "own-contribution", "nobody judges what they did themselves")
    if audit is None or record.sequence != record.sequence_of(record.slot, record.part):
        _refuse(422, "no-audit", "this was not drawn, or the sequence is not that of slot and part")
    if record.audited != audit.audited:
        _refuse(422, "wrong-record", "the evidence names another record than the one that was drawn")
    if audit.outcome is not None or applicant.key in archive.verdicts(audit):
        _refuse(409, "closed", "this audit wants no evidence of this auditor any more")
    stored = archive.round(record.round)
    assert stored is not None
    most = evidence.max_bytes(spec, stored.slots, record.part)
    try:
        evidence.sizes(record)
    except InvalidDataError as error:
        _refuse(422, "bad-evidence", str(error))
    if evidence.size_bytes(record) > most:
        _refuse(422, "too-much", f"the evidence of such an audit has at most {most} bytes")


def _require_evidence(archive: Archive, applicant: Applicant, record: records.Verdict | records.PartVerdict) -> None:
    """Only a rejection has evidence, and its own."""
    if record.evidence is None:
        return
    part = record.part if isinstance(record, records.PartVerdict) else None
    sequence = records.Evidence.sequence_of(record.slot, part)
    known = archive.find(records.Evidence.kind, record.round, sequence, applicant.key)
    if record.outcome is not records.Outcome.REJECTED or known is None or known.hash != record.evidence:
        _refuse(422, "unknown-evidence", "a rejection names evidence that its auditor handed in before, for this audit")


def _admit_verdict(archive: Archive, applicant: Applicant, record: records.Verdict) -> None:
    audit = archive.audit(record.round, record.slot)
    if audit is not None and audit.peer == applicant.key:
        _refuse(403, "own-contribution", "nobody judges a contribution of their own")
    if audit is None or record.sequence != record.slot:
        _refuse(
            422, "no-audit", f"slot {record.slot} of round {record.round} was not drawn; sequence and slot are equal"
        )
    if record.commitment != audit.audited:
        _refuse(422, "wrong-commitment", "the verdict names another commitment than the one that was drawn")
    _require_evidence(archive, applicant, record)


def _admit_part_verdict(archive: Archive, applicant: Applicant, record: records.PartVerdict) -> None:
    audit = archive.audit(record.round, record.slot, record.part)
    if audit is not None and audit.peer == applicant.key:
        _refuse(403, "own-average", "nobody judges an average of their own")
    if audit is None or record.sequence != record.part:
        _refuse(
            422,
            "no-audit",
            f"part {record.part} of round {record.round}, reduced by slot {record.slot}, was not drawn; sequence and part "
            "are equal",
        )
    if record.part_record != audit.audited:
        _refuse(422, "wrong-record", "the verdict names another part record than the one that was drawn")
    _require_evidence(archive, applicant, record)


def _admit_equivocation(archive: Archive, record: records.Equivocation) -> None:
    try:
        proved = equivocation.proved_by(record)
    except InvalidDataError as error:
        _refuse(422, "no-proof", f"these two records prove nothing: {error}")
    if archive.node(proved.key) is None:
        _refuse(422, "unknown-node", "they are signed by nobody who takes part in this run")
    if archive.equivocated(proved.key):
        _refuse(409, "closed", "this identity's equivocation is known already")


def _require_standing_or_office(archive: Archive, applicant: Applicant) -> None:
    if not any(archive.holds_office(applicant.key, role) for role in Role):
        _require_standing(archive, applicant)


def _require_standing(archive: Archive, applicant: Applicant) -> None:
    node = archive.node(applicant.key)
    if node is None:
        _refuse(403, "not-registered", "this identity has not registered in the run; join it first")
    if node.ended_reason is not None:
        _refuse(403, "standing-ended", f"this identity can take no further part in the run: {node.ended_reason}")


def _require_office(archive: Archive, applicant: Applicant, role: Role) -> None:
    if not archive.holds_office(applicant.key, role):
        _refuse(403, "not-appointed", f"only an appointed {role} signs this record")


def _require_phase(state: State, record: Record, phase: Phase) -> None:
    if record.round == state.round and state.phase is phase:
        return
    where = f"round {state.round} is {state.phase}"
    if (record.round, _ORDER.index(phase)) < (state.round, _ORDER.index(state.phase)):
        _refuse(409, "closed", f"too late for a {record.kind} of round {record.round}: {where}")
    _refuse(409, "early", f"too early for a {record.kind} of round {record.round}: {where}")


def _require_slot(state: State, applicant: Applicant, slot: int) -> None:
    if slot >= len(state.roster) or state.roster[slot].peer != applicant.key:
        _refuse(403, "not-your-slot", f"slot {slot} of round {state.round} is not this node's")


def _require_reducer(state: State, applicant: Applicant) -> None:
    slot = state.slot_of(applicant.key)
    if slot is None or not state.roster[slot].reducer:
        _refuse(403, "no-reducer", f"the plan of round {state.round} does not name this node as a reducer")
    if slot not in state.commitments:
        _refuse(403, "no-reducer", f"this node committed to nothing in round {state.round}, so it averages nothing")


def _require_sketching(state: State, record: Record) -> None:
    _require_phase(state, record, Phase.EXCHANGING)
    if not state.needs_sketches:
        _refuse(422, "no-sketches", f"the averages of round {state.round} need no sketches")


def _commitment(archive: Archive, state: State, slot: int) -> records.Commitment:
    committed = state.commitments.get(slot)
    if committed is None:
        _refuse(422, "not-committed", f"slot {slot} has no commitment in round {state.round}")
    return archive.stored(records.Commitment, committed)


def _refuse(status: int, code: str, reason: str) -> NoReturn:
    raise RefusedError(reason, status=status, code=code)
