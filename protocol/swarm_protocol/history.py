"""The run as its log tells it: every draw, what became of it, everybody's account and credit. Pure, no I/O.

`History` takes the log's records in leaf order and does again what the coordinator did with each: it keeps the accounts,
repeats the draws from them, resolves audits by the verdicts, and moves credit (`ledger_history`). What it computes follows
from the log alone, so that anybody can say who had to be audited, and who earned what. It does not show that others see the
same log, nor that nothing was kept out of it before it was acknowledged.
"""

from __future__ import annotations

from dataclasses import replace

from swarm_protocol.equivocation import proved_by
from swarm_protocol.errors import InvalidDataError, SignatureError
from swarm_protocol.identity import peer_id
from swarm_protocol.layout import checkpoint_manifest, parent_of_first
from swarm_protocol.ledger_history import LedgerHistory
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.policy import Account, acceptances_needed, reduction_ruling, resolve, ruling
from swarm_protocol.records import (
    Appointment,
    Ban,
    BeaconReveal,
    CheckpointManifest,
    Commitment,
    CommitmentSet,
    CreditStatement,
    Dismissal,
    Envelope,
    Equivocation,
    Evaluation,
    NonceOpening,
    Outcome,
    PartRecord,
    PartVerdict,
    Record,
    Registration,
    Role,
    RoundManifest,
    RoundPlan,
    RunEnd,
    SketchSet,
    Verdict,
)
from swarm_protocol.round_history import Drawn, Moot, Round
from swarm_protocol.spec import RunSpec

COORDINATORS = (
    Appointment, Dismissal, RoundPlan, CommitmentSet, RoundManifest, CheckpointManifest, BeaconReveal, CreditStatement,
    Ban, RunEnd,
)  # fmt: skip
"""What the coordinator alone may sign."""

DRIVING = (RoundPlan, CommitmentSet, RoundManifest, CheckpointManifest, BeaconReveal)
"""What comes no more once the run has ended."""


class History:
    """`add` the log's records in order. `rounds` are those planned so far, `accounts` those of the registered identities,
    `ledger` is their credit, `checkpoints` the chain of manifests, the first for round 0."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.log = Log()
        self.rounds: list[Round] = []
        self.checkpoints: list[CheckpointManifest] = []
        self.accounts: dict[bytes, Account] = {}
        self.ledger = LedgerHistory(spec)
        self._coordinator = bytes.fromhex(spec.coordinator)
        self._offices: set[tuple[Role, bytes]] = set()
        self._names: set[tuple[str, int, int, bytes]] = set()

    def account(self, key: bytes) -> Account:
        """What the log says of an identity; an empty account for one that it does not know."""
        return self.accounts.get(key, Account())

    def auditors(self) -> set[bytes]:
        """The keys that hold the auditor's office by now."""
        return {key for role, key in self._offices if role is Role.AUDITOR}

    def add(self, envelope: Envelope) -> None:
        """Take the log's next record.

        Raises:
            InvalidDataError: the log contradicts itself, or the spec; says at which leaf, and how. The history ends there.
        """
        try:
            record = envelope.open()
            name = (record.kind, record.round, record.sequence, envelope.key)
            if record.run != self.spec.run_id:
                raise InvalidDataError(f"a {record.kind} of another run")
            if name in self._names:
                raise InvalidDataError(
                    f"a second {record.kind} of round {record.round}, sequence {record.sequence}, by {envelope.peer}"
                )
            self.ledger.expect(record)
            self._note(envelope.key, record)
            self.ledger.close_record()
        except InvalidDataError as error:
            raise InvalidDataError(f"leaf {self.log.size} of the log: {error}") from error
        self._names.add(name)
        self.log.append(leaf_hash(envelope.encode()))

    def _note(self, key: bytes, record: Record) -> None:
        if isinstance(record, COORDINATORS):
            if key != self._coordinator:
                raise SignatureError(f"a {record.kind} by {peer_id(key)}, who is not the run's coordinator")
            self._note_coordinators(record)
            return
        match record:
            case Registration():
                self.accounts.setdefault(key, Account())
            case Commitment():
                self._require_seat(key, record.slot, record).commit(record)
            case PartRecord():
                self._require_seat(key, self._round(record).plan.slot_of(key), record).average(key, record)
            case NonceOpening():
                self._require_seat(key, record.slot, record).open_nonce(record)
            case Verdict() | PartVerdict():
                self._require_office(key, Role.AUDITOR, record)
                self._judge(key, record)
            case SketchSet() | Evaluation():
                self._require_office(key, Role.CHECKPOINT_WORKER, record)
            case Equivocation():
                self._equivocated(key, record)

    def _note_coordinators(self, record: Record) -> None:
        if isinstance(record, DRIVING) and self.ledger.ended is not None:
            raise InvalidDataError(f"a {record.kind} of round {record.round} after the run's end")
        match record:
            case Appointment():
                self._offices.add((record.role, record.key))
            case Dismissal():
                self._dismiss(record)
            case RoundPlan():
                self._plan(record)
            case CommitmentSet():
                self._round(record).close(record, self._stands)
            case RoundManifest():
                found = self._round(record)
                found.seal(record)
                self.ledger.seal(found, record, self._stands)
            case CheckpointManifest():
                self._checkpoint(record)
            case BeaconReveal():
                found = self._round(record)
                found.draw(record, self._stands)
                self.ledger.draw(found, record)
            case CreditStatement():
                self.ledger.state(record)
            case Ban():
                if self._stands(record.key):
                    self._end(record, record.key, record.reason)
            case RunEnd():
                if self.rounds and self.rounds[-1].manifest is not None and self.rounds[-1].reveal is None:
                    raise InvalidDataError(f"the run's end comes before the draw of round {len(self.rounds) - 1}")
                self.ledger.end(record)

    def _checkpoint(self, said: CheckpointManifest) -> None:
        """The chain of checkpoints goes on as the rounds do: each is what its round's manifest says, made from its base."""
        number = len(self.checkpoints)
        sealed = self.rounds[number - 1].manifest if 0 < number <= len(self.rounds) else None
        if said.round != number or (number and sealed is None):
            raise InvalidDataError(f"the manifest of checkpoint {said.round} where none is due")
        if sealed is None:
            root, parent = bytes.fromhex(self.spec.checkpoint), parent_of_first(self.spec)
        else:
            root, parent = sealed.root, self.checkpoints[-1].root
        if said != checkpoint_manifest(self.spec, number, root, parent):
            raise InvalidDataError(
                f"the manifest of checkpoint {number} is not that of {root.hex()[:12]}, made from "
                f"{'nothing' if parent is None else parent.hex()[:12]}, with the layout of this run"
            )
        self.checkpoints.append(said)

    def _plan(self, plan: RoundPlan) -> None:
        previous = self.rounds[-1] if self.rounds else None
        base, beacon = bytes.fromhex(self.spec.checkpoint), bytes.fromhex(self.spec.beacon)
        if previous is not None:
            if previous.manifest is None or previous.reveal is None:
                raise InvalidDataError(f"the plan of round {plan.round} comes before the round before it is over")
            base, beacon = previous.manifest.root, previous.reveal.value
        if plan.round != len(self.rounds) or plan.round >= self.spec.rounds.count:
            raise InvalidDataError(f"the plan of round {plan.round} where that of round {len(self.rounds)} was due")
        if len(self.checkpoints) != plan.round + 1:
            raise InvalidDataError(f"the plan of round {plan.round} without the manifest of its checkpoint before it")
        if (plan.log_size, plan.log_root) != (self.log.size, self.log.root()):
            raise InvalidDataError(
                f"the plan of round {plan.round} was made from a log of {plan.log_size} leaves with another root than the "
                f"{self.log.size} leaves before it have"
            )
        if (plan.base, plan.previous_beacon) != (base, beacon):
            raise InvalidDataError(f"the plan of round {plan.round} goes on from another checkpoint or beacon value")
        vouched = tuple(self.account(seat.peer).vouched_tokens for seat in plan.roster)
        self.rounds.append(Round(self.spec, plan, vouched))

    # What ends audits, and standings

    def _judge(self, key: bytes, verdict: Verdict | PartVerdict) -> None:
        found, slot = self._round(verdict), verdict.slot
        if isinstance(verdict, PartVerdict):
            part, audited, due = verdict.part, verdict.part_record, verdict.part
            what = f"the average of part {part} by slot {slot}"
        else:
            part, audited, due = None, verdict.commitment, slot
            what = f"the contribution of slot {slot}"
        audit = found.audits.get((slot, part))
        if audit is None or audit.audited != audited or verdict.sequence != due:
            raise InvalidDataError(f"a verdict on {what} in round {verdict.round}, which was not drawn")
        if audit.peer == key:
            raise SignatureError(f"a verdict on {what} in round {verdict.round} by whose it is")
        audit.verdicts[key] = verdict.outcome
        if self._resolve(audit, (verdict.round, slot, part), verdict, verdict.reason):
            self.ledger.settle(verdict)

    def _dismiss(self, record: Dismissal) -> None:
        """An auditor's office ends. Open audits are resolved anew, by the verdicts of the auditors that there are."""
        if record.key not in self.auditors():
            raise InvalidDataError(f"a dismissal of {peer_id(record.key)}, who is no auditor")
        self._offices.remove((Role.AUDITOR, record.key))
        waiting = [
            (number, slot, part)
            for number, found in enumerate(self.rounds)
            for (slot, part), audit in found.audits.items()
            if audit.outcome is None
        ]
        resolved = False
        for where in sorted(waiting, key=lambda place: (place[0], place[1], -1 if place[2] is None else place[2])):
            number, slot, part = where
            resolved |= self._resolve(self.rounds[number].audits[slot, part], where, record, record.reason)
        if resolved:
            self.ledger.settle(record)

    def _resolve(self, audit: Drawn, where: tuple[int, int, int | None], cause: Record, reason: str) -> bool:
        """Give an audit an outcome, if it has none and there are verdicts enough, and do what follows but for settling."""
        if audit.outcome is not None:
            return False
        number, slot, part = where
        auditors, policy = self.auditors(), self.spec.audit
        counted = {key: outcome for key, outcome in audit.verdicts.items() if key in auditors}
        others = len(auditors - {audit.peer})
        outcome = resolve(counted, others, policy, acceptances=acceptances_needed(audit.audited))
        if outcome is None:
            return False
        self._close(audit, number, slot, outcome)
        before, commitment = self.account(audit.peer), self.rounds[number].commitments[slot]
        if part is None:
            rule = ruling(before, outcome, round=number, tokens=commitment.tokens, policy=policy)
        else:
            rule = reduction_ruling(before, outcome, reason, round=number, policy=policy)
        if rule.forfeits_contribution:
            self.ledger.forfeit(cause, [(number, slot)])
        if rule.forfeits_everything:
            self.ledger.forfeit_all(cause, audit.peer)
        self._store(audit.peer, rule.account)
        return True

    def _equivocated(self, key: bytes, report: Equivocation) -> None:
        if key != self._coordinator and all(key != holder for _, holder in self._offices) and not self._stands(key):
            raise SignatureError(f"an equivocation reported by {peer_id(key)}, who takes no part in the run")
        proved = proved_by(report)
        if self._stands(proved.key):
            self._end(report, proved.key, proved.what)

    def _end(self, cause: Record, key: bytes, reason: str) -> None:
        self.ledger.forfeit_all(cause, key)
        self._store(key, replace(self.accounts[key], ended=reason))

    def _store(self, key: bytes, account: Account) -> None:
        """Keep an account; where standing has ended, nobody looks at what is not resolved yet."""
        self.accounts[key] = account
        if account.ended is None:
            return
        for number, found in enumerate(self.rounds):
            for (slot, _), audit in found.audits.items():
                if audit.peer == key and audit.outcome is None:
                    self._close(audit, number, slot, Moot.MOOT)

    def _close(self, audit: Drawn, number: int, slot: int, outcome: Outcome | Moot) -> None:
        audit.outcome = outcome
        self.ledger.closed(audit.peer, (number, slot))

    # Who may sign what

    def _round(self, record: Record) -> Round:
        if record.round >= len(self.rounds):
            raise InvalidDataError(f"a {record.kind} of round {record.round} before the round's plan")
        return self.rounds[record.round]

    def _stands(self, key: bytes) -> bool:
        return key in self.accounts and self.accounts[key].ended is None

    def _require_seat(self, key: bytes, slot: int | None, record: Record) -> Round:
        found = self._round(record)
        roster = found.plan.roster
        if slot is None or slot >= len(roster) or roster[slot].peer != key or not self._stands(key):
            raise SignatureError(f"a {record.kind} of round {record.round} by {peer_id(key)}, who has no such slot")
        return found

    def _require_office(self, key: bytes, role: Role, record: Record) -> None:
        if (role, key) not in self._offices:
            raise SignatureError(f"a {record.kind} by {peer_id(key)}, who was not appointed as {role}")
