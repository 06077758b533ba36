"""`swarm-node observe`: follow a run over gossip alone, without torch and hivemind, and without trusting anybody.

Every record is opened here again; rounds have to follow from each other; and the log is fetched from peers, range by
range, and has to grow into every head that the coordinator signs. What does not fit is said loudly and makes the exit
code 1: two records under one name, a manifest of another plan, a checkpoint that comes from nowhere, a history that was
rewritten. An equivocation that is noticed here is gossiped on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from swarm_protocol.equivocation import proved_by
from swarm_protocol.errors import ConfigurationError, HashMismatchError, InvalidDataError, SwarmError, UnreachableError
from swarm_protocol.gossip import log_ranges, wire
from swarm_protocol.gossip.supervisor import GossipProcess, GossipSupervisor
from swarm_protocol.identity import Identity, peer_id
from swarm_protocol.log import Log
from swarm_protocol.records import (
    Envelope,
    Equivocation,
    LogHead,
    PartVerdict,
    Record,
    RoundManifest,
    RoundPlan,
    RunEnd,
    Verdict,
)
from swarm_protocol.spec import RunSpec

RANGE = 1024
ROUNDS_KEPT = 64
ASK_AGAIN_S = 2.0
LAST_RANGES_S = 10.0


@dataclass(frozen=True)
class Said:
    """Something to tell: `event` names it, `text` is for people, `details` for programs."""

    event: str
    text: str
    details: dict[str, Any]


@dataclass
class Observation:
    """What follows from a run's records, without I/O: it is given records and ranges of the log, and says what is in them."""

    spec: RunSpec
    log: Log = field(default_factory=Log)
    verified: int = 0
    alarms: int = 0
    rounds: int = 0
    ended: bool = False
    head: LogHead | None = None
    _plans: OrderedDict[int, RoundPlan] = field(default_factory=OrderedDict)
    _manifests: OrderedDict[int, RoundManifest] = field(default_factory=OrderedDict)
    _verdicts: Counter[str] = field(default_factory=Counter)
    _names: OrderedDict[tuple[bytes, str, int, int], bytes] = field(default_factory=OrderedDict)

    def take(self, envelope: Envelope) -> Iterator[Said]:
        """A record that came over gossip."""
        try:
            record = envelope.open()
            if record.run != self.spec.run_id:
                raise InvalidDataError(f"a {record.kind} of another run")
            if isinstance(record, RoundPlan | RoundManifest | LogHead | RunEnd):
                envelope.open_as(type(record), run=self.spec.run_id, key=bytes.fromhex(self.spec.coordinator))
        except InvalidDataError as error:
            yield self._alarm(f"our own gossip process let through what it should not: {error}")
            return
        details = {
            "kind": record.kind,
            "round": record.round,
            "sequence": record.sequence,
            "signer": peer_id(envelope.key),
        }
        yield Said("record", "", {**details, "hash": record.hash.hex(), "record": record.model_dump(mode="json")})
        yield from self._named(envelope, record)
        if isinstance(record, RoundPlan):
            yield from self._planned(record)
        elif isinstance(record, RoundManifest):
            yield from self._sealed(record)
        elif isinstance(record, Verdict | PartVerdict):
            self._verdicts[record.outcome.value] += 1
        elif isinstance(record, Equivocation):
            proved = proved_by(record)
            yield self._alarm(f"EQUIVOCATION: {peer_id(proved.key)} {proved.what}")
        elif isinstance(record, LogHead):
            yield from self._headed(record)
        elif isinstance(record, RunEnd):
            self.ended = True
            yield Said(
                "end", f"the run has ended: {record.reason}", {"reason": record.reason, "root": record.root.hex()}
            )

    def grow(self, data: bytes, head: LogHead) -> Iterator[Said]:
        """A range of the log under this head, from a peer. Raises `InvalidDataError` if it is not the log's."""
        entries, self.log = log_ranges.checked(data, self.log, head)
        for entry in entries:
            try:
                envelope = Envelope.decode(entry)
                record = envelope.open()
                if record.run != self.spec.run_id:
                    raise InvalidDataError("of another run")
            except InvalidDataError as error:
                yield self._alarm(f"the log holds what is no record of the run: {error}")
                continue
            yield from self._named(envelope, record)
        if self.log.size == head.sequence:
            self.verified = self.log.size
            root = head.root.hex()
            text = f"log        {self.log.size:,} records verified, root {root[:16]}"
            yield Said("log", text, {"size": self.log.size, "root": root})

    def behind(self) -> LogHead | None:
        """The newest head, if the log has to grow to it."""
        return None if self.head is None or self.head.sequence <= self.log.size else self.head

    def rewritten(self, fresh: Log, head: LogHead) -> Said | None:
        """What another log under a signed head shows, once it is as long as ours: whether ours begins it."""
        if fresh.size < self.log.size or fresh.root(self.log.size) == self.log.root():
            return None
        self.head = None
        return self._alarm(
            f"HISTORY WAS REWRITTEN: the signed head of {head.sequence} leaves does not extend "
            f"the {self.log.size} that were verified"
        )

    def equivocated(self, what: str) -> Said:
        return self._alarm(f"EQUIVOCATION: {what}")

    def _alarm(self, text: str) -> Said:
        self.alarms += 1
        return Said("alarm", text, {"reason": text})

    def _named(self, envelope: Envelope, record: Record) -> Iterator[Said]:
        """What the coordinator says over gossip and what is in its log are the same records."""
        if not isinstance(record, RoundPlan | RoundManifest):
            return
        name = (envelope.key, record.kind, record.round, record.sequence)
        before = self._names.setdefault(name, record.hash)
        if before != record.hash:
            yield self._alarm(f"EQUIVOCATION: there are two records of kind {record.kind} for round {record.round}")
        while len(self._names) > 4 * ROUNDS_KEPT:
            self._names.popitem(last=False)

    def _planned(self, plan: RoundPlan) -> Iterator[Said]:
        _keep(self._plans, plan)
        before = self._manifests.get(plan.round - 1)
        if before is not None and before.root != plan.base:
            yield self._alarm(
                f"the plan of round {plan.round} goes on from another checkpoint than the one that was sealed"
            )

    def _sealed(self, manifest: RoundManifest) -> Iterator[Said]:
        _keep(self._manifests, manifest)
        plan, following = self._plans.get(manifest.round), self._plans.get(manifest.round + 1)
        if plan is not None and (manifest.plan, manifest.base) != (plan.hash, plan.base):
            yield self._alarm(f"the manifest of round {manifest.round} belongs to another plan")
        if following is not None and following.base != manifest.root:
            yield self._alarm(
                f"the plan of round {following.round} goes on from another checkpoint than the one sealed"
            )
        self.rounds += 1
        present = sum(part is not None for part in manifest.parts)
        slots = "?" if plan is None else str(len(plan.roster))
        verdicts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self._verdicts.items())) or "none"
        yield Said(
            "round",
            f"round {manifest.round:<5} sealed   {slots} slots   parts {present}/{len(manifest.parts)}   "
            f"root {manifest.root.hex()[:16]}   verdicts {verdicts}   log {self.verified:,} verified",
            {
                "round": manifest.round,
                "slots": None if plan is None else len(plan.roster),
                "parts": present,
                "of": len(manifest.parts),
                "root": manifest.root.hex(),
                "verdicts": dict(sorted(self._verdicts.items())),
                "log_verified": self.verified,
            },
        )

    def _headed(self, head: LogHead) -> Iterator[Said]:
        try:
            log_ranges.require_extended(self.log, head)
        except HashMismatchError as error:
            yield self._alarm(str(error))
            return
        if self.head is None or head.sequence > self.head.sequence:
            self.head = head


def _keep(kept: OrderedDict[int, Any], record: RoundPlan | RoundManifest) -> None:
    kept[record.round] = record
    while len(kept) > ROUNDS_KEPT:
        kept.popitem(last=False)


def observe(where: str, *, run: str | None, listen: str, rounds: int | None, as_json: bool) -> int:
    """Follow the run that is gossiped at a multiaddr, or of the coordinator at a URL, until it ends, or for so many rounds.

    The exit code is 1 if anything did not fit.

    Raises:
        SwarmError: nobody gossips there.
    """
    return asyncio.run(_observe(where, run, listen, rounds, as_json))


async def _observe(where: str, run: str | None, listen: str, rounds: int | None, as_json: bool) -> int:
    def tell(said: Said) -> None:
        if as_json:
            sys.stdout.write(json.dumps({"event": said.event, **said.details}) + "\n")
        elif said.text:
            sys.stdout.write(f"{'ALARM: ' if said.event == 'alarm' else ''}{said.text}\n")
        sys.stdout.flush()

    addresses, spec_bytes = await (_of_address(where, run) if where.startswith("/") else _of_coordinator(where, run))
    found = Observation(RunSpec.decode(spec_bytes))
    run_id, coordinator = found.spec.run_id.hex(), peer_id(bytes.fromhex(found.spec.coordinator))
    tell(
        Said(
            "observing",
            f"observing  {found.spec.name}, run {run_id}\nsigned by  {coordinator}"
            + ("" if run else f"\n           (as {where} says; pin it with --run)"),
            {"name": found.spec.name, "run": run_id, "coordinator": coordinator},
        )
    )
    async with GossipSupervisor(Identity.generate(), spec_bytes, listen=[listen], bootstrap=addresses) as gossip:
        await _follow(gossip, found, rounds, tell)
    return 1 if found.alarms else 0


async def _of_coordinator(url: str, run: str | None) -> tuple[list[str], bytes]:
    """Where the coordinator at a URL gossips, and its run's spec."""
    from swarm_protocol.client import CoordinatorClient

    async with await CoordinatorClient.connect(url) as client:
        said = await client.json("/gossip")
        _require(run, client.spec, url)
        spec = client.spec.encode()
    found = wire.text_list(said.get("multiaddrs"), wire.MAX_ADDRESSES)
    if not found:
        raise ConfigurationError(f"the coordinator at {url} does not gossip; give the multiaddr of somebody who does")
    return found, spec


async def _of_address(address: str, run: str | None) -> tuple[list[str], bytes]:
    """An address where a run is gossiped, and the spec of that run."""
    async with GossipProcess() as process:
        data = await process.client.ask_spec(address)
    _require(run, RunSpec.decode(data), address)
    return [address], data


def _require(run: str | None, spec: RunSpec, where: str) -> None:
    found = spec.run_id.hex()
    if run is not None and found != run:
        raise HashMismatchError(f"run {found} is gossiped at {where}, not {run}")


async def _follow(gossip: GossipSupervisor, found: Observation, rounds: int | None, tell: Any) -> None:
    conflicts = asyncio.create_task(_conflicts(gossip, found, tell))
    growing: asyncio.Task[None] | None = None
    try:
        async for envelope in gossip.records():
            for said in found.take(envelope):
                tell(said)
            if found.behind() is not None and (growing is None or growing.done()):
                growing = asyncio.create_task(_grow(gossip, found, tell))
            if found.ended or (rounds is not None and found.rounds >= rounds):
                break
        if found.behind() is not None and growing is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_RANGES_S):
                    await growing
    finally:
        for task in (conflicts, growing):
            if task is not None:
                task.cancel()
        await asyncio.gather(conflicts, *([growing] if growing else []), return_exceptions=True)


async def _grow(gossip: GossipSupervisor, found: Observation, tell: Any) -> None:
    """Fetch what the log has more, from whichever peer has it, now or later."""
    without: LogHead | None = None
    while (head := found.behind()) is not None:
        wanted = wire.Wanted("log", first=found.log.size, count=RANGE, size=head.sequence)
        check = partial(_check, found.log, head)
        try:
            data = await gossip.client.fetch(wanted, check)
        except UnreachableError as error:
            if (alarm := await _compare(gossip, found, head)) is not None:
                tell(alarm)
                return
            if without != head:
                text = f"log        {found.verified:,} records verified, and no peer has more yet: {error}"
                tell(Said("log", text, {"size": found.verified}))
            without = head
            await asyncio.sleep(ASK_AGAIN_S)
            continue
        for said in found.grow(data, head):
            tell(said)


def _check(log: Log, head: LogHead, data: bytes) -> None:
    log_ranges.checked(data, log, head)


async def _compare(gossip: GossipSupervisor, found: Observation, head: LogHead) -> Said | None:
    """If peers have a log under this head that ours does not begin, the coordinator signed two histories."""
    fresh = Log()
    try:
        while fresh.size < found.log.size:
            wanted = wire.Wanted("log", first=fresh.size, count=RANGE, size=head.sequence)
            data = await gossip.client.fetch(wanted, partial(_check, fresh, head))
            _, fresh = log_ranges.checked(data, fresh, head)
    except UnreachableError:
        return None
    return found.rewritten(fresh, head)


async def _conflicts(gossip: GossipSupervisor, found: Observation, tell: Any) -> None:
    """Equivocations that our own gossip process noticed: told, and gossiped on as proofs."""
    reporter, count = Identity.generate(), 0
    while True:
        conflict = await gossip.conflict()
        record = conflict.first.open()
        report = Equivocation(
            run=found.spec.run_id,
            round=record.round,
            sequence=count,
            first=conflict.first.encode(),
            second=conflict.second.encode(),
        )
        count += 1
        try:
            proved = proved_by(report)
            tell(found.equivocated(f"{peer_id(proved.key)} {proved.what}"))
            await gossip.publish(Envelope.sign(reporter, report))
        except SwarmError:
            continue
