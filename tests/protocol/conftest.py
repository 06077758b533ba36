"""A run whose parties are written out by hand: real keys, real signed records, no training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.store import Store
from swarm_protocol import PROTOCOL_VERSION, aggregate, parts
from swarm_protocol.chunks import content_hash
from swarm_protocol.draw import chain_end, nonce_hash
from swarm_protocol.identity import Identity
from swarm_protocol.records import (
    CheckpointReport,
    Commitment,
    CommitmentSet,
    Comparison,
    Envelope,
    Evaluation,
    NonceOpening,
    Outcome,
    PartHeld,
    PartRecord,
    PartVerdict,
    Ready,
    Record,
    Registration,
    RoundPlan,
    Verdict,
)
from swarm_protocol.spec import (
    AuditSpec,
    DataSpec,
    ExchangeSpec,
    ModelSpec,
    OuterSpec,
    RoundsSpec,
    RunSpec,
    TrainingSpec,
)

MODEL = ModelSpec(
    vocab_size=256,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    max_position_embeddings=8,
)
BEACON_SEED = bytes(range(32))


def identity(number: int) -> Identity:
    return Identity.from_seed(bytes([number]) * 32)


@dataclass
class Cast:
    """The parties of a run in `home`, what they sign, and the clock that they share with its coordinator."""

    home: RunDirectory
    spec: RunSpec
    nodes: list[Identity]
    worker: Identity
    auditors: list[Identity]
    now_ms: int = 1_800_000_000_000
    held: int = 0
    fingerprint: bytes = field(default=b"f" * 32)

    def clock(self) -> int:
        return self.now_ms

    @property
    def run(self) -> bytes:
        return self.spec.run_id

    def registration(self, node: Identity, sequence: int = 0, protocol: int = PROTOCOL_VERSION) -> Envelope:
        record = Registration(
            run=self.run,
            round=0,
            sequence=sequence,
            protocol=protocol,
            name=f"node-{node.peer_id[-4:]}",
            agent="tests",
            device="cpu",
            fingerprint=self.fingerprint,
        )
        return Envelope.sign(node, record)

    def ready(self, node: Identity, round_number: int, base: bytes, sequence: int = 0) -> Envelope:
        record = Ready(
            run=self.run,
            round=round_number,
            sequence=sequence,
            base=base,
            tokens_per_s=1000.0,
            can_reduce=True,
            upload_bytes_per_s=0,
        )
        return Envelope.sign(node, record)

    def commitment(self, plan: RoundPlan, slot: int, **changes: object) -> Envelope:
        record = Commitment(
            run=self.run,
            round=plan.round,
            plan=plan.hash,
            slot=slot,
            tokens=plan.roster[slot].steps * self.spec.tokens_per_step,
            trace_root=bytes([slot]) * 32,
            parts_root=bytes([slot]) * 32,
            nonce_hash=nonce_hash(self.nonce(slot)),
            fingerprint=self.fingerprint,
            train_loss=5.5,
        )
        return self.changed(self.holder(plan, slot), record, **changes)

    def part_record(self, plan: RoundPlan, closing: CommitmentSet, part: int, slot: int = 0) -> Envelope:
        record = PartRecord(
            run=self.run,
            round=plan.round,
            sequence=part,
            part=part,
            commitment_set=closing.hash,
            result=content_hash(self.average(plan.round, part)),
            size_bytes=parts.encoded_part_bytes(self.spec, part),
            slots=tuple(entry.slot for entry in closing.commitments),
        )
        return Envelope.sign(self.holder(plan, slot), record)

    def part_held(self, part_record: Envelope) -> Envelope:
        record = part_record.open()
        self.held += 1
        held = PartHeld(run=self.run, round=record.round, sequence=self.held, part_record=record.hash)
        return Envelope.sign(self.worker, held)

    def report(self, plan: RoundPlan, chosen: tuple[bytes | None, ...], root: bytes) -> Envelope:
        record = CheckpointReport(run=self.run, round=plan.round, base=plan.base, parts=chosen, root=root)
        return Envelope.sign(self.worker, record)

    def opening(self, plan: RoundPlan, slot: int, nonce: bytes | None = None) -> Envelope:
        record = NonceOpening(run=self.run, round=plan.round, slot=slot, nonce=nonce or self.nonce(slot))
        return Envelope.sign(self.holder(plan, slot), record)

    def verdict(self, auditor: Identity, commitment: Envelope, outcome: Outcome = Outcome.ACCEPTED) -> Envelope:
        committed = commitment.open_as(Commitment, run=self.run)
        record = Verdict(
            run=self.run,
            round=committed.round,
            sequence=committed.slot,
            slot=committed.slot,
            commitment=committed.hash,
            outcome=outcome,
            comparison=Comparison.EQUAL if outcome is Outcome.ACCEPTED else Comparison.OUTSIDE,
            statistic=0.0 if outcome is Outcome.ACCEPTED else 1.4,
            reason="the replay says so",
            steps_replayed=2,
            fingerprint=self.fingerprint,
        )
        return Envelope.sign(auditor, record)

    def part_verdict(
        self, auditor: Identity, part_record: Envelope, slot: int, outcome: Outcome = Outcome.ACCEPTED
    ) -> Envelope:
        judged = part_record.open_as(PartRecord, run=self.run)
        reason = "equal in every bit" if outcome is Outcome.ACCEPTED else f"wrong average of part {judged.part}"
        record = PartVerdict(
            run=self.run,
            round=judged.round,
            sequence=judged.part,
            part=judged.part,
            slot=slot,
            part_record=judged.hash,
            outcome=outcome,
            reason=reason,
        )
        return Envelope.sign(auditor, record)

    def evaluation(self, round_number: int, root: bytes, sample: str | None = None) -> Envelope:
        record = Evaluation(run=self.run, round=round_number, root=root, loss=5.4, tokens=512, sample=sample)
        return Envelope.sign(self.worker, record)

    def changed(self, signer: Identity, record: Record, **changes: object) -> Envelope:
        """The record with other fields; a copy would keep the old body."""
        return Envelope.sign(signer, type(record)(**{**record.model_dump(), **changes}))

    def holder(self, plan: RoundPlan, slot: int) -> Identity:
        return next(node for node in self.nodes if node.public_key == plan.roster[slot].peer)

    def nonce(self, slot: int) -> bytes:
        return bytes([100 + slot]) * 32

    def average(self, round_number: int, part: int) -> bytes:
        return bytes([round_number, part]) * 40


MakeCast = Callable[..., Cast]


@pytest.fixture
def make_cast(tmp_path: Path) -> MakeCast:
    """`make_cast(nodes=2, rounds=2, token=None, ...)`: a run's directory, and who takes part in it.

    Averages are audited only where `reductions` is given.
    """

    def make(
        nodes: int = 2,
        rounds: int = 2,
        token: str | None = None,
        aggregator: aggregate.Name = "multi_krum",
        reductions: float = 0.0,
    ) -> Cast:
        home = RunDirectory(tmp_path / "run")
        coordinator, worker, auditors = identity(1), identity(2), [identity(3), identity(4)]
        coordinator.save(home.coordinator_key)
        worker.save(home.worker_key)
        for number, auditor in enumerate(auditors):
            auditor.save(home.auditor_key(number))
        home.beacon_seed_file.write_bytes(BEACON_SEED)
        if token is not None:
            home.token_file.write_text(token)
        state = np.zeros(2 * MODEL.num_parameters, dtype=np.float32)
        spec = RunSpec(
            name="test",
            seed=7,
            numerics="native",
            coordinator=coordinator.public_key.hex(),
            checkpoint=Store(home.objects).put_state(state).root.hex(),
            beacon=chain_end(BEACON_SEED, rounds).hex(),
            model=MODEL,
            data=DataSpec(root="00" * 32, tokenizer="bytes", train_tokens=1000, held_out_windows=4),
            training=TrainingSpec(batch_sequences=2, micro_sequences=2, steps=2, segment_steps=1),
            exchange=ExchangeSpec(parts=2, aggregator=aggregator),
            outer=OuterSpec(),
            rounds=RoundsSpec(count=rounds, min_nodes=nodes, max_nodes=nodes, assemble_s=0.0),
            audit=AuditSpec(reductions=reductions),
        )
        home.spec_file.write_bytes(spec.encode())
        return Cast(home, spec, [identity(10 + number) for number in range(nodes)], worker, auditors)

    return make
