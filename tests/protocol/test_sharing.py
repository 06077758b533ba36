"""One run served by several processes from one PostgreSQL: whoever is asked, the answer is the driver's."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from swarm_coordinator import workers
from swarm_coordinator.app import create_app
from swarm_coordinator.db.engine import open_database
from swarm_coordinator.db.signing import open_ledger
from swarm_coordinator.journal import LOST, Journal, LostOfficeError
from swarm_coordinator.service import Service, open_service
from swarm_protocol.errors import EquivocationError
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.records import Envelope, RoundPlan, decode_list
from swarm_protocol.signing import SigningLedger

pytestmark = pytest.mark.swarm

MakeCast = Callable[..., Any]


@pytest.fixture
def database_url(postgres: Any) -> str:
    return str(postgres.database())


class Shared:
    """Two processes' worth of a run's service, the first of which drives it."""

    def __init__(self, cast: Any) -> None:
        self.cast = cast
        self.stack = AsyncExitStack()
        self.services: list[Service] = []
        self.clients: list[httpx.AsyncClient] = []
        self.closing: list[AsyncExitStack] = []

    async def add(self) -> None:
        stack = AsyncExitStack()
        self.closing.append(stack)
        service = await stack.enter_async_context(open_service(self.cast.home, self.cast.clock))
        transport = httpx.ASGITransport(create_app(service))
        client = httpx.AsyncClient(transport=transport, base_url="http://coordinator", timeout=30)
        self.services.append(service)
        self.clients.append(await stack.enter_async_context(client))

    async def get(self, which: int, path: str) -> httpx.Response:
        return await self.clients[which].get(f"/v1/runs/{self.cast.run.hex()}{path}")

    async def offer(self, which: int, envelope: Envelope) -> httpx.Response:
        return await self.clients[which].post(f"/v1/runs/{self.cast.run.hex()}/records", content=envelope.encode())

    async def accept(self, which: int, *envelopes: Envelope) -> None:
        for envelope in envelopes:
            response = await self.offer(which, envelope)
            assert response.status_code == 201, response.text

    async def close(self) -> None:
        for stack in reversed(self.closing):
            await stack.aclose()


def play(cast: Any, script: Callable[[Shared], Awaitable[None]]) -> None:
    async def run() -> None:
        shared = Shared(cast)
        try:
            async with asyncio.timeout(60):
                await shared.add()
                await shared.add()
                await script(shared)
        finally:
            await shared.close()

    asyncio.run(run())


@pytest.mark.usefixtures("database_url")
def test_records_may_be_handed_to_any_process_and_everybody_hears_what_follows(make_cast: MakeCast) -> None:
    cast = make_cast()

    async def script(shared: Shared) -> None:
        first, second = cast.nodes
        await shared.accept(1, cast.registration(first))
        await shared.accept(0, cast.registration(second))
        again = await shared.offer(1, cast.registration(second))
        assert (again.status_code, again.json()["receipt"] is None) == (200, False)
        wrong = await shared.offer(1, cast.ready(first, 0, b"x" * 32))
        assert (wrong.status_code, wrong.json()["code"]) == (409, "wrong-base")
        waiting = asyncio.create_task(shared.get(1, "/rounds/0/plan?wait_s=20"))
        base = bytes.fromhex(cast.spec.checkpoint)
        await shared.accept(1, cast.ready(first, 0, base), cast.ready(second, 0, base))
        plan = Envelope.decode((await waiting).content).open_as(RoundPlan, run=cast.run)
        await shared.accept(0, cast.commitment(plan, 0))
        await shared.accept(1, cast.commitment(plan, 1))
        closed = [await shared.get(which, "/rounds/0/commitments?wait_s=20") for which in (0, 1)]
        assert closed[0].content == closed[1].content
        heads = [(await shared.get(which, "/log/head")).json() for which in (0, 1)]
        assert heads[0] == heads[1]
        entries = decode_list((await shared.get(1, "/log/entries")).content, max_bytes=1 << 20)
        log = Log(leaf_hash(entry.encode()) for entry in entries)
        assert (heads[1]["size"], heads[1]["root"]) == (log.size, log.root().hex())
        assert (await shared.get(1, "")).json()["phase"] == "exchanging"

    play(cast, script)


@pytest.mark.usefixtures("database_url")
def test_when_the_driver_is_gone_another_one_takes_over_and_goes_on(make_cast: MakeCast) -> None:
    cast = make_cast()

    async def script(shared: Shared) -> None:
        await shared.accept(0, *(cast.registration(node) for node in cast.nodes))
        before = (await shared.get(0, "/log/head")).json()
        await shared.closing.pop(0).aclose()
        base = bytes.fromhex(cast.spec.checkpoint)
        # What is handed in while nobody drives is answered by whoever drives next.
        await shared.accept(1, *(cast.ready(node, 0, base) for node in cast.nodes))
        plan = await shared.get(1, "/rounds/0/plan?wait_s=20")
        record = Envelope.decode(plan.content).open_as(RoundPlan, run=cast.run)
        assert record.log_size == before["size"]
        assert record.log_root.hex() == before["root"]

    play(cast, script)


@pytest.mark.usefixtures("database_url")
def test_a_driver_that_lost_its_office_writes_nothing(make_cast: MakeCast) -> None:
    cast = make_cast()
    old = Journal.open(cast.home, cast.now_ms)
    new = Journal.open(cast.home, cast.now_ms)
    registration = cast.registration(cast.nodes[0])
    with pytest.raises(LostOfficeError):
        old.submit(registration, registration.open(), None, cast.now_ms)
    assert old.failure == LOST
    receipt, _ = new.submit(registration, registration.open(), None, cast.now_ms)
    assert receipt.new
    for journal in (old, new):
        journal.close()


@pytest.mark.usefixtures("database_url")
def test_a_service_whose_run_was_taken_over_says_so_and_its_clock_stops(make_cast: MakeCast) -> None:
    cast = make_cast()

    async def script() -> None:
        async with asyncio.timeout(30), open_service(cast.home, cast.clock) as service:
            other = Journal.open(cast.home, cast.now_ms)
            await service.run_clock()  # comes back
            assert service.failure == LOST
            other.close()

    asyncio.run(script())


def written(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def lives(pid: str) -> bool:
    return Path(f"/proc/{pid}").exists()


async def gone(pid: str) -> None:
    while True:
        if not lives(pid):
            return
        await asyncio.sleep(0.05)  # somebody else's child: there is no event to await


async def started(path: Path, count: int) -> list[str]:
    """The process ids that workers left, once there are so many of them."""
    while True:
        found = written(path)
        if len(found) >= count:
            return found
        await asyncio.sleep(0.05)  # a process of its own writes it: there is no event to await


@pytest.mark.usefixtures("database_url")
def test_one_process_has_the_workers_and_if_it_is_gone_or_cut_off_another_one(
    make_cast: MakeCast, tmp_path: Path
) -> None:
    cast = make_cast()
    pids = tmp_path / "pids"
    script = f"import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(600)"
    command = {"worker": [sys.executable, "-c", script]}

    async def script_of_two() -> None:
        async with asyncio.timeout(60):
            first, second = (asyncio.create_task(workers.employ(cast.home, command)) for _ in range(2))
            await started(pids, 1)
            await asyncio.sleep(2 * workers.LOOK_S)
            (one,) = await started(pids, 1)
            engine = open_database(cast.home.database_url())
            with engine.connect() as connection:
                connection.execute(
                    text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted")
                )
            engine.dispose()
            other = (await started(pids, 2))[1]
            await gone(one)
            for task in (first, second):
                task.cancel()
            await asyncio.wait([first, second])
            assert not lives(other)

    asyncio.run(script_of_two())


@pytest.mark.usefixtures("database_url")
def test_what_a_worker_signed_on_one_machine_is_known_on_the_next(make_cast: MakeCast, tmp_path: Path) -> None:
    cast = make_cast()
    cast.home.database_url()
    file = tmp_path / "signed.db"
    before = cast.part_held(cast.registration(cast.nodes[0])).open()
    with SigningLedger(file, cast.worker) as ledger:
        earlier = ledger.sign(before)
    other = cast.changed(cast.worker, before, part_record=b"x" * 32).open()
    with (
        open_ledger(cast.home, file, cast.worker) as here,
        open_ledger(cast.home, tmp_path / "none", cast.worker) as there,
    ):
        assert there.find(before.run, before.kind, before.round, before.sequence) == earlier
        assert there.sign(before) == earlier
        with pytest.raises(EquivocationError):
            there.sign(other)
        following = here.sign_next(lambda number: type(before)(**{**other.model_dump(), "sequence": number}))
        assert following.open().sequence == before.sequence + 1
        assert there.next_sequence(before.run, before.kind, before.round) == before.sequence + 2
