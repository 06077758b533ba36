"""The auditor: replays contributions that were drawn, compares, and signs a verdict. A process of its own, on any machine.

It takes what the coordinator lists as open, fetches the claimed states from the node that made them, each piece checked
against the node's commitment, trains the same slot from the same checkpoint on the same data, and says how the two compare.
Auditors seldom do the same work twice, except where a rejection needs a second one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from swarm_protocol import data, fetch, replay, training
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import StateManifest, content_hash
from swarm_protocol.client import CoordinatorClient, persist
from swarm_protocol.errors import InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.fingerprint import fingerprint_hash, runtime_fingerprint
from swarm_protocol.identity import Identity
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Commitment, Outcome, RoundPlan, Verdict
from swarm_protocol.replay import Compared, Judgement
from swarm_protocol.signing import SigningLedger
from swarm_protocol.training import TrainState

log = logging.getLogger(__name__)

PATIENCE_S = 24 * 3600.0
START_PATIENCE_S = 120.0
POLL_S = 10.0
CALL_TIMEOUT_S = 10.0
PAUSE_S = 0.25
RETRY_S = 5.0
AT_ONCE = 8

T = TypeVar("T")


async def run(directory: Path, url: str, key_path: Path) -> None:
    """Audit until cancelled, with the key in `key_path`; caches data and checkpoints beside it.

    Raises:
        SwarmError: the run cannot be audited from here.
    """
    identity = Identity.load(key_path)
    folder = directory / "auditors" / identity.peer_id[-12:]
    client = await persist(lambda: CoordinatorClient.connect(url), deadline_s=START_PATIENCE_S)
    async with client:
        threads = 1
        bootstrap = await persist(lambda: _bootstrap(client), deadline_s=START_PATIENCE_S)
        training.configure(threads)
        plane = await PeerPlane.start(key_path, client.spec.run_id, initial_peers=bootstrap, client_only=True)
        try:
            with SigningLedger(folder / "signed.db", identity) as ledger:
                await Auditor(client, plane, ledger, folder, threads=threads).run()
        finally:
            await plane.close()


async def _bootstrap(client: CoordinatorClient) -> list[str]:
    peers = (await client.status())["peers"]
    if not peers:
        raise UnreachableError("the run's peer plane is not up yet")
    return [str(peer) for peer in peers]


@dataclass(frozen=True)
class _Case:
    """One contribution to be audited, with everything public about it."""

    plan: RoundPlan
    slot: int
    commitment: Commitment
    base: Checkpoint

    @property
    def node(self) -> bytes:
        return self.plan.roster[self.slot].peer


class Auditor:
    """One auditor of one run."""

    def __init__(
        self, client: CoordinatorClient, plane: PeerPlane, ledger: SigningLedger, folder: Path, *, threads: int
    ) -> None:
        self._client = client
        self._spec = client.spec
        self._plane = plane
        self._ledger = ledger
        self._key = ledger.identity.public_key
        self._folder = folder
        self._fingerprint = fingerprint_hash(runtime_fingerprint("cpu", threads))
        self._base: Checkpoint | None = None
        self._first_seen: dict[tuple[int, int], float] = {}
        self._under_way: set[tuple[int, int]] = set()
        self._replaying = asyncio.Lock()

    async def run(self) -> None:
        """Audit whatever is open, until cancelled. Evidence of several is fetched at once; one replays at a time."""
        shards = await self._patiently(lambda: fetch.Shards.open(self._client, self._folder / "shards"))
        async with asyncio.TaskGroup() as tasks:
            while True:
                open_audits = await self._patiently(lambda: self._client.open_audits(self._key, wait_s=POLL_S))
                for audit in self._due(open_audits)[: AT_ONCE - len(self._under_way)]:
                    name = (int(audit["round"]), int(audit["slot"]))
                    self._under_way.add(name)
                    tasks.create_task(self._audit(audit, shards)).add_done_callback(partial(self._ended, name))
                await asyncio.sleep(PAUSE_S)

    def _ended(self, name: tuple[int, int], _: asyncio.Task[None]) -> None:
        self._under_way.discard(name)

    def _due(self, audits: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The audits to begin now, oldest first: where it is our turn, or was another's for too long."""
        now = time.monotonic()
        names = [(int(audit["round"]), int(audit["slot"])) for audit in audits]
        self._first_seen = {name: self._first_seen.get(name, now) for name in names}
        return [
            audit
            for name, audit in zip(names, audits, strict=True)
            if name not in self._under_way
            and (audit["turn"] == self._key.hex() or now - self._first_seen[name] > self._spec.audit.evidence_s)
        ]

    async def _audit(self, audit: dict[str, Any], shards: fetch.Shards) -> None:
        round_number, slot = int(audit["round"]), int(audit["slot"])
        started = time.monotonic()
        try:
            case = await self._patiently(lambda: self._case(round_number, slot, bytes.fromhex(audit["commitment"])))
            needed = data.shards_of(self._spec, case.plan, slot, shards.manifest)
            await self._patiently(lambda: shards.ensure(needed))
            judgement, steps = await self._examine(case, shards)
        except (RefusedError, InvalidDataError) as error:
            log.warning("round %d slot %d cannot be audited here: %s", round_number, slot, error)
            await asyncio.sleep(RETRY_S)
            return
        verdict = Verdict(
            run=self._spec.run_id,
            round=round_number,
            sequence=slot,
            slot=slot,
            commitment=case.commitment.hash,
            outcome=judgement.outcome,
            comparison=judgement.comparison,
            statistic=judgement.statistic,
            reason=judgement.reason[:500],
            steps_replayed=steps,
            fingerprint=self._fingerprint,
        )
        earlier = self._ledger.find(self._spec.run_id, Verdict.kind, round_number, slot)
        envelope = earlier or self._ledger.sign(verdict)
        try:
            await self._patiently(lambda: self._client.post(envelope))
        except RefusedError as error:
            log.info("the verdict on round %d slot %d is no longer wanted: %s", round_number, slot, error)
        log.info("round %d slot %d: %s in %.1f s", round_number, slot, judgement.reason, time.monotonic() - started)

    async def _case(self, round_number: int, slot: int, commitment_hash: bytes) -> _Case:
        plan = await self._client.plan(round_number)
        if plan is None or not 0 <= slot < len(plan.roster):
            raise InvalidDataError("the audit names a round or slot that does not exist")
        envelope = await self._client.record(commitment_hash)
        holder = plan.roster[slot].peer
        commitment = envelope.open_as(Commitment, run=self._spec.run_id, round=round_number, key=holder)
        base = self._base
        if base is None or base.root != plan.base:
            self._base = base = await fetch.checkpoint(self._client, round_number, plan.base)
        return _Case(plan, slot, commitment, base)

    async def _examine(self, case: _Case, shards: fetch.Shards) -> tuple[Judgement, int]:
        """The judgement, and how many steps were replayed for it. With exact numerics public data is all that it takes."""
        if self._spec.numerics == "exact":
            async with self._replaying:
                return await asyncio.to_thread(self._replay_exact, case, shards)
        end = time.monotonic() + self._spec.audit.evidence_s
        while True:
            try:
                claimed = await self._claimed(case)
                break
            except InvalidDataError as error:
                return Judgement(Outcome.REJECTED, None, None, f"the evidence is not what was committed to: {error}"), 0
            except (UnreachableError, RefusedError) as error:
                if time.monotonic() > end:
                    return replay.unavailable("its final state"), 0
                log.info("evidence of round %d slot %d: %s; asking again", case.plan.round, case.slot, error)
                await asyncio.sleep(1.0)
        async with self._replaying:
            return await asyncio.to_thread(self._compare, case, claimed, shards)

    async def _claimed(self, case: _Case) -> TrainState:
        """The final state that the node claims, every piece of it checked against its commitment.

        Raises:
            InvalidDataError: what the node serves is not what it committed to.
            UnreachableError, RefusedError: the node does not serve it.
        """
        segments = training.segments(self._spec, case.plan.roster[case.slot].steps)
        raw = await self._ask(case.node, {"op": "trace", "round": case.plan.round}, 32 * len(segments))
        roots = [raw[start : start + 32] for start in range(0, len(raw), 32)]
        if len(roots) != len(segments) or training.trace_root(roots) != case.commitment.trace_root:
            raise InvalidDataError("the trace is another one")
        size = training.size_bytes(self._spec)
        encoded = await self._ask(case.node, {"op": "state", "root": roots[-1]}, 64 + 32 * (size // (1 << 20) + 1))
        manifest = StateManifest.decode(encoded, max_size_bytes=size)
        if manifest.root != roots[-1] or manifest.size_bytes != size:
            raise InvalidDataError("the final state is another one")
        pieces: list[bytes] = []
        for index, digest in enumerate(manifest.hashes):
            piece = await self._ask(case.node, {"op": "get", "hash": digest}, manifest.chunk_size(index))
            if content_hash(piece) != digest:
                raise InvalidDataError("a chunk of the final state has other bytes")
            pieces.append(piece)
        return TrainState.from_bytes(self._spec, b"".join(pieces))

    async def _ask(self, node: bytes, header: dict[str, Any], max_bytes: int) -> bytes:
        _, body = await self._plane.call(node, header, max_answer_bytes=max_bytes, timeout_s=CALL_TIMEOUT_S)
        return body

    def _compare(self, case: _Case, claimed: TrainState, shards: fetch.Shards) -> tuple[Judgement, int]:
        """Replay the whole slot and judge. Blocking."""
        steps = case.plan.roster[case.slot].steps
        start = TrainState.initial(self._spec, case.base.parameters)
        replayed = training.run_segment(
            self._spec,
            start,
            lambda step: data.batch(self._spec, case.plan, case.slot, step, shards.dataset),
            steps,
        )
        same = case.commitment.fingerprint == self._fingerprint
        compared: Compared = replay.compare(self._spec, start, claimed, replayed, same_fingerprint=same)
        match = replay.parts_match(self._spec, case.base.parameters, claimed.parameters, case.commitment.parts_root)
        return replay.judge(self._spec, [compared], parts_match=match), steps

    def _replay_exact(self, case: _Case, shards: fetch.Shards) -> tuple[Judgement, int]:
        """Replay the whole slot and compare hashes. Blocking."""
        steps = case.plan.roster[case.slot].steps
        state = TrainState.initial(self._spec, case.base.parameters)
        roots: list[bytes] = []
        for _, stop in training.segments(self._spec, steps):
            state = training.run_segment(
                self._spec,
                state,
                lambda step: data.batch(self._spec, case.plan, case.slot, step, shards.dataset),
                stop,
            )
            roots.append(state.manifest().root)
        judgement = replay.judge_exact(
            trace_matches=training.trace_root(roots) == case.commitment.trace_root,
            parts_match=replay.parts_match(
                self._spec, case.base.parameters, state.parameters, case.commitment.parts_root
            ),
        )
        return judgement, steps

    async def _patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        return await persist(attempt, deadline_s=PATIENCE_S)
