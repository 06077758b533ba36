"""`swarm-node verify draws`: who had to be audited, and what came of it, worked out from the run's log alone.

The log is replayed through `history.History`, and what the coordinator says of audits and standings is held against it.
That nothing differs shows that the coordinator drew and decided by the rules, from the log that it serves here; whether
others are served the same log is for those to say who compare its root. A run that goes on is followed while this looks.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from rich.console import Console

from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import HashMismatchError, InvalidDataError
from swarm_protocol.history import History
from swarm_protocol.http import persist
from swarm_protocol.identity import peer_id
from swarm_protocol.records import Envelope
from swarm_protocol.round_history import Drawn

PATIENCE_S = 60.0

Differences = Callable[[], Awaitable[list[str]]]


def verify(url: str, *, as_json: bool) -> int:
    """Replay the log, compare and report; the exit code is 0 only if the coordinator says the same.

    Raises:
        SwarmError: the coordinator does not answer.
    """
    return asyncio.run(_verify(url, as_json))


async def _verify(url: str, as_json: bool) -> int:
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    client = await persist(lambda: CoordinatorClient.connect(url), deadline_s=PATIENCE_S)
    async with client:
        found = await compare(client, lambda text: console.print(text, markup=False))
    if as_json:
        print(json.dumps(found))
    return 0 if found["agree"] else 1


async def compare(client: CoordinatorClient, say: Callable[[str], None]) -> dict[str, Any]:
    """What follows from the log, and where the coordinator says something else; `say` gets a line for each round.

    Raises:
        SwarmError: the coordinator does not answer.
    """
    check = Check(client)
    history, number = check.history, 0
    differences = await check.settled(check.status)
    while number < len(history.rounds):
        if not check.broken:
            differences += await check.settled(partial(check.round, number))
        say(check.line(number))
        number += 1
    for difference in differences:
        say(f"DIFFERENT: {difference}")
    verdict = f"{len(differences)} different" if differences else "the coordinator says the same"
    say(f"records in the log: {history.log.size}, rounds: {number}; {verdict}.")
    return check.found(differences)


class Check:
    """A history under way, and the coordinator to compare it with."""

    def __init__(self, client: CoordinatorClient) -> None:
        self.history = History(client.spec)
        self.broken = False
        self._client = client

    async def settled(self, differences: Differences) -> list[str]:
        """What differs, and not only because the run has gone on in between."""
        end = asyncio.get_running_loop().time() + PATIENCE_S
        try:
            await self.extend()
            while (found := await differences()) and asyncio.get_running_loop().time() < end:
                if not await self.extend():
                    break
        except InvalidDataError as error:
            self.broken = True
            return [str(error)]
        return found

    async def extend(self) -> bool:
        """Take what the log has grown by; whether it has.

        Raises:
            InvalidDataError: it contradicts itself, or does not have the root that the coordinator says.
        """
        history, before = self.history, self.history.log.size
        size, root = await self._client.log_head()
        if size < before:
            raise InvalidDataError(f"the log had {before} records and has {size} now")
        async for envelope in self.entries(before, size):
            history.add(envelope)
        if history.log.root() != root:
            raise HashMismatchError(f"the {size} records of the log have another root than the coordinator says")
        return size > before

    def entries(self, first: int, size: int) -> AsyncIterator[Envelope]:
        """The log's records from leaf `first` on, up to a size."""
        return self._client.log(first, size)

    async def status(self) -> list[str]:
        """Counts of audits, and what is said of each identity."""
        status, spec = await self._client.status(), self.history.spec
        differences = []
        for field, averages in (("audits", False), ("part_audits", True)):
            counts = self.counts(averages=averages)
            differences += different(f"{field} in the status", status[field], counts)
        known = {peer_id(key): account for key, account in self.history.accounts.items()}
        pending = Counter(peer_id(one.peer) for _, one in self._audits() if one.outcome is None)
        said_of = {str(node["peer"]): node for node in await self._client.nodes()}
        differences += different("who registered", sorted(said_of), sorted(known))
        for peer in sorted(said_of.keys() & known.keys()):
            account = known[peer]
            follows = {
                "standing": "good" if account.ended is None else "ended",
                "reason": account.ended,
                "accepted": account.accepted,
                "pending_audits": pending[peer],
                "probation": account.vouched_tokens // spec.standard_tokens < spec.audit.probation,
            }
            differences += different(peer, said_of[peer], follows)
        return differences

    async def round(self, number: int) -> list[str]:
        """Each slot's audit and segments, each average's audit, and how many verdicts there are."""
        detail = await self._client.round_detail(number)
        audits = self.history.rounds[number].audits
        roster = self.history.rounds[number].plan.roster
        differences = []
        for slot, seat in enumerate(roster):
            audit = audits.get((slot, None))
            said = _only(detail["roster"], slot=slot)
            follows = {
                "peer": peer_id(seat.peer),
                "audit": _outcome(audit),
                "segments": None if audit is None else list(audit.segments),
            }
            differences += different(f"round {number}, slot {slot}", said, follows)
        averages = {(one["reducer"], one["part"]): one["audit"] for one in detail["part_records"]}
        drawn = {(slot, part): one for (slot, part), one in audits.items() if part is not None}
        for (slot, part), one in drawn.items():
            said = averages.pop((peer_id(one.peer), part), None)
            differences += different(f"round {number}, average of part {part} by slot {slot}", said, _outcome(one))
        for (reducer, part), said in averages.items():
            differences += different(f"round {number}, average of part {part} by {reducer}", said, None)
        follows_count = sum(len(one.verdicts) for one in audits.values())
        return differences + different(f"round {number}, verdicts", len(detail["verdicts"]), follows_count)

    def line(self, number: int) -> str:
        """A round for people."""
        found = self.history.rounds[number]
        drawn, averages = [], []
        for (slot, part), audit in sorted(found.audits.items(), key=lambda one: (one[0][0], one[0][1] or 0)):
            if part is None:
                segments = ",".join(map(str, audit.segments))
                drawn.append(f"{slot} (segments {segments}) {_outcome(audit)}")
            else:
                averages.append(f"{part} (by {slot}) {_outcome(audit)}")
        contributions = "; ".join(drawn) or ("none" if found.reveal else "not yet")
        parts = "; ".join(averages) or ("none" if found.reveal else "not yet")
        return f"round {number:>4}  {len(found.plan.roster):>3} slots  drawn slots: {contributions}  drawn averages: {parts}"

    def found(self, differences: list[str]) -> dict[str, Any]:
        """Everything as JSON."""
        history = self.history
        rounds = [
            {
                "round": number,
                "slots": len(found.plan.roster),
                "drawn": found.reveal is not None,
                "contributions": [
                    {"slot": slot, "segments": list(audit.segments), "outcome": _outcome(audit)}
                    for (slot, part), audit in found.audits.items()
                    if part is None
                ],
                "averages": [
                    {"part": part, "slot": slot, "outcome": _outcome(audit)}
                    for (slot, part), audit in found.audits.items()
                    if part is not None
                ],
            }
            for number, found in enumerate(history.rounds)
        ]
        log = {"size": history.log.size, "root": history.log.root().hex()}
        return {"log": log, "rounds": rounds, "differences": differences, "agree": not differences}

    def _audits(self) -> list[tuple[int | None, Drawn]]:
        return [(part, audit) for found in self.history.rounds for (_, part), audit in found.audits.items()]

    def counts(self, *, averages: bool) -> dict[str, int]:
        """Audits of contributions, or of averages, by outcome."""
        outcomes = Counter(_outcome(audit) for part, audit in self._audits() if (part is not None) is averages)
        return {"drawn": outcomes.total(), **{name: outcomes[name] for name in OUTCOMES}}


OUTCOMES = ("pending", "accepted", "rejected", "inconclusive", "unavailable", "moot")


def _outcome(audit: Drawn | None) -> str | None:
    if audit is None:
        return None
    return "pending" if audit.outcome is None else audit.outcome.value


def _only(items: list[dict[str, Any]], **which: object) -> dict[str, Any] | None:
    return next((item for item in items if all(item.get(name) == value for name, value in which.items())), None)


def different(what: str, said: object, follows: object) -> list[str]:
    """A sentence where something else is said than follows; of what has names, only those that differ."""
    if isinstance(said, dict) and isinstance(follows, dict):
        follows = {name: value for name, value in follows.items() if said.get(name) != value}
        said = {name: said.get(name) for name in follows}
    if said == follows:
        return []
    return [f"{what}: the coordinator says {said}, from the log follows {follows}"]
