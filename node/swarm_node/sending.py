"""The sender's side of a round: every part to a reducer that signs a receipt for it, or to the next one in order.

Parts go to several reducers at once, a few at a time to each; a reducer that is slow to read holds back what is meant for
it and nothing else. One that does not answer in time is passed over for the rest of the stage. Where the average of a
part is still nowhere to be had later in the exchange, its reducer is taken for gone and the part goes to its backup.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from swarm_node import reduction_evidence
from swarm_node.contribution import Contribution
from swarm_node.faults import Faults, Point
from swarm_node.folder import RunFolder
from swarm_node.measured import Measured
from swarm_node.sketching import OwnSketches
from swarm_protocol.calls import Header
from swarm_protocol.errors import InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Envelope, PartReceipt, RoundPlan
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

IN_FLIGHT_PER_REDUCER = 2
IN_FLIGHT = 4
REDUCERS_TRIED = 3
ATTEMPT_SHARE = 0.2
"""Of the exchange time: how long one delivery may take."""

TakeOwn = Callable[[int, int], Awaitable[object]]


@dataclass(frozen=True)
class Sender:
    """Delivers one contribution, in a round that needs them with its sketches. `orders[part]` are the keys of that part's
    reducers; `take_own` delivers to ourselves.
    """

    spec: RunSpec
    plan: RoundPlan
    mine: Contribution
    orders: list[list[bytes]]
    plane: PeerPlane
    folder: RunFolder
    measured: Measured
    faults: Faults
    take_own: TakeOwn
    sketches: OwnSketches | None = None

    async def run(self, wanting: Callable[[], list[int]], stages: list[Callable[[], Awaitable[object]]]) -> None:
        """Deliver everything; then, as each of `stages` comes, deliver what `wanting()` names to the next reducers."""
        taken = await self._deliver(dict.fromkeys(range(len(self.orders)), 0))
        for stage in stages:
            await stage()
            missing = {part: taken.get(part, -1) + 1 for part in wanting()}
            if missing:
                log.info("round %d: %d parts go to backup reducers", self.plan.round, len(missing))
                self.measured.deliveries_to_backups += len(missing)
                taken |= await self._deliver(missing)

    async def _deliver(self, beginning: dict[int, int]) -> dict[int, int]:
        """Deliver these parts, each to the first reducer from this position on that takes it; returns who took which."""
        taken: dict[int, int] = {}
        silent: set[bytes] = set()
        gates: dict[bytes, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(IN_FLIGHT_PER_REDUCER))
        everywhere = asyncio.Semaphore(IN_FLIGHT)

        async def deliver(part: int, position: int) -> None:
            candidates = list(enumerate(self.orders[part][:REDUCERS_TRIED]))[position:]
            for place, reducer in candidates:
                own = reducer == self.plane.identity.public_key  # which waits for nobody's network
                async with gates[reducer], contextlib.nullcontext() if own else everywhere:
                    if reducer in silent:
                        continue
                    try:
                        await self._hand_over(part, reducer)
                        taken[part] = place
                        return
                    except UnreachableError as error:
                        silent.add(reducer)
                        reason = str(error)
                    except (RefusedError, InvalidDataError) as error:
                        reason = str(error)
                self.measured.delivery_retries += 1
                log.warning("part %d of round %d: a reducer does not take it (%s)", part, self.plan.round, reason)
            if candidates:
                log.warning("part %d of round %d found no reducer", part, self.plan.round)

        # Everybody sends a reducer its parts in the same order, so that it completes them one after the other.
        await asyncio.gather(*(deliver(part, position) for part, position in sorted(beginning.items())))
        return taken

    async def _hand_over(self, part: int, reducer: bytes) -> None:
        if reducer == self.plane.identity.public_key:
            await self.take_own(part, self.mine.slot)
            return
        await self.faults.at(Point.DELIVERING, self.plan.round)
        encoded = await asyncio.to_thread(self.mine.part, part)
        header: Header = {
            "op": "deliver",
            "round": self.plan.round,
            "part": part,
            "slot": self.mine.slot,
            "proof": list(self.mine.proof(part)),
            **({} if self.sketches is None else self.sketches.header(part)),
        }
        with self.measured.uploading(len(encoded)):
            answer, _ = await self.plane.call(
                reducer,
                header,
                bytes(self.faults.tamper(Point.DELIVERING, self.plan.round, encoded)),
                max_answer_bytes=0,
                timeout_s=max(1.0, ATTEMPT_SHARE * self.spec.rounds.exchange_s),
            )
        self._keep_receipt(part, reducer, answer.get("receipt"))

    def _keep_receipt(self, part: int, reducer: bytes, raw: object) -> None:
        """Check and store the reducer's receipt.

        Raises:
            InvalidDataError: it is not a receipt for this part by this reducer.
        """
        if not isinstance(raw, bytes):
            raise InvalidDataError("a delivery without a receipt")
        envelope = Envelope.decode(raw)
        receipt = envelope.open_as(PartReceipt, run=self.spec.run_id, round=self.plan.round, key=reducer)
        if (receipt.part, receipt.slot, receipt.part_hash) != (part, self.mine.slot, self.mine.part_hashes[part]):
            raise InvalidDataError("a receipt for another part")
        if receipt.sketches != (None if self.sketches is None else self.sketches.record_hash):
            raise InvalidDataError("a receipt for other sketches")
        reduction_evidence.note_receipt(self.folder.work(self.plan.round), part, raw)
        self.measured.receipts += 1
