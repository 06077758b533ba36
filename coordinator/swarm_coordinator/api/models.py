"""The JSON of the API. Keys and hashes are lower-case hex; `peer` is a PeerID unless its description says otherwise."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from swarm_coordinator.rounds import Phase
from swarm_protocol.records import Comparison, Outcome, SketchFault

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="32 bytes in hex", examples=["6c1f" * 16])]
Name = Annotated[str, Field(examples=["lab-3"])]
PeerID = Annotated[
    str, Field(description="libp2p PeerID", examples=["12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"])
]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class RunSummary(BaseModel):
    run_id: Hex
    name: Name
    protocol: int
    round: int
    rounds: int
    phase: Phase
    nodes: int = Field(description="nodes in good standing that were heard of lately")


class GossipAddresses(BaseModel):
    """Where a run's announcements are gossiped from."""

    multiaddrs: list[str] = Field(description="of the coordinator's member of the gossip; empty where it has none")


class Peers(BaseModel):
    """What nodes ask for every few seconds."""

    peers: list[str] = Field(description="multiaddrs of the peer plane's way in")
    recovering: bool = Field(description="after a restore: hand in what you hold that the coordinator signed last")


class CheckpointName(BaseModel):
    round: int = Field(description="the round that starts from it")
    root: Hex


class Credit(BaseModel):
    """Work in contributions, in megaflops: whole millions of floating point operations."""

    pending: int = Field(0, description="may still be forfeited")
    settled: int = 0
    forfeited: int = 0


class NodeStatus(BaseModel):
    peer: PeerID
    name: Name
    device: Annotated[str, Field(examples=["cpu"])]
    standing: Literal["good", "ended"]
    reason: str | None = Field(description="why the standing ended")
    last_seen_ms: int
    contributions: int = Field(description="commitments that counted")
    accepted: int = Field(description="contributions that an audit accepted")
    rejected: int
    pending_audits: int = Field(
        description="drawn contributions and averages without an outcome: evidence is still wanted"
    )
    probation: bool = Field(description="whether contributions are still audited whole, and all of them")
    credit: Credit


class RoundSummary(BaseModel):
    round: int
    slots: int
    committed: int
    parts: int
    missing_parts: int
    root: Hex = Field(description="of the checkpoint after the round")


class EvaluationSummary(BaseModel):
    round: int = Field(description="the round that starts from the checkpoint")
    root: Hex
    loss: float = Field(description="held-out loss, nats per token")
    sample: str | None = Field(description="what the model writes after a prompt, now and then: prompt ‖ continuation")


class Comparisons(BaseModel):
    equal: int = 0
    different: int = 0
    within: int = 0
    outside: int = 0


class OutcomeCounts(BaseModel):
    drawn: int
    pending: int
    accepted: int
    rejected: int
    inconclusive: int
    unavailable: int
    moot: int = Field(description="drawn from somebody whose standing has ended; nobody looks any more")


class AuditCounts(OutcomeCounts):
    comparisons: Comparisons = Field(description="over all verdicts")


class Rejected(BaseModel):
    peer: PeerID
    name: Name
    round: int
    slot: int
    part: int | None = Field(description="where it is an average that was rejected, and not a contribution")
    reason: str


class EquivocationSummary(BaseModel):
    peer: PeerID
    name: Name
    round: int
    kind: str = Field(description="of the two records that it signed under one name")
    reporter: PeerID
    report: Hex = Field(description="the signed report, which has both records")


class AncestorSummary(BaseModel):
    """A run that this one comes from."""

    run_id: Hex
    name: Name
    round: int = Field(description="its checkpoint that the next one began with is the one that this round starts from")
    root: Hex = Field(description="of that checkpoint")
    spec: Hex = Field(description="names its encoded RunSpec under /chunks; the run id is a hash of it")


class AncestorList(BaseModel):
    ancestors: list[AncestorSummary] = Field(
        description="nearest first; empty for a run that began with random weights"
    )


class RunStatus(BaseModel):
    run_id: Hex
    name: Name
    protocol: int
    numerics: str
    coordinator: Hex = Field(description="the key that signs plans, manifests and beacon values")
    round: int = Field(description="the current one; once the run has finished, how many it had")
    rounds: int
    phase: Phase
    phase_ends_ms: int | None = Field(description="when the phase ends at the latest; null if only an event ends it")
    paused: bool = Field(description="whether the run owner wants no round to begin for now")
    ended: str | None = Field(description="why the run has finished, or will after this round; null while it goes on")
    recovering: bool = Field(
        description="whether the run was restored from a backup: nothing is signed before nodes were asked for newer records"
    )
    peers: list[str] = Field(description="multiaddrs of the peer plane's way in")
    checkpoint: CheckpointName = Field(description="the newest sealed one")
    parameters: int
    ancestors: list[AncestorSummary] = Field(description="the runs that this one comes from, nearest first")
    registered: int = Field(description="how many identities ever registered; all of them are under /nodes")
    nodes: list[NodeStatus] = Field(description="the 500 that were heard of last, in the order of registration")
    history: list[RoundSummary] = Field(description="sealed rounds, oldest first; the newest 500")
    evaluations: list[EvaluationSummary] = Field(description="by round; the newest 500")
    audits: AuditCounts = Field(description="of contributions")
    part_audits: OutcomeCounts = Field(description="of reducers' averages")
    rejected: list[Rejected] = Field(description="oldest first; the newest 500")
    equivocations: list[EquivocationSummary] = Field(description="proved ones, oldest first; the newest 500")


class RoundPage(BaseModel):
    rounds: list[RoundSummary] = Field(description="sealed ones, newest first")
    next: int | None = Field(description="`before` of the next page; null if this is the last one", examples=[17])


class CheckpointEntry(BaseModel):
    round: int = Field(description="the round that starts from it")
    root: Hex
    parent: Hex | None = Field(description="root of the checkpoint that it was made from; null if there is none")
    manifest: Hex = Field(description="hash of the CheckpointManifest")
    size_bytes: int = Field(description="of all of it")
    whole: bool = Field(description="whether its chunks are kept here; else it is made from an older one")
    delta_bytes: int | None = Field(description="of the averages that make it from its parent; null for the first")


class CheckpointPage(BaseModel):
    checkpoints: list[CheckpointEntry] = Field(description="newest first")
    next: int | None = Field(description="`before` of the next page; null if this is the last one", examples=[17])


class NodePage(BaseModel):
    nodes: list[NodeStatus] = Field(description="by key")
    next: Hex | None = Field(description="`after` of the next page; null if this is the last one")


class Place(BaseModel):
    """Where a node stands on its way to a slot."""

    state: Literal["seated", "waiting", "queued", "unknown", "ended"] = Field(
        description="in the round's plan; has a place in the next one, as far as can be said; waits its turn on probation; "
        "has not registered, or is not heard of; takes no further part"
    )
    position: int | None = Field(description="in the queue, from 1; null for who does not queue")
    room: int | None = Field(description="how many on probation may train at once, where they queue")
    vouched: float = Field(description="contributions of full size that audits have vouched for")
    probation: int = Field(description="how many of them it takes to be trusted")
    sentence: str = Field(description="all of this for people")


class ReceiptModel(BaseModel):
    hash: Hex
    kind: str
    leaf: int | None = Field(description="the record's place in the log; null for heartbeats and the like")
    receipt: str | None = Field(
        description="the encoded Envelope, in hex, of a Receipt by the coordinator, which promises that place"
    )


class OpenAudit(BaseModel):
    round: int
    slot: int
    part: int | None = Field(description="the part whose average is audited; null for a contribution")
    peer: Hex = Field(description="the node's key")
    audited: Hex = Field(description="the hash of the commitment, or of the part record")
    segments: list[int] = Field(description="of a contribution, what is replayed")
    verdicts: int = Field(description="how many other auditors have given one")
    turn: str = Field(description="the key of the auditor who should look next; others step in if it does not")


class LogHead(BaseModel):
    size: int
    root: Hex
    signed: str = Field(description="the encoded Envelope of a LogHead that says so, by the coordinator, in hex")


class LogProof(BaseModel):
    size: int = Field(description="the size of the log that the proof leads to")
    proof: list[Hex] = Field(description="as in RFC 9162, lowest first")


class SlotDetail(BaseModel):
    slot: int
    peer: PeerID
    name: Name
    steps: int
    weight: int = Field(description="tokens")
    reducer: bool
    commitment: Hex | None
    train_loss: float | None = Field(description="what the node claims, nats per token")
    selected: bool | None = Field(
        description="by the round's sketches; null if it has no sketch set, or the slot no weight"
    )
    sketch_fault: SketchFault | None = Field(description="why its sketches do not count, where they do not")
    audit: Outcome | Literal["pending", "moot"] | None = Field(description="null if it was not drawn")
    segments: list[int] | None = Field(description="what is replayed; null if it was not drawn")


class PartRecordDetail(BaseModel):
    hash: Hex
    part: int
    reducer: PeerID
    slots: list[int]
    size_bytes: int
    counted: bool = Field(description="whether the round is sealed with it")
    audit: Outcome | Literal["pending", "moot"] | None = Field(description="null if it was not drawn")


class VerdictDetail(BaseModel):
    slot: int
    part: int | None = Field(description="of an average; null for a contribution")
    auditor: PeerID
    outcome: Outcome
    comparison: Comparison | None
    statistic: float | None
    reason: str
    evidence: Hex | None = Field(description="the hash of the signed list of what is archived, of a rejection")


class EvidencePiece(BaseModel):
    hash: Hex
    size_bytes: int
    href: str = Field(description="where its bytes are", examples=["/v1/runs/6c1f/chunks/6c1f"])


class EvidenceItemDetail(BaseModel):
    name: str = Field(description="`trace`, `state-2`, `part-3`, `input-1` and the like", examples=["state-2"])
    size_bytes: int
    pieces: list[EvidencePiece] = Field(description="in their order: together they are the item")


class EvidenceDetail(BaseModel):
    """What one auditor judged by."""

    hash: Hex = Field(description="of the signed Evidence record, which the verdict names")
    auditor: PeerID
    part: int | None = Field(description="of an average; null for a contribution")
    segment: int | None = Field(description="of a contribution, the one that decided")
    items: list[EvidenceItemDetail]


class ArchivedEvidence(BaseModel):
    round: int
    slot: int
    evidence: list[EvidenceDetail]
    without: list[VerdictDetail] = Field(
        description="verdicts against the slot of which nothing is archived: nothing was served, or public records are enough"
    )


class VerdictEntry(VerdictDetail):
    leaf: int = Field(description="its place in the log")
    hash: Hex = Field(description="of the signed record")
    round: int


class VerdictPage(BaseModel):
    verdicts: list[VerdictEntry] = Field(description="in the order of the log")
    next: int | None = Field(description="`after` of the next page; null if this is the last one", examples=[240])


class LogEvent(BaseModel):
    """The data of an event: a leaf of the log."""

    leaf: int
    kind: str = Field(examples=["commitment"])
    round: int
    sequence: int
    signer: PeerID
    hash: Hex
    record: dict[str, Any] = Field(
        description="the record's other fields; a list is `{count: ...}`, long bytes are `{size_bytes: ...}`",
        examples=[{"slot": 2, "tokens": 2048, "train_loss": 5.25}],
    )


class RoundDetail(BaseModel):
    round: int
    base: Hex
    plan: Hex
    commit_by_ms: int
    exchange_by_ms: int
    root: Hex | None = Field(description="null until the round is sealed")
    roster: list[SlotDetail]
    part_records: list[PartRecordDetail]
    verdicts: list[VerdictDetail]
    evaluation: EvaluationSummary | None = Field(description="of the checkpoint that the round starts from")
