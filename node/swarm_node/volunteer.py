"""The life of a volunteer: join, keep the checkpoint current, take a slot in each round, and leave without losing anything.

The node follows what the coordinator has signed, not its own clock: plan, commitment set, manifest, beacon. Each step can be
repeated after a crash; each wait ends by a record, by a deadline, or by the donor's Ctrl-C.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from swarm_node import contribution as contributions
from swarm_node import evidence, reduction_evidence
from swarm_node.activity import Activity
from swarm_node.averages import Averages
from swarm_node.checkpoints import CheckpointKeeper
from swarm_node.conduct import HONEST, Conduct
from swarm_node.contribution import Contribution, Progress
from swarm_node.evidence import Evidence
from swarm_node.exchange import Exchange, ExchangeDesk
from swarm_node.faults import NONE, Faults
from swarm_node.folder import DataFolder, RunFolder
from swarm_node.measured import Measured
from swarm_node.presence import stay_connected
from swarm_protocol import PROTOCOL_VERSION, __version__, audit, data, fetch
from swarm_protocol import checkpoint as checkpoints
from swarm_protocol.auditor import Auditor
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.client import Commitments, CoordinatorClient, SealedRound
from swarm_protocol.errors import InvalidDataError, RefusedError, SwarmError, UnreachableError
from swarm_protocol.fingerprint import fingerprint_hash, runtime_fingerprint
from swarm_protocol.http import persist
from swarm_protocol.layout import require_same
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Commitment, Envelope, NonceOpening, Ready, Record, Registration, RoundPlan
from swarm_protocol.signing import SigningLedger
from swarm_protocol.throttle import TokenBucket
from swarm_protocol.training import NonFiniteError, TrainingCancelledError

log = logging.getLogger(__name__)

PATIENCE_S = 24 * 3600.0
POLL_S = 15.0
CANCELLATIONS = 10

T = TypeVar("T")


class Volunteer:
    """One node in one run. `run` returns when the run is over, or when the donor asked to stop and the work is done."""

    def __init__(
        self,
        client: CoordinatorClient,
        folder: DataFolder,
        ledger: SigningLedger,
        plane: PeerPlane,
        *,
        name: str,
        team: str = "",
        device: str,
        threads: int,
        say: Callable[[str], None],
        conduct: Conduct = HONEST,
        faults: Faults = NONE,
        audits: bool = False,
        download_limit: TokenBucket | None = None,
    ) -> None:
        self._client = client
        self._spec = client.spec
        self._folder = folder
        self._run_folder: RunFolder = folder.run(client.spec)
        self._ledger = ledger
        self._plane = plane
        self._device = device
        self._say = say
        self._conduct = conduct
        self._audits = audits
        self._threads = threads
        self._key = ledger.identity.public_key
        self._fingerprint = runtime_fingerprint(device, threads)
        self._faults = Faults((*faults.planned, *conduct.faults.planned))
        self._evidence = Evidence(self._faults, shards=self._run_folder.shards)
        self._measured = Measured()
        self._vector = np.empty(client.spec.num_trainable, np.float32)
        self._desk = ExchangeDesk()
        self._keeper = CheckpointKeeper(
            client,
            plane,
            ledger,
            self._run_folder,
            self._evidence,
            say=say,
            fetching=partial(self._tell, "fetching the checkpoint"),
            limit=download_limit,
            faults=self._faults,
        )
        self._stopping = asyncio.Event()
        self._trunk: fetch.Float32 | None = None
        self._tokens_per_s = 1000.0
        self._background: set[asyncio.Task[None]] = set()
        self._last_round: int | None = None
        self.progress = Activity(name, ledger.identity.peer_id, client.spec.run_id.hex(), team=team)

    def finish(self) -> None:
        """Take no new work; `run` returns once the current contribution is complete."""
        self._stopping.set()

    async def run(self) -> None:
        """Take part until the run ends or `finish` was called.

        Raises:
            RefusedError: the coordinator does not want this node (wrong version, wrong token, standing ended).
            UnreachableError: the coordinator was gone for longer than `PATIENCE_S`.
        """
        self._evidence.restore(self._spec, self._run_folder)
        await self._keeper.restore()
        served = {**self._evidence.handlers, **reduction_evidence.handlers(self._spec, self._run_folder)}
        await self._plane.serve({**self._conduct.evidence(served), **self._desk.handlers, **self._keeper.handlers})
        await self._register()
        shards = await self._patiently(lambda: fetch.Shards.open(self._client, self._run_folder.shards))
        presence = asyncio.create_task(stay_connected(self._client, self._plane, self._ledger))
        announcing = asyncio.create_task(self._keeper.announce())
        auditing = asyncio.create_task(self._audit()) if self._audits else None
        try:
            self._tell("fetching what the run starts from")
            self._trunk = await self._patiently(self._keeper.trunk)
            while not self._stopping.is_set():
                status = await self._patiently(self._client.status)
                checkpoint = await self._patiently(self._keeper.catch_up)
                if status["phase"] == "finished" and checkpoint.round == status["round"]:
                    held = f"{checkpoint.round} rounds, checkpoint {checkpoint.root.hex()[:12]}"
                    self._say(f"The run is finished, {status['ended']}: {held}.")
                    break
                try:
                    plan = await self._wait_for_plan(checkpoint)
                except RefusedError as error:
                    if error.code != "run-finished":
                        raise
                    continue
                if plan is not None:
                    self._in_background(self._client.check_receipts(plan))
                    await self._take_part(plan, checkpoint, shards)
            await self._serve_out()
        finally:
            ending = [task for task in (presence, announcing, auditing, *self._background) if task is not None]
            await _end(ending)
            self._tell("stopped")

    # Joining

    async def _register(self) -> None:
        await self._sign_next_and_post(
            lambda sequence: Registration(
                run=self._spec.run_id,
                round=0,
                sequence=sequence,
                protocol=PROTOCOL_VERSION,
                name=self.progress.name,
                agent=f"swarm-node {__version__}",
                device=str(self._fingerprint.get("device_name", self._device))[:100],
                fingerprint=fingerprint_hash(self._fingerprint),
                team=self.progress.team,
            )
        )
        self._say(f"Joined {self._spec.name!r} as {self.progress.name} ({self.progress.peer}).")

    async def _audit(self) -> None:
        """Audit others' contributions beside our own work, where the run owner has appointed us."""
        self._say(f"Auditing as well, once the run owner has appointed {self.progress.peer}.")
        auditor = Auditor(
            self._client, self._plane, self._ledger, self._run_folder.root,
            device=self._device, threads=self._threads,
        )  # fmt: skip
        await auditor.run()

    # A round

    async def _wait_for_plan(self, checkpoint: Checkpoint) -> RoundPlan | None:
        """Say that we are ready until the round is planned; None when the donor wants to stop or the run is over."""
        self._tell("waiting for the round to start", round=checkpoint.round)
        pause_s = min(POLL_S, self._spec.rounds.presence_s / 3)
        while not self._stopping.is_set():
            try:
                await self._sign_next_and_post(
                    lambda sequence: Ready(
                        run=self._spec.run_id,
                        round=checkpoint.round,
                        sequence=sequence,
                        base=checkpoint.root,
                        tokens_per_s=self._tokens_per_s,
                        can_reduce=self._plane.reachable,
                        upload_bytes_per_s=self._measured.upload_bytes_per_s,
                    )
                )
            except RefusedError as error:
                if error.status == 403 or error.code == "run-finished":
                    raise
                log.info("the coordinator does not wait for us in round %d: %s", checkpoint.round, error)
            plan = await self._unless_stopping(
                self._patiently(lambda: self._client.plan(checkpoint.round, wait_s=pause_s))
            )
            if plan is not None:
                return plan
            await self._say_what_we_wait_for()
            if (await self._patiently(self._client.latest_checkpoint))[0] > checkpoint.round:
                return None
        return None

    async def _say_what_we_wait_for(self) -> None:
        """Where we stand on the way to a slot, when that has changed."""
        try:
            sentence = str((await self._client.place(self._key)).get("sentence", ""))[:300]
        except (UnreachableError, RefusedError, InvalidDataError) as error:
            log.info("the coordinator does not say where we stand: %s", error)
            return
        if sentence != self.progress.place:
            self._say(f"Waiting: {sentence}.")
        self.progress.place = sentence
        self._tell("waiting for the round to start")

    async def _take_part(self, plan: RoundPlan, checkpoint: Checkpoint, shards: fetch.Shards) -> None:
        slot = plan.slot_of(self._key)
        if slot is None:
            await self._say_what_we_wait_for()
        else:
            self.progress.place = ""
        closing = asyncio.create_task(self._commitments(plan))
        try:
            mine = None if slot is None else await self._contribute(plan, slot, checkpoint, shards, closing)
            self._tell("waiting for the others" if mine else "following the round", round=plan.round)
            commitments = await closing
        finally:
            closing.cancel()
        exchange = Exchange(
            self._spec, plan, commitments, plane=self._plane, client=self._client, ledger=self._ledger,
            folder=self._run_folder, evidence=self._evidence, vector=self._vector, measured=self._measured,
            faults=self._faults,
        )  # fmt: skip
        await self._desk.open(exchange)
        if mine is not None:
            self._tell("exchanging", round=plan.round)
        moving = asyncio.create_task(exchange.run(mine))
        try:
            sealed = await self._manifest(plan)
        finally:
            moving.cancel()
            for outcome in await asyncio.gather(moving, return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.warning("our share in the exchange of round %d failed: %s", plan.round, outcome)
            await exchange.stop()
            await self._desk.open(None)
            await asyncio.to_thread(self._evidence.write)
            gc.collect()  # cancelled tasks and their frames hold each other, and some megabytes of parts
        if mine is not None:
            self._in_background(self._open_nonce(plan, mine))
            self._in_background(self._keep_what_is_drawn(plan, mine))
        await self._keeper.hold(await self._advance(plan, checkpoint, sealed, exchange.averages))
        self._in_background(self._forget(plan.round - self._spec.rounds.keep_rounds))

    async def _contribute(
        self,
        plan: RoundPlan,
        slot: int,
        checkpoint: Checkpoint,
        shards: fetch.Shards,
        closing: asyncio.Task[Commitments],
    ) -> Contribution | None:
        """Train our slot, unless a finished contribution is on disk, and commit to it; None if it came too late."""
        work = self._run_folder.work(plan.round)
        mine = await asyncio.to_thread(contributions.load, self._spec, work, plan.hash)
        signed = self._ledger.find(self._spec.run_id, Commitment.kind, plan.round, 0)
        if mine is None and signed is not None:
            self._say(f"Round {plan.round}: we committed to work that is no longer on this disk; sitting it out.")
            return None
        if mine is None:
            mine = await self._train(plan, slot, checkpoint, shards, closing)
            if mine is None:
                return None
        self._evidence.add(plan.round, mine)
        try:
            if signed is None:
                commitment = mine.commitment(self._spec, plan, fingerprint_hash(self._fingerprint))
                signed = await asyncio.to_thread(self._ledger.sign, commitment)
            await self._post(signed)
        except RefusedError as error:
            if error.status == 403:
                raise
            self._say(f"Round {plan.round}: the commitment came too late ({error}).")
            return None
        self.progress.contributions += 1
        self._last_round = plan.round
        self._say(f"Round {plan.round}: slot {slot} committed, training loss {mine.loss:.3f}.")
        return mine

    async def _train(
        self,
        plan: RoundPlan,
        slot: int,
        checkpoint: Checkpoint,
        shards: fetch.Shards,
        closing: asyncio.Task[Commitments],
    ) -> Contribution | None:
        needed = data.shards_of(self._spec, plan, slot, shards.manifest)
        await self._patiently(lambda: shards.ensure(needed))
        stop = threading.Event()
        closing.add_done_callback(lambda _: stop.set())
        seat = plan.roster[slot]
        loop = asyncio.get_running_loop()

        def on_step(step: int, loss: float) -> None:
            loop.call_soon_threadsafe(self._tell, "training", plan.round, step + 1, seat.steps, loss)

        self._tell("training", plan.round, 0, seat.steps)
        started = time.monotonic()
        try:
            mine = await asyncio.to_thread(
                contributions.make, self._spec, plan, slot, checkpoint, shards.dataset,
                self._run_folder.work(plan.round), Progress(on_step, stop.is_set, self._device, trunk=self._trunk),
                self._conduct.train, self._conduct.encode,
            )  # fmt: skip
        except TrainingCancelledError:
            self._say(f"Round {plan.round}: the round closed before our training was done.")
            return None
        except NonFiniteError as error:
            self._say(f"Round {plan.round}: {error}")
            return None
        except asyncio.CancelledError:
            stop.set()
            raise
        self._tokens_per_s = max(1e-3, seat.steps * self._spec.tokens_per_step / (time.monotonic() - started))
        return mine

    async def _advance(
        self, plan: RoundPlan, checkpoint: Checkpoint, sealed: SealedRound, averages: Averages
    ) -> Checkpoint:
        """Apply the manifest's averages; where our root is not the manifest's, fetch the right checkpoint and say so."""
        self._tell("applying the averages", round=plan.round)
        try:
            pseudo_gradient = await averages.finish(sealed)
            following = await asyncio.to_thread(checkpoints.step, self._spec, checkpoint, pseudo_gradient)
            reason = "our checkpoint differs"
        except (UnreachableError, RefusedError, InvalidDataError) as error:
            following, reason = None, str(error)
        if following is not None and following.root == sealed.manifest.root:
            try:
                require_same(self._spec, sealed.checkpoint, following.root, checkpoint.root)
            except InvalidDataError as error:
                log.error("round %d: %s", plan.round, error)
                self._say(f"Round {plan.round}: {error}.")
            missing = sealed.manifest.parts.count(None)
            note = f", {missing} of {len(sealed.manifest.parts)} parts missing" if missing else ""
            self._say(f"Round {plan.round}: sealed, checkpoint {following.root.hex()[:12]}{note}.")
            return following
        self._say(f"Round {plan.round}: {reason}; fetching checkpoint {sealed.manifest.root.hex()[:12]} instead.")
        return await self._patiently(lambda: self._keeper.fetch(plan.round + 1, sealed.manifest.root))

    async def _open_nonce(self, plan: RoundPlan, mine: Contribution) -> None:
        opening = NonceOpening(run=self._spec.run_id, round=plan.round, slot=mine.slot, nonce=mine.nonce)
        with contextlib.suppress(RefusedError):  # too late means a certain audit, nothing worse
            await self._sign_and_post(opening)

    async def _keep_what_is_drawn(self, plan: RoundPlan, mine: Contribution) -> None:
        """When the audit draw is known, keep the states that an auditor will ask for and delete the others."""
        while True:
            if await self._patiently(lambda: self._client.beacon(plan.round, wait_s=POLL_S)) is not None:
                break
        seat = (await self._patiently(lambda: self._client.round_detail(plan.round)))["roster"][mine.slot]
        drawn: list[int] = seat["segments"] or []
        needed = audit.needed_states(self._spec, plan.roster[mine.slot].steps, drawn) if drawn else ()
        await asyncio.to_thread(self._evidence.narrow, plan.round, mine, needed)

    async def _forget(self, before: int) -> None:
        """Delete rounds before this one, unless an auditor still wants their evidence."""
        old = [number for number in self._run_folder.rounds() if number < before]
        done = [number for number in old if not await self._wanted(number)]
        self._evidence.forget(done)
        self._run_folder.forget(done)

    async def _wanted(self, round_number: int) -> bool:
        detail = await self._patiently(lambda: self._client.round_detail(round_number))
        return evidence.is_wanted(detail, self.progress.peer)

    async def _commitments(self, plan: RoundPlan) -> Commitments:
        while True:
            found = await self._patiently(lambda: self._client.commitments(plan, wait_s=POLL_S))
            if found is not None:
                return found

    async def _manifest(self, plan: RoundPlan) -> SealedRound:
        while True:
            found = await self._patiently(lambda: self._client.manifest(plan, wait_s=POLL_S))
            if found is not None:
                return found

    # Leaving

    async def _serve_out(self) -> None:
        """Serve evidence until our open audits have their verdict, and those of the averages of our last round; no longer
        than the time that the spec gives for evidence."""
        if self._last_round is None:
            return
        self._tell("serving evidence to auditors")
        last = self._last_round
        with contextlib.suppress(TimeoutError, SwarmError):
            async with asyncio.timeout(self._spec.audit.evidence_s):
                await asyncio.gather(*self._background, return_exceptions=True)
                while await self._patiently(lambda: self._client.beacon(last, wait_s=POLL_S)) is None:
                    pass
                while await self._audits_pending() or await self._wanted(last):  # noqa: ASYNC110  # the event is at the coordinator
                    await asyncio.sleep(0.5)

    async def _audits_pending(self) -> bool:
        node = await self._patiently(lambda: self._client.node(self._key))
        return bool(node["pending_audits"])

    # Small things

    async def _sign_and_post(self, record: Record) -> None:
        await self._post(await asyncio.to_thread(self._ledger.sign, record))

    async def _sign_next_and_post(self, make: Callable[[int], Record]) -> None:
        await self._post(await asyncio.to_thread(self._ledger.sign_next, make))

    async def _post(self, envelope: Envelope) -> None:
        await self._patiently(lambda: self._client.post(envelope))

    async def _patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        def waiting(reason: str) -> None:
            log.info("%s; trying again", reason)

        return await persist(attempt, deadline_s=PATIENCE_S, waiting=waiting)

    async def _unless_stopping(self, work: Awaitable[T]) -> T | None:
        """The result of `work`, or None as soon as the donor asks to stop."""
        task = asyncio.ensure_future(work)
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            stop.cancel()
            task.cancel()

    def _in_background(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _tell(
        self, state: str, round: int | None = None, step: int = 0, steps: int = 0, loss: float | None = None
    ) -> None:
        progress, held = self.progress, self._keeper.current
        if held is not None:
            progress.checkpoint = {"round": held.round, "root": held.root.hex()}
        progress.state, progress.step, progress.steps = state, step, steps
        progress.round = progress.round if round is None else round
        progress.loss = progress.loss if loss is None else loss
        progress.bytes_sent, progress.bytes_received = self._plane.traffic.sent, self._plane.traffic.received
        progress.exchange = self._measured.describe(self._plane.traffic, self._client.traffic)
        self._folder.write_status(progress.__dict__)


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel until all have ended. Once is not always enough: `asyncio.wait_for`, which hivemind uses, may swallow it."""
    pending = set(tasks)
    for _ in range(CANCELLATIONS):
        for task in pending:
            task.cancel()
        if pending:
            _, pending = await asyncio.wait(pending, timeout=1.0)
    if pending:
        log.warning("%d tasks do not end", len(pending))
    await asyncio.gather(*(set(tasks) - pending), return_exceptions=True)
