"""`swarm-node verify`: replaying others' contributions at home, and finding where two replays part.

`run` replays published contributions whole, from the public checkpoint, and needs nobody's word: in exact runs the bits are
equal or they are not. In native runs other machines come close and no closer; there the states that the node keeps for its
auditors are compared segment by segment, for as long as it keeps them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from swarm_node.joining import choose_device
from swarm_protocol import audit, data, fetch, gathering, processes, training
from swarm_protocol.audit import Claims, Finding, Subject
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError, InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.exact import tracing
from swarm_protocol.exact.bisect import Observation
from swarm_protocol.fingerprint import fingerprint_hash, runtime_fingerprint
from swarm_protocol.gathering import Subjects
from swarm_protocol.http import persist
from swarm_protocol.identity import Identity, peer_id
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Outcome
from swarm_protocol.tolerances import Tolerances
from swarm_protocol.training import Tokens

PATIENCE_S = 60.0
EVIDENCE_PATIENCE_S = 20.0


@dataclass(frozen=True)
class Options:
    """What to replay, and with what. Without `round` and `slot` a sample of the sealed rounds' contributions is drawn."""

    url: str
    round: int | None
    slot: int | None
    sample: int
    device: str
    threads: int
    as_json: bool


@dataclass(frozen=True)
class Result:
    """One contribution, replayed. `holds` only where the replay vouches for it."""

    round: int
    slot: int
    peer: str
    name: str
    tokens: int
    outcome: str
    comparison: str | None
    statistic: float | None
    reason: str
    steps_replayed: int
    seconds: float

    @property
    def holds(self) -> bool:
        return self.outcome == Outcome.ACCEPTED


def verify(options: Options) -> int:
    """Replay and report; the exit code is 0 only if every contribution holds.

    Raises:
        SwarmError: nothing could be replayed.
    """
    processes.require_platform()
    results = asyncio.run(_verify(options))
    if options.as_json:
        found = [asdict(result) for result in results]
        print(json.dumps({"contributions": found, "hold": all(result.holds for result in results)}))
    return 0 if results and all(result.holds for result in results) else 1


def write_trace(options: Options, path: Path) -> None:
    """Replay one contribution of an exact run and write down every operator.

    Raises:
        SwarmError
    """
    processes.require_platform()
    asyncio.run(_trace(options, path))


def bisect(ours: Path, theirs: Path) -> int:
    """Say where two traces part; 0 where they agree, 1 where they do not.

    Raises:
        SwarmError: one of the files is no trace, or they are of different contributions.
    """
    first, second = _read(ours), _read(theirs)
    difference = tracing.first_difference(first, second)
    console = Console(highlight=False)
    console.print(f"round {first.round}, slot {first.slot} of run {first.run.hex()[:12]}")
    console.print(f"A  {ours}: {first.runtime}\nB  {theirs}: {second.runtime}", markup=False)
    if difference is None:
        console.print(f"[green]equal in all {len(first.steps)} steps, operator by operator")
        return 0
    console.print(f"they agree up to step {difference.step} of {len(first.steps)} (segment {difference.segment})")
    named = difference.ours or difference.theirs
    if named is not None:
        console.print(f"[bold]first difference: grain {named.grain}, {escape(named.operator)}")
    table = Table("", "operator", "L2 norm", "first values", "BLAKE3")
    for name, one in (("A", difference.ours), ("B", difference.theirs)):
        table.add_row(name, *_described(one))
    console.print(table)
    console.print("Everything before it is agreed on; docs/numerics.md defines what this operator gives.")
    return 1


def _read(path: Path) -> tracing.Trace:
    try:
        if path.stat().st_size > tracing.MAX_BYTES:
            raise ConfigurationError(f"{path} is larger than any trace")
        return tracing.Trace.decode(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except InvalidDataError as error:
        raise ConfigurationError(f"{path}: {error}; make one with: swarm-node verify trace") from error


def _described(one: Observation | None) -> tuple[str, str, str, str]:
    if one is None:
        return "nothing here", "", "", ""
    return (
        escape(one.operator),
        f"{one.norm:.9g}",
        ", ".join(f"{value:.9g}" for value in one.first),
        one.digest.hex()[:16],
    )


# Replaying


async def _verify(options: Options) -> list[Result]:
    async with _prepared(options) as bench:
        results = []
        for round_number, slot in await bench.chosen():
            result = await bench.replay(round_number, slot)
            bench.show(result)
            results.append(result)
        if not results:
            raise ConfigurationError("no round of this run is sealed yet; there is nothing to replay")
        held = sum(result.holds for result in results)
        bench.say(f"{held} of {len(results)} contributions hold.")
        return results


async def _trace(options: Options, path: Path) -> None:
    async with _prepared(options) as bench:
        ((round_number, slot),) = await bench.chosen()
        subject, batch = await bench.subject(round_number, slot)
        steps = subject.plan.roster[slot].steps
        bench.say(f"Round {round_number}, slot {slot}: tracing {steps} steps.")
        trace = await asyncio.to_thread(tracing.record, subject, batch, runtime=bench.runtime, device=options.device)
        roots = [trace.steps[stop - 1].root for _, stop in subject.segments]
        same = training.trace_root(roots) == subject.commitment.trace_root
        await asyncio.to_thread(path.write_bytes, trace.encode())
        bench.say(f"{path}: {'equal to' if same else 'DIFFERENT from'} what the node committed to.")


@contextlib.asynccontextmanager
async def _prepared(options: Options) -> AsyncIterator[_Bench]:
    client = await persist(lambda: CoordinatorClient.connect(options.url), deadline_s=PATIENCE_S)
    async with client, contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-verify-")))
        plane = None
        if client.spec.numerics == "native":
            plane = await _plane(client, folder)
            if plane is not None:
                stack.push_async_callback(plane.close)
        training.configure(options.threads)
        shards = await fetch.Shards.open(client, folder / "shards")
        yield _Bench(options, client, plane, folder, shards, await fetch.tolerances(client))


async def _plane(client: CoordinatorClient, folder: Path) -> PeerPlane | None:
    """The way to the nodes' evidence, under an identity for this once; None where the run is over."""
    peers = [str(peer) for peer in (await client.status())["peers"]]
    Identity.generate().save(folder / "identity")
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await PeerPlane.start(folder / "identity", client.spec.run_id, initial_peers=peers, client_only=True)
    except (UnreachableError, TimeoutError):
        return None


class _Bench:
    """Where contributions are replayed."""

    def __init__(
        self,
        options: Options,
        client: CoordinatorClient,
        plane: PeerPlane | None,
        folder: Path,
        shards: fetch.Shards,
        tolerances: Tolerances | None,
    ) -> None:
        self._options = options
        self._client = client
        self._plane = plane
        self._shards = shards
        self._tolerances = tolerances
        self._subjects = Subjects(client, folder)
        fingerprint = runtime_fingerprint(options.device, options.threads)
        self._fingerprint = fingerprint_hash(fingerprint)
        said = (str(fingerprint[name]) for name in ("cpu", "device", "torch"))
        self.runtime = f"{', '.join(said)}, {options.threads} threads"
        self._console = Console(stderr=options.as_json, highlight=False)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def show(self, result: Result) -> None:
        colour = "green" if result.holds else "red" if result.outcome == Outcome.REJECTED else "yellow"
        self._console.print(
            f"round {result.round:>4}  slot {result.slot:>3}  {escape(f'{result.name:<20.20}')} {result.tokens:>9,} tokens"
            f"  [{colour}]{result.outcome}[/]  {escape(result.reason)}  ({result.seconds:.1f} s)"
        )

    async def chosen(self) -> list[tuple[int, int]]:
        """Rounds and slots to replay."""
        options = self._options
        if options.round is not None and options.slot is not None:
            return [(options.round, options.slot)]
        status = await self._client.status()
        rounds = [int(one["round"]) for one in status["history"] if one["committed"]]
        if options.round is not None:
            rounds = [options.round]
        every: list[tuple[int, int]] = []
        wanted = rounds if options.round is not None else random.sample(rounds, min(options.sample, len(rounds)))
        for number in sorted(wanted):
            slots = sorted(await self._commitments(number))
            every += [(number, slot) for slot in slots]
        if options.round is not None:
            return every
        return sorted(random.sample(every, min(options.sample, len(every))))

    async def _commitments(self, round_number: int) -> dict[int, Any]:
        plan = await self._client.plan(round_number)
        found = None if plan is None else await self._client.commitments(plan)
        if found is None:
            raise ConfigurationError(f"round {round_number} has no contributions to replay")
        return dict(found.by_slot)

    async def subject(self, round_number: int, slot: int) -> tuple[Subject, Callable[[int], Tokens]]:
        """The contribution, and the tokens of its steps, with everything that they need on this disk."""
        commitments = await self._commitments(round_number)
        if slot not in commitments:
            raise ConfigurationError(f"slot {slot} of round {round_number} has no contribution")
        subject = await self._subjects.find(round_number, slot, commitments[slot].hash)
        await self._shards.ensure(data.shards_of(subject.spec, subject.plan, slot, self._shards.manifest))
        return subject, lambda step: data.batch(subject.spec, subject.plan, slot, step, self._shards.dataset)

    async def replay(self, round_number: int, slot: int) -> Result:
        started = time.monotonic()
        subject, batch = await self.subject(round_number, slot)
        everything = range(len(subject.segments))
        claims, missing = await self._claims(subject, everything)
        finding = await asyncio.to_thread(self._examine, subject, everything, claims, batch, missing)
        seat = subject.plan.roster[slot]
        detail = await self._client.round_detail(round_number)
        judgement = finding.judgement
        return Result(
            round=round_number,
            slot=slot,
            peer=peer_id(seat.peer),
            name=str(detail["roster"][slot]["name"]),
            tokens=subject.commitment.tokens,
            outcome=judgement.outcome.value,
            comparison=None if judgement.comparison is None else judgement.comparison.value,
            statistic=judgement.statistic,
            reason=judgement.reason,
            steps_replayed=finding.steps_replayed,
            seconds=round(time.monotonic() - started, 2),
        )

    async def _claims(self, subject: Subject, drawn: range) -> tuple[Claims | None, str]:
        """What the node still shows, where it is needed; else why it is not to be had."""
        needed = subject.needed_states(drawn)
        if not needed:
            return None, ""
        if self._plane is None:
            return None, "the run's peers are gone"
        try:
            async with asyncio.timeout(EVIDENCE_PATIENCE_S):
                return await gathering.claims(self._plane, subject, needed), ""
        except (UnreachableError, RefusedError, TimeoutError) as error:
            return None, (str(error) or "the node does not answer").splitlines()[0]
        except InvalidDataError as error:
            return None, f"what the node shows is not what it committed to: {error}"

    def _examine(
        self, subject: Subject, drawn: range, claims: Claims | None, batch: Callable[[int], Tokens], missing: str
    ) -> Finding:
        """Blocking. Without claims a native contribution can still be vouched for, where the bits happen to be equal."""
        options = self._options
        if claims is not None or subject.spec.numerics == "exact":
            return audit.examine(
                subject, drawn, claims, batch,
                fingerprint=self._fingerprint, tolerances=self._tolerances, device=options.device,
            )  # fmt: skip
        return audit.examine_alone(
            subject, batch, fingerprint=self._fingerprint, device=options.device, missing=missing
        )


def options(
    url: str,
    round_number: int | None,
    slot: int | None,
    sample: int,
    device: str,
    threads: int | None,
    *,
    as_json: bool,
) -> Options:
    """Check what was asked for.

    Raises:
        ConfigurationError
    """
    if slot is not None and round_number is None:
        raise ConfigurationError("--slot names a slot of a round; give --round as well")
    return Options(url, round_number, slot, sample, choose_device(device), threads or 1, as_json)
