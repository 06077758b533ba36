"""`swarm-node verify log`: the whole run worked out from its log alone, and held against what the coordinator says.

Everything that `verify draws` compares, and besides: the statements of credit in the log, everybody's balance, and that the
log extends every head that was verified before and kept in this data directory. That nothing differs shows that signatures,
plans, draws, outcomes and credit follow from the log that is served here, and that nothing in it was changed since the
heads seen before. Whether others are served the same log is for those to say who compare its root.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from swarm_node.verifying_draws import PATIENCE_S, Check, different
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError, InvalidDataError, RefusedError
from swarm_protocol.files import write_atomic
from swarm_protocol.http import persist
from swarm_protocol.identity import peer_id
from swarm_protocol.ledger import Balance
from swarm_protocol.ledger_history import totals
from swarm_protocol.log import verify_consistency
from swarm_protocol.records import Envelope, LogHead

HEADS_FILE = "log-heads.json"
PAGE = 500


def verify(url: str, data_dir: Path, *, as_json: bool) -> int:
    """Download the log, replay, compare and report; the exit code is 0 only if nothing differs.

    Raises:
        SwarmError: the coordinator does not answer.
    """
    return asyncio.run(_verify(url, data_dir, as_json))


async def _verify(url: str, data_dir: Path, as_json: bool) -> int:
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    client = await persist(lambda: CoordinatorClient.connect(url), deadline_s=PATIENCE_S)
    async with client:
        found = await compare(client, SeenHeads(data_dir), lambda text: console.print(text, markup=False))
    if as_json:
        print(json.dumps(found))
    return 0 if found["agree"] else 1


async def compare(client: CoordinatorClient, seen: SeenHeads, say: Callable[[str], None]) -> dict[str, Any]:
    """What follows from the log, and where the coordinator says something else; `say` gets the report, line by line.

    Raises:
        SwarmError: the coordinator does not answer, or the file of heads cannot be read.
    """
    check = LogCheck(client)
    before = seen.of(client)
    differences = await check.settled(check.status)
    rewritten = await check.rewritten(before)
    differences += rewritten
    for number in range(len(check.history.rounds)):
        if not check.broken:
            differences += await check.settled(partial(check.round, number))
    for more in (check.balances, check.head):
        if not check.broken:
            differences += await check.settled(more)
    if check.signed is not None and not check.broken and not rewritten:
        seen.keep(client, *check.signed)
    found = check.found(differences) | check.report(before)
    for line in _lines(found):
        say(line)
    for difference in differences:
        say(f"DIFFERENT: {difference}")
    say(f"{len(differences)} different." if differences else "The coordinator says what follows from its log.")
    return found


class LogCheck(Check):
    """A history under way with its ledger, and the coordinator to compare it with."""

    def __init__(self, client: CoordinatorClient) -> None:
        super().__init__(client)
        self.kinds = Counter[str]()
        self.signed: tuple[LogHead, Envelope] | None = None

    async def entries(self, first: int, size: int) -> AsyncIterator[Envelope]:
        async for envelope in super().entries(first, size):
            self.kinds[envelope.open().kind] += 1
            yield envelope

    async def rewritten(self, before: tuple[int, bytes] | None) -> list[str]:
        """Whether the log does not begin with the one that was verified before."""
        if before is None:
            return []
        size, root = before
        rewritten = (
            f"HISTORY WAS REWRITTEN: the log of {size} records that was verified before had the root {root.hex()}"
        )
        log = self.history.log
        if log.size >= size:
            now_root = log.root(size)
            return [] if now_root == root else [f"{rewritten}; as many have {now_root.hex()} now"]
        # The replay stopped before: the coordinator's own proof has to do.
        now, head = await self._client.log_head()
        if now < size:
            return [f"{rewritten}; now it has {now} records"]
        try:
            answer = await self._client.json("/log/consistency", old=size, size=now)
            verify_consistency(size, now, [bytes.fromhex(one) for one in answer["proof"]], root, head)
        except (InvalidDataError, RefusedError, KeyError, TypeError, ValueError):
            return [f"{rewritten}; the coordinator cannot show that the {now} records that it serves now extend it"]
        return []

    async def balances(self) -> list[str]:
        """What everybody has earned."""
        said = {str(one["key"]): one async for one in self._contributors()}
        balances = self.history.ledger.balances
        differences = different("who contributed", sorted(said), sorted(key.hex() for key in self.history.accounts))
        for key, one in said.items():
            balance = balances.get(bytes.fromhex(key), Balance(bytes.fromhex(key)))
            follows = {"pending": balance.pending, "settled": balance.settled, "forfeited": balance.forfeited}
            differences += different(f"credit of {peer_id(balance.key)}", one, follows)
        return differences

    async def head(self) -> list[str]:
        """The signed head, and that no statement is missing at the log's end."""
        head, envelope = await self._client.signed_log_head()
        log = self.history.log
        if (head.sequence, head.root) == (log.size, log.root()):
            self.signed = (head, envelope)
        missing = ["the log ends where a credit statement was due"] if self.history.ledger.overdue else []
        return missing + different("the signed head", (head.sequence, head.root.hex()), (log.size, log.root().hex()))

    def report(self, before: tuple[int, bytes] | None) -> dict[str, Any]:
        """What the log holds, in numbers."""
        ledger = self.history.ledger
        credit = totals(ledger.balances)
        return {
            "records": dict(sorted(self.kinds.items())),
            "audits": self.counts(averages=False),
            "part_audits": self.counts(averages=True),
            "credit": {
                "contributors": len(ledger.balances),
                "statements": ledger.statements,
                "pending": credit.pending,
                "settled": credit.settled,
                "forfeited": credit.forfeited,
            },
            "checkpoint": {"round": ledger.sealed_rounds, "root": ledger.checkpoint.hex()},
            "ended": None if ledger.ended is None else ledger.ended.reason,
            "seen_before": None if before is None else {"size": before[0], "root": before[1].hex()},
        }

    async def _contributors(self) -> AsyncIterator[dict[str, Any]]:
        after: dict[str, str] = {}
        while True:
            page = await self._client.json("/contributors", limit=PAGE, **after)
            found, following = page.get("contributors"), page.get("next")
            if not isinstance(found, list) or not all(_is_contributor(one) for one in found):
                raise InvalidDataError("the coordinator's contributors are not a list of them")
            for one in found:
                yield one
            if following is None:
                return
            if not found or str(following) <= after.get("after", ""):
                raise InvalidDataError("the coordinator's pages of contributors do not go on")
            after = {"after": str(following)}


class SeenHeads:
    """The newest head of each run's log that was replayed here without a contradiction: a small file in the data directory.

    With it is the signed head: together with a later one that does not extend it, it proves that history was rewritten.
    """

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / HEADS_FILE

    def of(self, client: CoordinatorClient) -> tuple[int, bytes] | None:
        """Size and root, or None if no log of this run and coordinator was verified before.

        Raises:
            ConfigurationError: the file is damaged.
        """
        found = self._load().get(_name(client))
        if found is None:
            return None
        try:
            return int(found["size"]), bytes.fromhex(found["root"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged() from error

    def keep(self, client: CoordinatorClient, head: LogHead, signed: Envelope) -> None:
        """Remember a verified head."""
        entry = {"size": head.sequence, "root": head.root.hex(), "signed": signed.encode().hex()}
        heads = self._load() | {_name(client): entry}
        write_atomic(self._path, json.dumps(heads, indent=1, sort_keys=True).encode())

    def _load(self) -> dict[str, Any]:
        try:
            heads = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise self._damaged() from error
        if not isinstance(heads, dict):
            raise self._damaged()
        return heads

    def _damaged(self) -> ConfigurationError:
        return ConfigurationError(
            f"{self._path} cannot be read; it holds the log heads seen before. Restore it, or delete it to start anew"
        )


def _name(client: CoordinatorClient) -> str:
    return f"{client.spec.run_id.hex()}/{client.spec.coordinator}"


def _is_contributor(one: object) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("key"), str):
        return False
    try:
        return len(bytes.fromhex(one["key"])) == 32
    except ValueError:
        return False


def _lines(found: dict[str, Any]) -> list[str]:
    """The report for people."""
    log, credit, checkpoint = found["log"], found["credit"], found["checkpoint"]

    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "none"

    before = found["seen_before"]
    return [
        f"log        {log['size']:,} records, root {log['root']}",
        f"records    {listed(found['records'])}",
        f"before     {before['size']:,} records, root {before['root']}"
        if before
        else "before     nothing verified here yet",
        f"rounds     {len(found['rounds'])} planned, {checkpoint['round']} sealed, checkpoint {checkpoint['root']}"
        + (f"; the run has ended: {found['ended']}" if found["ended"] else ""),
        f"audits     {listed(found['audits'])}; of averages: {listed(found['part_audits'])}",
        f"credit     {credit['contributors']:,} contributors, {credit['statements']:,} statements; megaflops: "
        f"{credit['pending']:,} pending, {credit['settled']:,} settled, {credit['forfeited']:,} forfeited",
    ]
