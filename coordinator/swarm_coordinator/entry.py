"""One transaction's work: records are appended, events applied, and what follows from them is signed and appended too.

Nothing leaves before the commit: an `Entry` collects the topics to wake, and its state replaces the old one afterwards. A
record of the coordinator is signed in the same transaction as the event that caused it, so that after a crash it either is
there or was never sent: no signature is ever remade.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from swarm_coordinator import evaluations, kept_evidence
from swarm_coordinator.books import Books, Cause
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.machine_codec import encode_state
from swarm_coordinator.db.tables import (
    CONTRIBUTION,
    AuditRow,
    EquivocationRow,
    EventRow,
    InviteRow,
    NodeRow,
    OfficeRow,
    RecordRow,
    RoundRow,
    SnapshotRow,
    VerdictRow,
)
from swarm_coordinator.db.writing import Stored, Writing
from swarm_coordinator.draws import Draws
from swarm_coordinator.round_events import (
    Effect,
    Event,
    Finish,
    NodeGone,
    NodeReady,
    PublishCommitmentSet,
    PublishManifest,
    PublishPlan,
    RequestRoot,
    RevealBeacon,
    Seen,
)
from swarm_coordinator.rounds import State, advance, repeats
from swarm_protocol import encoding, equivocation
from swarm_protocol.draw import chain_value
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.identity import Identity, peer_id
from swarm_protocol.layout import checkpoint_manifest, parent_of_first
from swarm_protocol.log import Log
from swarm_protocol.policy import acceptances_needed, resolve
from swarm_protocol.records import (
    Addresses,
    Appointment,
    Ban,
    BeaconReveal,
    CheckpointManifest,
    CheckpointReport,
    Commitment,
    CommitmentSet,
    Dismissal,
    Envelope,
    Equivocation,
    Evaluation,
    Evidence,
    PartHeld,
    PartVerdict,
    Ready,
    Record,
    Registration,
    Role,
    RoundManifest,
    RoundPlan,
    RunEnd,
    SlotHash,
    SlotNonce,
    Verdict,
    parse,
)
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

UNLOGGED = (Ready, Addresses, PartHeld, CheckpointReport, Evidence)
"""Heartbeats, addresses, the checkpoint worker's messages to the coordinator, and evidence, which verdicts name by its hash:
everything else is a leaf of the log."""


@dataclass(frozen=True)
class Office:
    """What the coordinator signs and reveals with."""

    spec: RunSpec
    identity: Identity
    beacon_seed: bytes
    contributions: dict[bytes, dict[int, Commitment]] = field(default_factory=dict, repr=False)
    """Those of the newest CommitmentSet that was looked at, by its hash: they are looked at twice."""


class Entry:
    """Work in progress. Its log is the journal's own: who rolls back has to load it anew."""

    def __init__(self, session: Session, office: Office, state: State, log: Log, seq: int, now_ms: int) -> None:
        self.archive = Archive(session, office.spec.run_id)
        self._books = Books(session, self.archive, office.spec, self._sign)
        self.state = state
        self.topics: set[str] = set()
        self.heard: set[bytes] = set()
        self._session = session
        self._office = office
        self._log = log
        self.now_ms = now_ms
        self._run = office.spec.run_id
        self._writing = Writing(session, self._run, log, seq, now_ms)
        self._seen: list[bytes] = []

    @property
    def spec(self) -> RunSpec:
        return self._office.spec

    @property
    def seq(self) -> int:
        """The newest event's."""
        return self._writing.seq

    def finish(self) -> None:
        """Write what is still to be written: the transaction ends."""
        self._note_seen()
        self.flush()
        if self._writing.grew:
            self.topics.add("log")

    def flush(self) -> None:
        """Let queries find the records that were added."""
        self._writing.flush()

    def find(self, record: Record, signer: bytes) -> Stored | None:
        """The one record under this record's name, if there is one."""
        name = (record.kind, record.round, record.sequence, signer)
        added = self._writing.find(name)
        if added is not None:
            return added
        row = self.archive.find(*name)
        return None if row is None else Stored.of(row)

    def append(self, envelope: Envelope, record: Record) -> Stored:
        """Store a record, as a leaf of the log unless it is one of `UNLOGGED`; others than our own get a receipt."""
        identity = self._office.identity
        if isinstance(record, Evaluation):
            evaluations.note(self._session, self._run, record)
        return self._writing.record(
            envelope,
            record,
            logged=not isinstance(record, UNLOGGED),
            signer=None if envelope.key == identity.public_key else identity,
            due_round=self.state.round + 1,
        )

    def begin(self) -> None:
        """Sign the manifest of checkpoint 0, once."""
        spec, key = self._office.spec, self._office.identity.public_key
        if self.archive.find(CheckpointManifest.kind, 0, 0, key) is None:
            self._sign(checkpoint_manifest(spec, 0, bytes.fromhex(spec.checkpoint), parent_of_first(spec)))

    def present(self, event: NodeReady) -> None:
        """A node is here: if it says nothing else, this is noted together with others'."""
        self.heard.add(event.peer)
        if repeats(self.state, event):
            self._seen.append(event.peer)
        else:
            self.apply(event)

    def register(self, key: bytes, record: Registration, leaf: int, invite: InviteRow | None) -> None:
        """Note what a node says of itself; its newest registration counts, but the leaf of its first one.

        An invitation is used up by it, and makes the node an invited one.
        """
        self.heard.add(key)
        node = self.archive.node(key)
        if node is None:
            node = NodeRow(
                run=self._run,
                key=key,
                registered_ms=self.now_ms,
                leaf=leaf,
                contributions=0,
                accepted=0,
                rejected=0,
                unavailable=0,
            )
            self.archive.add_node(node)
        if invite is not None:
            invite.used += 1
            node.invited = True
        node.name, node.agent, node.device = record.name, record.agent, record.device
        node.fingerprint, node.last_seen_ms = record.fingerprint, self.now_ms
        node.team = record.team

    def appoint(self, role: Role, key: bytes) -> None:
        """Give a key an office, by a signed record."""
        sequence = self.archive.count(Appointment.kind, self._office.identity.public_key)
        self._sign(Appointment(run=self._run, round=0, sequence=sequence, role=role, key=key))
        self._session.add(OfficeRow(run=self._run, key=key, role=role.value))

    def dismiss(self, key: bytes, reason: str) -> bool:
        """Take an auditor's office back, by a signed record, and resolve open audits without it; False for no auditor."""
        if not self.archive.holds_office(key, Role.AUDITOR):
            return False
        sequence = self.archive.count(Dismissal.kind, self._office.identity.public_key)
        cause = Cause.of(self._sign(Dismissal(run=self._run, round=0, sequence=sequence, key=key, reason=reason)))
        self.archive.end_office(key, Role.AUDITOR)
        self._resolve(self.archive.unresolved(), reason, cause)
        self.topics.add("audits")
        return True

    def note_evidence(self, auditor: bytes, record: Evidence) -> None:
        """Pin the objects that stored evidence names."""
        kept_evidence.note(self._session, self._run, auditor, record)

    def note_verdict(self, auditor: bytes, verdict: Verdict | PartVerdict, stored: Stored) -> None:
        """Count a stored verdict; once an audit is resolved its outcome stays, and may end the node's standing."""
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
            evidence=verdict.evidence,
        )
        if isinstance(verdict, Verdict):
            row.comparison, row.statistic = verdict.comparison and verdict.comparison.value, verdict.statistic
        self._session.add(row)
        self._session.flush()
        self.topics.add("audits")
        self._resolve([audit], verdict.reason, Cause.of(stored))

    def _resolve(self, audits: Iterable[AuditRow], reason: str, cause: Cause) -> None:
        """Give an outcome to those that have none, and verdicts enough of who is an auditor now; do what follows."""
        auditors = set(self.archive.offices(Role.AUDITOR))
        resolved, gone = False, list[bytes]()
        for audit in audits:
            if audit.outcome is not None:
                continue
            counted = {key: outcome for key, outcome in self.archive.verdicts(audit).items() if key in auditors}
            others, acceptances = len(auditors - {audit.peer}), acceptances_needed(audit.audited)
            outcome = resolve(counted, others, self._office.spec.audit, acceptances=acceptances)
            if outcome is None:
                continue
            resolved = True
            if self._books.resolved(audit, outcome, reason, cause) is not None:
                self.archive.drop_audits(audit.peer)
                gone.append(audit.peer)
        if resolved:
            self._books.settle(cause)
            self._state_if_ended()
        for peer in gone:
            self.apply(NodeGone(peer))

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
        self.note_equivocation(report, self._sign(report))

    def note_equivocation(self, report: Equivocation, stored: Stored) -> None:
        """End the standing of the key that a stored report proves to have signed two records under one name."""
        proved = equivocation.proved_by(report)
        self._session.add(EquivocationRow(run=self._run, key=proved.key, report=report.hash))
        node = self.archive.node(proved.key)
        log.warning("%s %s; the proof is record %s", peer_id(proved.key), proved.what, report.hash.hex())
        if node is not None and node.ended_reason is None:
            self._end_standing(node, proved.what, Cause.of(stored))

    def ban(self, key: bytes, reason: str) -> bool:
        """End an identity's standing, by a signed record; False for one that never came or has lost it."""
        node = self.archive.node(key)
        if node is None or node.ended_reason is not None:
            return False
        sequence = self.archive.count(Ban.kind, self._office.identity.public_key)
        stored = self._sign(Ban(run=self._run, round=0, sequence=sequence, key=key, reason=reason))
        self._end_standing(node, reason, Cause.of(stored))
        self.topics.add("audits")
        return True

    def _end_standing(self, node: NodeRow, reason: str, cause: Cause) -> None:
        node.ended_reason = reason
        self._books.forfeit(node.key, reason, cause)
        self.archive.drop_audits(node.key)
        self._state_if_ended()
        self.apply(NodeGone(node.key))

    def apply(self, event: Event) -> None:
        """Store an event, advance the rounds by it, and do what follows."""
        self._note_seen()
        before = self.state
        self._writing.event(event, before.round)
        self.state, effects = advance(before, event, self.now_ms)
        for effect in effects:
            self.flush()
            self._carry_out(effect)
        if self.state.round != before.round:
            self._snapshot(self.seq)

    def _note_seen(self) -> None:
        if self._seen:
            seen, self._seen = tuple(dict.fromkeys(self._seen)), []
            self.apply(Seen(seen))

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
                self._end_run(effect.reason)
                self.topics.add(f"plan:{self.state.round}")

    def _end_run(self, reason: str) -> None:
        """Sign that no round follows, once, and settle what then is due."""
        if self.archive.ended():
            return
        sealed = self.archive.last_sealed()
        number, root = (
            (0, bytes.fromhex(self._office.spec.checkpoint)) if sealed is None else (sealed.round + 1, sealed.root)
        )
        assert root is not None
        stored = self._sign(RunEnd(run=self._run, round=number, root=root, reason=reason))
        self._books.settle(Cause.of(stored))
        self._state_if_ended()

    def _state_if_ended(self) -> None:
        """No plan follows any more that a statement could come before."""
        if self.archive.ended():
            self._books.state()

    def _publish_plan(self, effect: PublishPlan) -> None:
        previous = self.archive.round(effect.round - 1) if effect.round else None
        beacon = previous.beacon if previous is not None else bytes.fromhex(self._office.spec.beacon)
        assert beacon is not None
        self._books.state()
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
        vouched = self.archive.vouched_tokens()
        self._session.add(
            RoundRow(
                run=self._run,
                round=effect.round,
                slots=len(effect.roster),
                plan=plan.hash,
                vouched=encoding.encode([vouched.get(seat.peer, 0) for seat in plan.roster]),
                committed=0,
                missing_parts=0,
                planned_ms=self.now_ms,
            )
        )
        self.topics.add(f"plan:{effect.round}")

    def _publish_commitment_set(self, effect: PublishCommitmentSet) -> None:
        row = self._round(effect.round)
        entries = tuple(SlotHash(slot=slot, hash=digest) for slot, digest in effect.commitments)
        closing = CommitmentSet(run=self._run, round=effect.round, plan=row.plan, commitments=entries)
        self._sign(closing)
        row.commitment_set, row.committed = closing.hash, len(entries)
        peers = [self.state.roster[slot].peer for slot, _ in effect.commitments]
        self.archive.prefetch(peers)
        for peer in peers:
            node = self.archive.node(peer)
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
        cause = Cause.of(self._sign(manifest))
        row.manifest, row.root, row.sealed_ms = manifest.hash, manifest.root, self.now_ms
        self._books.earn(self.archive.stored(RoundPlan, row.plan), self._contributions(row), cause)
        self._books.settle(cause)
        self._sign(checkpoint_manifest(self._office.spec, effect.round + 1, effect.root, effect.base))
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
        cause = Cause.of(self._sign(reveal))
        row.beacon = reveal.value
        draws = Draws(self.archive, spec, row, self._contributions(row), reveal)
        self._books.unaudited(effect.round, draws.open_contributions(), cause)
        draws.open_averages()
        self.topics |= {f"beacon:{effect.round}", "audits"}

    def _contributions(self, row: RoundRow) -> dict[int, Commitment]:
        assert row.commitment_set is not None
        known = self._office.contributions
        if row.commitment_set not in known:
            closing, found = self.archive.stored(CommitmentSet, row.commitment_set), self.archive.commitments(row.round)
            counted = {entry.slot: parse(Envelope.decode(found[entry.hash]).body) for entry in closing.commitments}
            known.clear()
            known[row.commitment_set] = {slot: one for slot, one in counted.items() if isinstance(one, Commitment)}
        return known[row.commitment_set]

    def _round(self, number: int) -> RoundRow:
        row = self.archive.round(number)
        assert row is not None
        return row

    def _sign(self, record: Record) -> Stored:
        stored = self.append(Envelope.sign(self._office.identity, record), record)
        self.flush()
        return stored

    def _snapshot(self, seq: int) -> None:
        """Keep the state at the start of a round; what only earlier states were made of is not needed any more."""
        self.flush()
        number = self.state.round
        self._session.add(SnapshotRow(run=self._run, round=number, seq=seq, state=encode_state(self.state)))
        older = select(func.max(SnapshotRow.seq)).filter(SnapshotRow.run == self._run, SnapshotRow.round < number)
        self._session.execute(
            delete(EventRow).where(EventRow.run == self._run, EventRow.seq <= older.scalar_subquery())
        )
        self._session.execute(
            delete(RecordRow).where(
                RecordRow.run == self._run, RecordRow.kind == PartHeld.kind, RecordRow.round < number
            )
        )
