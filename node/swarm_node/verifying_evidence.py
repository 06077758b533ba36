"""`swarm-node verify evidence`: a rejection, judged again by what its auditors archived. Nobody's word is taken for anything.

Every signed verdict that rejects the slot is looked at. In exact runs the contribution is replayed whole from public data; in
native runs the segment that decided is replayed between the archived states, which have to hash to the node's commitment.
An average is made again from the archived inputs, or convicted by the archived receipts.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from swarm_node.verifying import PATIENCE_S, Options
from swarm_protocol import audit, data, evidence, fetch, gathering, processes, reduction_audit, training
from swarm_protocol.audit import Finding, Subject
from swarm_protocol.chunks import manifest_of
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError, InvalidDataError, RefusedError
from swarm_protocol.fingerprint import fingerprint_hash, runtime_fingerprint
from swarm_protocol.gathering import Subjects
from swarm_protocol.http import persist
from swarm_protocol.identity import peer_id
from swarm_protocol.records import Envelope, Evidence, Outcome, PartRecord, PartVerdict, Verdict
from swarm_protocol.reduction_gathering import reduced_round
from swarm_protocol.training import Tokens, TrainState

PAGE = 500
UNREPEATABLE = "not repeated"


@dataclass(frozen=True)
class Ruling:
    """A verdict, and what judging again gives."""

    auditor: str
    reason: str
    evidence: str | None
    evidence_bytes: int
    again: str
    again_reason: str

    @property
    def stands(self) -> bool:
        return self.again == Outcome.REJECTED


def verify(options: Options, part: int | None) -> int:
    """Judge again and report; the exit code is 0 only if every verdict that rejects the slot stands.

    Raises:
        SwarmError: there is no such verdict, or it could not be looked at.
    """
    processes.require_platform()
    rulings = asyncio.run(_verify(options, part))
    stands = all(ruling.stands for ruling in rulings)
    console = Console(stderr=options.as_json, highlight=False)
    for ruling in rulings:
        kept = "nothing" if ruling.evidence is None else f"{ruling.evidence_bytes:,} bytes, {ruling.evidence}"
        console.print(f"auditor {ruling.auditor}", markup=False)
        console.print(f"  claimed   rejected: {ruling.reason}", markup=False)
        console.print(f"  archived  {kept}", markup=False)
        colour = "green" if ruling.stands else "red"
        console.print(f"  again     [{colour}]{ruling.again}[/]: {escape(ruling.again_reason)}")
    console.print("The verdict stands." if stands else "The verdict does not stand by what is archived.")
    if options.as_json:
        print(json.dumps({"verdicts": [asdict(ruling) for ruling in rulings], "stands": stands}))
    return 0 if stands else 1


async def _verify(options: Options, part: int | None) -> list[Ruling]:
    client = await persist(lambda: CoordinatorClient.connect(options.url), deadline_s=PATIENCE_S)
    async with client:
        given = await _rejections(client, options, part)
        if not given:
            what = "contribution" if part is None else f"average of part {part}"
            raise ConfigurationError(f"no verdict rejects the {what} of slot {options.slot} in round {options.round}")
        if part is not None:
            return [await _average(client, verdict) for verdict in given]
        with tempfile.TemporaryDirectory(prefix="swarm-verify-") as folder:
            bench = await _Bench.open(client, options, Path(folder))
            return [await bench.ruling(verdict) for verdict in given]


async def _rejections(client: CoordinatorClient, options: Options, part: int | None) -> list[Envelope]:
    """The signed verdicts that reject what was asked for."""
    found: list[Envelope] = []
    after: int | None = -1
    while after is not None:
        page = await client.json("/verdicts", after=after, limit=PAGE)
        try:
            for entry in page["verdicts"]:
                if (entry["round"], entry["slot"], entry["part"]) == (options.round, options.slot, part):
                    found.append(await client.record(bytes.fromhex(entry["hash"])))
            after = page["next"]
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidDataError("the coordinator's verdicts are no page of verdicts") from error
    records = [(envelope, envelope.open()) for envelope in found]
    return [
        envelope
        for envelope, record in records
        if isinstance(record, Verdict | PartVerdict)
        and (record.run, record.round, record.slot) == (client.spec.run_id, options.round, options.slot)
        and record.outcome is Outcome.REJECTED
    ]


async def _archived(client: CoordinatorClient, verdict: Envelope) -> tuple[Evidence | None, dict[str, bytes]]:
    """What the signer of a verdict had archived for it."""
    record = verdict.open()
    assert isinstance(record, Verdict | PartVerdict)
    if record.evidence is None:
        return None, {}
    envelope = await client.record(record.evidence)
    kept = envelope.open_as(Evidence, run=client.spec.run_id, round=record.round, key=verdict.key)
    part = record.part if isinstance(record, PartVerdict) else None
    audited = record.part_record if isinstance(record, PartVerdict) else record.commitment
    if (kept.slot, kept.part, kept.audited) != (record.slot, part, audited):
        raise InvalidDataError("the verdict names evidence of something else")
    return kept, await evidence.download(client, kept)


def _ruling(verdict: Envelope, kept: Evidence | None, again: str, reason: str) -> Ruling:
    record = verdict.open()
    assert isinstance(record, Verdict | PartVerdict)
    return Ruling(
        auditor=peer_id(verdict.key),
        reason=record.reason,
        evidence=None if kept is None else kept.hash.hex(),
        evidence_bytes=0 if kept is None else evidence.size_bytes(kept),
        again=again,
        again_reason=reason,
    )


async def _average(client: CoordinatorClient, verdict: Envelope) -> Ruling:
    record = verdict.open_as(PartVerdict, run=client.spec.run_id)
    try:
        kept, found = await _archived(client, verdict)
        inputs, receipts = evidence.inputs_of(found, "input"), evidence.receipts_of(found)
    except (InvalidDataError, RefusedError) as error:
        return _ruling(verdict, None, UNREPEATABLE, f"the evidence cannot be had: {error}")
    published = await client.record(record.part_record)
    reduced = await reduced_round(client, record.round)
    holder = reduced.plan.slot_of(published.key)
    if holder != record.slot or published.open_as(PartRecord, run=client.spec.run_id).part != record.part:
        raise InvalidDataError("the verdict names another average")
    again = await asyncio.to_thread(
        reduction_audit.judge, client.spec, reduced.plan, reduced.commitments.by_slot, published, inputs, receipts,
        closing=reduced.closing,
    )  # fmt: skip
    return _ruling(verdict, kept, again.outcome.vote.value, again.reason)


class _Bench:
    """Where a contribution is judged again."""

    def __init__(self, client: CoordinatorClient, options: Options, folder: Path, shards: fetch.Shards) -> None:
        self._client = client
        self._options = options
        self._shards = shards
        self._subjects = Subjects(client, folder)
        self._fingerprint = fingerprint_hash(runtime_fingerprint(options.device, options.threads))
        self._known: dict[object, Finding] = {}

    @classmethod
    async def open(cls, client: CoordinatorClient, options: Options, folder: Path) -> _Bench:
        training.configure(options.threads)
        return cls(client, options, folder, await fetch.Shards.open(client, folder / "shards"))

    async def ruling(self, verdict: Envelope) -> Ruling:
        record = verdict.open_as(Verdict, run=self._client.spec.run_id)
        try:
            kept, found = await _archived(self._client, verdict)
        except (InvalidDataError, RefusedError) as error:
            return _ruling(verdict, None, UNREPEATABLE, f"the evidence cannot be had: {error}")
        subject = await self._subjects.find(record.round, record.slot, record.commitment)
        await self._shards.ensure(data.shards_of(subject.spec, subject.plan, record.slot, self._shards.manifest))
        if subject.spec.numerics == "exact":
            finding = await self._examine(subject, range(len(subject.segments)), None)
            reason = finding.judgement.reason + _first_difference(finding, _committed_roots(subject, found))
            return _ruling(verdict, kept, finding.judgement.outcome.value, reason)
        if kept is None:
            return _ruling(verdict, kept, UNREPEATABLE, "nothing was archived, and a native run cannot do without")
        if "served" in found:
            return _ruling(verdict, kept, *_of_served(subject, found))
        if kept.segment is None or kept.segment >= len(subject.segments):
            return _ruling(verdict, kept, UNREPEATABLE, "the evidence does not say which segment decided")
        try:
            claims = await asyncio.to_thread(gathering.archived_claims, subject, found)
        except InvalidDataError as error:
            return _ruling(verdict, kept, UNREPEATABLE, f"the evidence proves nothing: {error}")
        finding = await self._examine(subject, (kept.segment,), claims, (kept.segment, kept.items))
        return _ruling(verdict, kept, finding.judgement.outcome.value, finding.judgement.reason)

    async def _examine(
        self, subject: Subject, drawn: range | tuple[int, ...], claims: audit.Claims | None, name: object = None
    ) -> Finding:
        """What a replay gives; auditors with the same evidence share one."""

        def batch(step: int) -> Tokens:
            return data.batch(subject.spec, subject.plan, subject.slot, step, self._shards.dataset)

        if name not in self._known:
            tolerances = await fetch.tolerances(self._client)
            self._known[name] = await asyncio.to_thread(
                audit.examine, subject, drawn, claims, batch,
                fingerprint=self._fingerprint, tolerances=tolerances, device=self._options.device,
            )  # fmt: skip
        return self._known[name]


def _committed_roots(subject: Subject, found: dict[str, bytes]) -> tuple[bytes, ...]:
    """The state roots in the evidence; none where they are not those of the commitment."""
    try:
        return gathering.archived_claims(subject, {"trace": found["trace"]}).roots
    except (InvalidDataError, KeyError):
        return ()


def _first_difference(finding: Finding, claimed: tuple[bytes, ...]) -> str:
    """Where an exact replay leaves the archived trace, for people."""
    for index, (ours, theirs) in enumerate(zip(finding.roots.values(), claimed, strict=False)):
        if ours != theirs:
            return f"; segment {index} ends in state {ours.hex()[:16]}, the claim is {theirs.hex()[:16]}"
    return ""


def _of_served(subject: Subject, found: dict[str, bytes]) -> tuple[str, str]:
    """What follows from bytes that a node gave out for a state: proof only if they hash to what it committed to."""
    served, roots = found["served"], _committed_roots(subject, found)
    if manifest_of(served).root in roots:
        try:
            TrainState.from_bytes(subject.spec, served)
        except InvalidDataError as error:
            return Outcome.REJECTED.value, f"the node committed to bytes that are no state of this run: {error}"
    return UNREPEATABLE, "that the node served these bytes, which are none that it committed to, is its auditors' word"
