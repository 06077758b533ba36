"""One transaction's work: records are appended, events applied, and what follows from them is signed and appended too.

Nothing leaves before the commit: an `Entry` collects the topics to wake, and its state replaces the old one afterwards. A
record of the coordinator is signed in the same transaction as the event that caused it, so that after a crash it either is
there or was never sent: no signature is ever remade.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from swarm_coordinator import evaluations
from swarm_coordinator.books import Books
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.machine_codec import encode_event, encode_state
from swarm_coordinator.db.tables import (
    CONTRIBUTION,
    MOOT,
    AuditRow,
    EquivocationRow,
    EventRow,
    NodeRow,
    OfficeRow,
    RecordRow,
    RoundRow,
    SnapshotRow,
    VerdictRow,
)
from swarm_coordinator.round_events import (
    Effect,
    Event,
    Finish,
    NodeGone,
    PublishCommitmentSet,
    PublishManifest,
    PublishPlan,
    RequestRoot,
    RevealBeacon,
)
from swarm_coordinator.rounds import Phase, State, advance
from swarm_protocol import encoding, equivocation
from swarm_protocol.draw import Drawable, chain_value, drawn, drawn_parts
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.identity import Identity, peer_id
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.policy import acceptances_needed, resolve
from swarm_protocol.records import (
    Addresses,
    Appointment,
    BeaconReveal,
    CheckpointReport,
    Commitment,
    CommitmentSet,
    Envelope,
    Equivocation,
    Evaluation,
    PartHeld,
    PartVerdict,
    Ready,
    Record,
    Registration,
    Role,
    RoundManifest,
    RoundPlan,
    SlotHash,
    SlotNonce,
    Verdict,
)
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

UNLOGGED = (Ready, Addresses, PartHeld, CheckpointReport)
"""Heartbeats, addresses and the checkpoint worker's messages to the coordinator: everything else is a leaf of the log."""


@dataclass(frozen=True)
class Office:
    """What the coordinator signs and reveals with."""

    spec: RunSpec
    identity: Identity
    beacon_seed: bytes


class Entry:
    """Work in progress. Its log is the journal's own: who rolls back has to load it anew."""

    def __init__(self, session: Session, office: Office, state: State, log: Log, now_ms: int) -> None:
        self.archive = Archive(session, office.spec.run_id)
        self._books = Books(session, self.archive, office.spec.audit)
        self.state = state
        self.topics: set[str] = set()
        self._session = session
        self._office = office
        self._log = log
        self._now_ms = now_ms
        self._run = office.spec.run_id

    def append(self, envelope: Envelope, record: Record) -> RecordRow:
        """Store a record, as a leaf of the log unless it is one of `UNLOGGED`."""
        data = envelope.encode()
        leaf = None if isinstance(record, UNLOGGED) else self._log.append(leaf_hash(data))
        row = RecordRow(
            run=self._run,
            kind=record.kind,
            round=record.round,
            sequence=record.sequence,
            signer=envelope.key,
            hash=record.hash,
            envelope=data,
            leaf=leaf,
            received_ms=self._now_ms,
        )
        self._session.add(row)
        self._session.flush()
        if isinstance(record, Evaluation):
            evaluations.note(self._session, self._run, record)
        return row

    def heard(self, key: bytes) -> None:
        """Note that a node is alive."""
        node = self.archive.node(key)
        if node is not None:
            node.last_seen_ms = self._now_ms

    def register(self, key: bytes, record: Registration) -> None:
        """Note what a node says of itself; its newest registration counts."""
        node = self.archive.node(key)
        if node is None:
            node = NodeRow(
                run=self._run,
                key=key,
                registered_ms=self._now_ms,
                contributions=0,
                accepted=0,
                rejected=0,
                unavailable=0,
            )
            self._session.add(node)
        node.name, node.agent, node.device = record.name, record.agent, record.device
        node.fingerprint, node.last_seen_ms = record.fingerprint, self._now_ms

    def appoint(self, role: Role, key: bytes) -> None:
        """Give a key an office, by a signed record."""
        sequence = self._session.scalar(select(func.count()).select_from(OfficeRow).filter_by(run=self._run)) or 0
        self._sign(Appointment(run=self._run, round=0, sequence=sequence, role=role, key=key))
        self._session.add(OfficeRow(run=self._run, key=key, role=role.value))

    def note_verdict(self, auditor: bytes, verdict: Verdict | PartVerdict) -> None:
        """Count a verdict; once an audit is resolved its outcome stays, and may end the node's standing."""
        part = verdict.part if isinstance(verdict, PartVerdict) else CONTRIBUTION
        audit = self.archive.audit(verdict.round, verdict.slot, part)
        assert audit is not None
        row = VerdictRow(
            run=self._run,
            round=verdict.round,
            slot=verdict.slot,
            part=part,
            auditor=auditor,
            outcome=verdict.outcome.value,
            reason=verdict.reason,
        )
        if isinstance(verdict, Verdict):
            row.comparison, row.statistic = verdict.comparison and verdict.comparison.value, verdict.statistic
        self._session.add(row)
        self._session.flush()
        self.topics.add("audits")
        if audit.outcome is not None:
            return
        outcome = resolve(
            self.archive.verdicts(audit),
            len(set(self.archive.offices(Role.AUDITOR)) - {audit.peer}),
            self._office.spec.audit,
            acceptances=acceptances_needed(audit.audited),
        )
        if outcome is None:
            return
        reason = self._books.resolved(audit, outcome, verdict.reason)
        if reason is not None:
            self.archive.drop_audits(audit.peer)
            self.apply(NodeGone(audit.peer))
        self._settle()

    def expose(self, first: Envelope, second: Envelope) -> None:
        """Sign, store and act on the proof that somebody signed both of these, once; heartbeats prove nothing."""
        try:
            proved = equivocation.prove(first, second, run=self._run)
        except InvalidDataError:
            return
        if self.archive.equivocated(proved.key):
            return
        sequence = self.archive.count(Equivocation.kind, self._office.identity.public_key)
        report = Equivocation(
            run=self._run, round=proved.round, sequence=sequence, first=first.encode(), second=second.encode()
        )
        self._sign(report)
        self.note_equivocation(report)

    def note_equivocation(self, report: Equivocation) -> None:
        """End the standing of the key that a stored report proves to have signed two records under one name."""
        proved = equivocation.proved_by(report)
        self._session.add(EquivocationRow(run=self._run, key=proved.key, report=report.hash))
        node = self.archive.node(proved.key)
        log.warning("%s %s; the proof is record %s", peer_id(proved.key), proved.what, report.hash.hex())
        if node is not None and node.ended_reason is None:
            self._end_standing(node, proved.what)

    def _end_standing(self, node: NodeRow, reason: str) -> None:
        node.ended_reason = reason
        self._books.ended(node.key, reason)
        self.archive.drop_audits(node.key)
        self.apply(NodeGone(node.key))

    def apply(self, event: Event) -> None:
        """Store an event, advance the rounds by it, and do what follows."""
        before = self.state
        seq = self._session.scalar(select(func.max(EventRow.seq)).filter_by(run=self._run)) or 0
        self._session.add(
            EventRow(run=self._run, seq=seq + 1, round=before.round, at_ms=self._now_ms, payload=encode_event(event))
        )
        self.state, effects = advance(before, event, self._now_ms)
        for effect in effects:
            self._carry_out(effect)
        if self.state.round != before.round:
            self._snapshot(seq + 1)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case PublishPlan():
                self._publish_plan(effect)
            case PublishCommitmentSet():
                self._publish_commitment_set(effect)
            case RequestRoot():
                row = self._round(effect.round)
                row.parts = encoding.encode(effect.parts)
                row.missing_parts = effect.parts.count(None)
                self.topics |= {f"sealing:{effect.round}", f"part-records:{effect.round}"}
            case PublishManifest():
                self._publish_manifest(effect)
            case RevealBeacon():
                self._reveal(effect)
            case Finish():
                self._settle()
                self.topics.add(f"plan:{self.state.round}")

    def _publish_plan(self, effect: PublishPlan) -> None:
        previous = self.archive.round(effect.round - 1) if effect.round else None
        beacon = previous.beacon if previous is not None else bytes.fromhex(self._office.spec.beacon)
        assert beacon is not None
        plan = RoundPlan(
            run=self._run,
            round=effect.round,
            base=effect.base,
            roster=effect.roster,
            cursor=effect.cursor,
            commit_by_ms=effect.commit_by_ms,
            exchange_by_ms=effect.exchange_by_ms,
            previous_beacon=beacon,
            log_size=self._log.size,
            log_root=self._log.root(),
        )
        self._sign(plan)
        self._session.add(
            RoundRow(
                run=self._run,
                round=effect.round,
                slots=len(effect.roster),
                plan=plan.hash,
                vouched=encoding.encode([self._books.vouched_tokens(seat.peer) for seat in plan.roster]),
                committed=0,
                missing_parts=0,
            )
        )
        self.topics.add(f"plan:{effect.round}")

    def _publish_commitment_set(self, effect: PublishCommitmentSet) -> None:
        row = self._round(effect.round)
        entries = tuple(SlotHash(slot=slot, hash=digest) for slot, digest in effect.commitments)
        closing = CommitmentSet(run=self._run, round=effect.round, plan=row.plan, commitments=entries)
        self._sign(closing)
        row.commitment_set, row.committed = closing.hash, len(entries)
        for slot, _ in effect.commitments:
            node = self.archive.node(self.state.roster[slot].peer)
            if node is not None:
                node.contributions += 1
        self.topics.add(f"commitments:{effect.round}")

    def _publish_manifest(self, effect: PublishManifest) -> None:
        row = self._round(effect.round)
        assert row.commitment_set is not None
        manifest = RoundManifest(
            run=self._run,
            round=effect.round,
            plan=row.plan,
            commitment_set=row.commitment_set,
            sketches=effect.sketch_set,
            parts=effect.parts,
            base=effect.base,
            root=effect.root,
        )
        self._sign(manifest)
        row.manifest, row.root = manifest.hash, manifest.root
        self._books.credit(self.archive.stored(RoundPlan, row.plan), self._contributions(row))
        self._settle()
        self.topics.add(f"manifest:{effect.round}")

    def _reveal(self, effect: RevealBeacon) -> None:
        row = self._round(effect.round)
        assert row.manifest is not None
        spec = self._office.spec
        reveal = BeaconReveal(
            run=self._run,
            round=effect.round,
            value=chain_value(self._office.beacon_seed, effect.round, spec.rounds.count),
            manifest=row.manifest,
            openings=tuple(SlotNonce(slot=slot, nonce=nonce) for slot, nonce in effect.openings),
        )
        self._sign(reveal)
        row.beacon = reveal.value
        plan = self.archive.stored(RoundPlan, row.plan)
        contributions = self._contributions(row)
        candidates = self._candidates(row, plan, contributions)
        chosen = drawn(spec.audit, spec.standard_tokens, reveal, candidates)
        for slot, commitment in contributions.items():
            if slot in chosen:
                self._open_audit(plan, slot, CONTRIBUTION, commitment.hash, chosen[slot])
            elif self._vouched(row)[slot] // spec.standard_tokens < spec.audit.probation:
                self._books.unaudited(effect.round, slot)
        self._draw_parts(row, plan, reveal, candidates)
        self.topics |= {f"beacon:{effect.round}", "audits"}

    def _draw_parts(self, row: RoundRow, plan: RoundPlan, reveal: BeaconReveal, candidates: list[Drawable]) -> None:
        """Open an audit for each average of the manifest that is drawn."""
        spec, vouched = self._office.spec, self._vouched(row)
        names = self.archive.stored(RoundManifest, reveal.manifest).parts
        slots: dict[int, int] = {}
        for part, name in enumerate(names):
            stored = None if name is None else self.archive.by_hash(name)
            slot = None if stored is None else plan.slot_of(stored.signer)
            if slot is not None:
                slots[part] = slot
        reducers = {part: vouched[slot] for part, slot in slots.items()}
        for part in drawn_parts(spec.audit, spec.standard_tokens, reveal, candidates, reducers):
            audited = names[part]
            assert audited is not None
            self._open_audit(plan, slots[part], part, audited, ())

    def _open_audit(self, plan: RoundPlan, slot: int, part: int, audited: bytes, segments: Iterable[int]) -> None:
        peer = plan.roster[slot].peer
        node = self.archive.node(peer)
        self._session.add(
            AuditRow(
                run=self._run,
                round=plan.round,
                slot=slot,
                part=part,
                peer=peer,
                audited=audited,
                segments=encoding.encode(list(segments)),
                outcome=None if node is None or node.ended_reason is None else MOOT,
            )
        )

    def _candidates(self, row: RoundRow, plan: RoundPlan, contributions: dict[int, Commitment]) -> list[Drawable]:
        vouched = self._vouched(row)
        return [
            Drawable(
                slot=slot,
                nonce_hash=commitment.nonce_hash,
                tokens=commitment.tokens,
                segments=len(self._office.spec.segments(plan.roster[slot].steps)),
                vouched_tokens=vouched[slot],
            )
            for slot, commitment in contributions.items()
        ]

    def _vouched(self, row: RoundRow) -> list[int]:
        """What audits had vouched for when the round was planned, by slot."""
        found = encoding.decode(row.vouched, max_bytes=1 << 20)
        assert isinstance(found, list)
        return [int(tokens) for tokens in found if isinstance(tokens, int)]

    def _settle(self) -> None:
        sealed = self.archive.last_sealed()
        if sealed is not None:
            self._books.settle(sealed.round, finished=self.state.phase is Phase.FINISHED)

    def _contributions(self, row: RoundRow) -> dict[int, Commitment]:
        assert row.commitment_set is not None
        closing = self.archive.stored(CommitmentSet, row.commitment_set)
        return {entry.slot: self.archive.stored(Commitment, entry.hash) for entry in closing.commitments}

    def _round(self, number: int) -> RoundRow:
        row = self.archive.round(number)
        assert row is not None
        return row

    def _sign(self, record: Record) -> None:
        self.append(Envelope.sign(self._office.identity, record), record)

    def _snapshot(self, seq: int) -> None:
        """Keep the state at the start of a round; what only earlier states were made of is not needed any more."""
        number = self.state.round
        self._session.add(SnapshotRow(run=self._run, round=number, seq=seq, state=encode_state(self.state)))
        older = select(func.max(SnapshotRow.seq)).filter(SnapshotRow.run == self._run, SnapshotRow.round < number)
        self._session.execute(
            delete(EventRow).where(EventRow.run == self._run, EventRow.seq <= older.scalar_subquery())
        )
        passing = [Ready.kind, PartHeld.kind]
        self._session.execute(
            delete(RecordRow).where(RecordRow.run == self._run, RecordRow.kind.in_(passing), RecordRow.round < number)
        )
