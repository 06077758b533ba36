"""The auditor: replays what was drawn, compares, and signs a verdict. A process of its own, on any machine.

It takes what the coordinator lists as open, fetches the claimed states from the node that made them, each piece checked
against the node's commitment, trains the same slot from the same checkpoint on the same data, and says how the two compare.
An average that was drawn it makes again from the inputs that its reducer, or their senders, serve. Before it rejects it has
what it judged by archived. Auditors seldom do the same work twice, except where a rejection needs a second one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from swarm_protocol import audit, collecting, data, fetch, gathering, replay, training
from swarm_protocol.audit import Claims, Finding, Subject
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.evidence import Collected
from swarm_protocol.fingerprint import fingerprint_hash, runtime_fingerprint
from swarm_protocol.gathering import Subjects
from swarm_protocol.http import persist
from swarm_protocol.identity import Identity
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Evidence, Outcome, PartRecord, PartVerdict, Verdict
from swarm_protocol.reduction_audit import ReductionOutcome
from swarm_protocol.reduction_gathering import Examined, Reductions
from swarm_protocol.replay import Judgement
from swarm_protocol.signing import SigningLedger
from swarm_protocol.tolerances import Tolerances
from swarm_protocol.training import Tokens

log = logging.getLogger(__name__)

PATIENCE_S = 24 * 3600.0
START_PATIENCE_S = 120.0
POLL_S = 10.0
PAUSE_S = 0.25
RETRY_S = 5.0
AT_ONCE = 8

T = TypeVar("T")

Name = tuple[int, int, int | None]
"""The round, the slot, and the part where an average is audited."""


async def run(
    directory: Path,
    url: str,
    key_path: Path,
    *,
    threads: int = 1,
    open_ledger: Callable[[Path, Identity], SigningLedger] = SigningLedger,
) -> None:
    """Audit until cancelled, with the key in `key_path`; caches data and checkpoints beside it.

    Raises:
        SwarmError: the run cannot be audited from here.
    """
    identity = Identity.load(key_path)
    folder = directory / "auditors" / identity.peer_id[-12:]
    client = await persist(lambda: CoordinatorClient.connect(url), deadline_s=START_PATIENCE_S)
    async with client:
        bootstrap = await persist(lambda: _bootstrap(client), deadline_s=START_PATIENCE_S)
        training.configure(threads)
        plane = await PeerPlane.start(key_path, client.spec.run_id, initial_peers=bootstrap, client_only=True)
        try:
            with open_ledger(folder / "signed.db", identity) as ledger:
                await Auditor(client, plane, ledger, folder, threads=threads).run()
        finally:
            await plane.close()


async def _bootstrap(client: CoordinatorClient) -> list[str]:
    peers = (await client.status())["peers"]
    if not peers:
        raise UnreachableError("the run's peer plane is not up yet")
    return [str(peer) for peer in peers]


class Auditor:
    """One auditor of one run."""

    def __init__(
        self,
        client: CoordinatorClient,
        plane: PeerPlane,
        ledger: SigningLedger,
        folder: Path,
        *,
        device: str = "cpu",
        threads: int,
    ) -> None:
        self._client = client
        self._spec = client.spec
        self._plane = plane
        self._ledger = ledger
        self._key = ledger.identity.public_key
        self._folder = folder
        self._device = device
        self._fingerprint = fingerprint_hash(runtime_fingerprint(device, threads))
        self._subjects = Subjects(client, folder, plane)
        self._reductions = Reductions(client, plane)
        self._first_seen: dict[Name, float] = {}
        self._under_way: set[Name] = set()
        self._replaying = asyncio.Lock()
        self._tolerances: Tolerances | None = None

    async def run(self) -> None:
        """Audit whatever is open, until cancelled. Evidence of several is fetched at once; one replays at a time."""
        shards = await self._patiently(lambda: fetch.Shards.open(self._client, self._folder / "shards"))
        self._tolerances = await self._patiently(lambda: fetch.tolerances(self._client))
        async with asyncio.TaskGroup() as tasks:
            while True:
                open_audits = await self._patiently(lambda: self._client.open_audits(self._key, wait_s=POLL_S))
                for wanted in self._with_room(self._due(open_audits)):
                    name = _name(wanted)
                    self._under_way.add(name)
                    tasks.create_task(self._audit(wanted, shards)).add_done_callback(partial(self._ended, name))
                await asyncio.sleep(PAUSE_S)

    def _ended(self, name: Name, _: asyncio.Task[None]) -> None:
        self._under_way.discard(name)

    def _due(self, audits: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The audits to begin now, oldest first: where it is our turn, or was another's for too long."""
        now = time.monotonic()
        names = [_name(wanted) for wanted in audits]
        self._first_seen = {name: self._first_seen.get(name, now) for name in names}
        return [
            wanted
            for name, wanted in zip(names, audits, strict=True)
            if name not in self._under_way
            and (wanted["turn"] == self._key.hex() or now - self._first_seen[name] > self._spec.audit.evidence_s)
        ]

    def _with_room(self, due: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As many as there is room for, apart for contributions and averages: neither waits for the other's evidence."""
        chosen: list[dict[str, Any]] = []
        for averages in (False, True):
            busy = sum((part is not None) is averages for _, _, part in self._under_way)
            chosen += [wanted for wanted in due if (wanted["part"] is not None) is averages][: AT_ONCE - busy]
        return chosen

    async def _audit(self, wanted: dict[str, Any], shards: fetch.Shards) -> None:
        started = time.monotonic()
        round_number, slot, part = _name(wanted)
        what = f"round {round_number} slot {slot}" + ("" if part is None else f" part {part}")
        try:
            verdict = await (self._contribution(wanted, shards) if part is None else self._average(wanted))
        except (RefusedError, InvalidDataError) as error:
            log.warning("%s cannot be audited here: %s", what, error)
            await asyncio.sleep(RETRY_S)
            return
        earlier = self._ledger.find(self._spec.run_id, verdict.kind, round_number, verdict.sequence)
        envelope = earlier or self._ledger.sign(verdict)
        try:
            await self._patiently(lambda: self._client.post(envelope))
        except RefusedError as error:
            log.info("the verdict on %s is no longer wanted: %s", what, error)
        log.info("%s: %s in %.1f s", what, verdict.reason, time.monotonic() - started)

    async def _contribution(self, wanted: dict[str, Any], shards: fetch.Shards) -> Verdict:
        round_number, slot, _ = _name(wanted)
        subject = await self._patiently(
            lambda: self._subjects.find(round_number, slot, bytes.fromhex(wanted["audited"]))
        )
        segments = [int(index) for index in wanted["segments"]]
        if not segments or not 0 <= min(segments) <= max(segments) < len(subject.segments):
            raise InvalidDataError("the audit names segments that do not exist")
        needed = data.shards_of(self._spec, subject.plan, slot, shards.manifest)
        await self._patiently(lambda: shards.ensure(needed))
        finding, claims, served = await self._examine(subject, segments, shards)
        judgement, evidence = finding.judgement, None
        if judgement.outcome is Outcome.REJECTED:
            segment, collected = await collecting.contribution(self._plane, self._reductions, subject, finding, claims)
            if served is not None:
                collected.add("served", served)
            evidence = await self._archive(wanted, segment, collected)
        return Verdict(
            run=self._spec.run_id,
            round=round_number,
            sequence=slot,
            slot=slot,
            commitment=subject.commitment.hash,
            outcome=judgement.outcome,
            comparison=judgement.comparison,
            statistic=judgement.statistic,
            reason=judgement.reason[:500],
            steps_replayed=finding.steps_replayed,
            fingerprint=self._fingerprint,
            evidence=evidence,
        )

    async def _archive(self, wanted: dict[str, Any], segment: int | None, collected: Collected) -> bytes | None:
        """Have the coordinator keep what we judge by; returns its name, or None where nothing is archived."""
        round_number, slot, part = _name(wanted)
        what = f"round {round_number} slot {slot}" + ("" if part is None else f" part {part}")
        sequence = Evidence.sequence_of(slot, part)
        try:
            items = collected.items
            if not items:
                log.info("%s: nothing was served, so that nothing is archived", what)
                return None
            record = Evidence(
                run=self._spec.run_id,
                round=round_number,
                sequence=sequence,
                slot=slot,
                part=part,
                audited=bytes.fromhex(wanted["audited"]),
                segment=segment,
                items=items,
            )
            earlier = self._ledger.find(self._spec.run_id, record.kind, round_number, sequence)
            envelope = earlier or self._ledger.sign(record)
            await self._patiently(lambda: self._client.post(envelope))
            for digest, piece in collected.pieces():
                await self._patiently(partial(self._client.put_evidence, digest, piece))
        except (RefusedError, InvalidDataError) as error:
            log.warning("%s: the evidence is not archived: %s", what, error)
            return None
        return envelope.open().hash

    async def _average(self, wanted: dict[str, Any]) -> PartVerdict:
        """Ask for the inputs until they are there, or the time that the spec gives for evidence is over."""
        round_number, slot, part = _name(wanted)
        envelope = await self._patiently(lambda: self._client.record(bytes.fromhex(wanted["audited"])))
        record = envelope.open_as(PartRecord, run=self._spec.run_id, round=round_number)
        reduced = await self._patiently(lambda: self._reductions.round(round_number))
        if record.part != part or reduced.plan.slot_of(envelope.key) != slot:
            raise InvalidDataError("the part record is for another part, or by somebody else")
        end = time.monotonic() + self._spec.audit.evidence_s
        examined: Examined | None = None
        missing = (ReductionOutcome.UNAVAILABLE, ReductionOutcome.WITHHELD)
        while examined is None or (examined.verdict.outcome in missing and time.monotonic() < end):
            if examined is not None:
                await asyncio.sleep(1.0)
            examined = await self._patiently(lambda: self._reductions.examine(envelope))
        found, evidence = examined.verdict, None
        if found.outcome.vote is Outcome.REJECTED:
            collected = await collecting.average(self._reductions, envelope, examined)
            evidence = await self._archive(wanted, None, collected)
        return PartVerdict(
            run=self._spec.run_id,
            round=round_number,
            sequence=record.part,
            part=record.part,
            slot=slot,
            part_record=record.hash,
            outcome=found.outcome.vote,
            reason=found.reason[:500],
            evidence=evidence,
        )

    async def _examine(
        self, subject: Subject, drawn: list[int], shards: fetch.Shards
    ) -> tuple[Finding, Claims | None, bytes | None]:
        """Fetch what the node has to show, replay, and judge. With exact numerics all can be made again without the node.

        Returns what was found, the claims, and what was served in their place.
        """
        claims: Claims | None = None
        needed = subject.needed_states(drawn)
        if needed:
            end = time.monotonic() + self._spec.audit.evidence_s
            while claims is None:
                try:
                    claims = await gathering.claims(self._plane, subject, needed)
                except (InvalidDataError, UnreachableError, RefusedError) as error:
                    if self._spec.numerics == "exact":
                        break
                    if isinstance(error, InvalidDataError):
                        reason = f"the evidence is not what was committed to: {error}"
                        served = error.served if isinstance(error, gathering.UnfitError) else None
                        return Finding(Judgement(Outcome.REJECTED, None, None, reason), 0, {}), None, served
                    if time.monotonic() > end:
                        return Finding(replay.unavailable("its states"), 0, {}), None, None
                    log.info("round %d slot %d: %s; asking again", subject.plan.round, subject.slot, error)
                    await asyncio.sleep(1.0)

        def batch(step: int) -> Tokens:
            return data.batch(self._spec, subject.plan, subject.slot, step, shards.dataset)

        async with self._replaying:
            finding = await asyncio.to_thread(
                audit.examine, subject, drawn, claims, batch,
                fingerprint=self._fingerprint, tolerances=self._tolerances, device=self._device,
            )  # fmt: skip
        return finding, claims, None

    async def _patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        return await persist(attempt, deadline_s=PATIENCE_S)


def _name(wanted: dict[str, Any]) -> Name:
    part = wanted["part"]
    return int(wanted["round"]), int(wanted["slot"]), None if part is None else int(part)
