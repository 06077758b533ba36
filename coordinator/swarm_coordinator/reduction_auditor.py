"""`swarm-coordinator audit-reduction`: has averages of a round judged, under a key that is thrown away. For anybody."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarm_protocol import parts
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.identity import Identity
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import PartRecord
from swarm_protocol.reduction_gathering import Reductions


async def run(url: str, round_number: int, chosen: Sequence[int] | None) -> dict[str, Any]:
    """Audit the published averages of parts of a round (None: all) of the run at `url`; returns what is printed.

    Raises:
        SwarmError: there is nothing to audit, or no way to do it from here.
    """
    with tempfile.TemporaryDirectory(prefix="swarm-audit-") as folder:
        key = Path(folder) / "identity"
        Identity.generate().save(key)
        async with await CoordinatorClient.connect(url) as client:
            _require(client, round_number, chosen or ())
            bootstrap = [str(peer) for peer in (await client.status())["peers"]]
            plane = await PeerPlane.start(key, client.spec.run_id, initial_peers=bootstrap, client_only=True)
            try:
                entries = await _judged(client, Reductions(client, plane), round_number, chosen)
            finally:
                await plane.close()
    return {"round": round_number, "records": entries}


def _require(client: CoordinatorClient, round_number: int, chosen: Sequence[int]) -> None:
    count = parts.part_count(client.spec)
    if round_number >= client.spec.rounds.count:
        raise ConfigurationError(f"the run has {client.spec.rounds.count} rounds; there is no round {round_number}")
    for part in chosen:
        if part >= count:
            raise ConfigurationError(f"the run has parts 0 to {count - 1}; there is no part {part}")


async def _judged(
    client: CoordinatorClient, reductions: Reductions, round_number: int, chosen: Sequence[int] | None
) -> list[dict[str, Any]]:
    """The verdict on each record, by part, and in the order in which they came."""
    await reductions.round(round_number)
    published = [
        (envelope.open_as(PartRecord, run=client.spec.run_id, round=round_number), envelope)
        for envelope in await client.part_records(round_number) or []
    ]
    entries = []
    for record, envelope in sorted(published, key=lambda one: one[0].part):
        if chosen is not None and record.part not in chosen:
            continue
        verdict = await reductions.judge(envelope)
        entries.append(
            {
                "part": record.part,
                "record": record.hash.hex(),
                "reducer": envelope.peer,
                "outcome": verdict.outcome.value,
                "reason": verdict.reason,
                "slots": list(verdict.slots),
            }
        )
    return entries
