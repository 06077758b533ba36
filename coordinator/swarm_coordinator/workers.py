"""The run owner's workers, the checkpoint worker and the auditors: one set of them, however many processes serve the run.

Whoever holds the workers' lock in the database has them; the others wait for it. With SQLite there is only one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence

from sqlalchemy.exc import SQLAlchemyError

from swarm_coordinator.db.engine import open_database
from swarm_coordinator.db.leadership import Leadership
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.supervisor import supervise

log = logging.getLogger(__name__)

LOOK_S = 1.0


async def employ(home: RunDirectory, commands: Mapping[str, Sequence[str]]) -> None:
    """Keep these children running for as long as no other process has the run's workers. Until cancelled."""
    if not home.shared():
        await _all(commands)
        return
    engine = await asyncio.to_thread(open_database, home.database_url())
    office = Leadership(engine, home.spec().run_id, workers=True)
    try:
        while True:
            if await _acquired(office):
                log.info("this process has the run's workers")
                async with asyncio.TaskGroup() as tasks:
                    working = tasks.create_task(_all(commands))
                    await _lost(office)
                    working.cancel()
                log.warning("this process has lost the run's workers")
            await asyncio.sleep(LOOK_S)
    finally:
        await asyncio.to_thread(office.release)
        engine.dispose()


async def _all(commands: Mapping[str, Sequence[str]]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for name, command in commands.items():
            tasks.create_task(supervise(name, command))


async def _lost(office: Leadership) -> None:
    """Return once we do not have the office any more."""
    while True:
        if not await asyncio.to_thread(office.holds):
            return
        await asyncio.sleep(LOOK_S)


async def _acquired(office: Leadership) -> bool:
    with contextlib.suppress(SQLAlchemyError):
        return await asyncio.to_thread(office.acquire)
    return False
