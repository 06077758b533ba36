"""Staying on the peer plane: our addresses in the DHT, and a connection to the run's first peer, which may restart."""

from __future__ import annotations

import asyncio
import logging
import time

from swarm_protocol.client import CoordinatorClient
from swarm_protocol.dht import TTL_S
from swarm_protocol.errors import SwarmError
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Addresses
from swarm_protocol.signing import SigningLedger

log = logging.getLogger(__name__)


async def stay_connected(client: CoordinatorClient, plane: PeerPlane, ledger: SigningLedger) -> None:
    """Keep at it until cancelled. A coordinator that was restored is shown what it signed last."""
    announced_at, bootstrap = -TTL_S, list[str]()
    while True:
        try:
            if time.monotonic() - announced_at > TTL_S / 3:
                await _announce(client, plane, ledger)
                announced_at = time.monotonic()
            peers, recovering = await client.peers()
            bootstrap = peers or bootstrap
            if recovering:
                await client.hand_in()
            await plane.dial(bootstrap)
        except (SwarmError, OSError, TimeoutError, ValueError) as error:
            log.info("the peer plane is not whole yet: %s", error)
        except Exception as error:  # noqa: BLE001  # the daemon's own errors; the next turn tries again
            log.info("the bootstrap peer does not answer: %s", error)
        await asyncio.sleep(min(5.0, client.spec.rounds.presence_s / 3))


async def _announce(client: CoordinatorClient, plane: PeerPlane, ledger: SigningLedger) -> None:
    addresses = tuple((await plane.addresses())[:16])

    def record(sequence: int) -> Addresses:
        return Addresses(run=client.spec.run_id, round=0, sequence=sequence, multiaddrs=addresses)

    await plane.directory.announce(await asyncio.to_thread(ledger.sign_next, record))
