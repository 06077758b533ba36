"""`swarm-node observe`: a run followed over gossip alone, by the real command."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from tests.swarm.gossiping import OWNER, RUN, ZERO, Ledger, manifest, members, plan, signed

from swarm_protocol.errors import RefusedError
from swarm_protocol.records import RunEnd

pytestmark = pytest.mark.swarm

COMMAND = (
    "import atexit, sys; atexit.register(lambda: print('LOADED', *sorted({'torch', 'hivemind', 'libp2p'} & set(sys.modules)),"
    " file=sys.stderr)); from swarm_node.cli import main; sys.argv[1:] = ['observe', *sys.argv[1:]]; main()"
)


@asynccontextmanager
async def observing(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", COMMAND, *arguments, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def events(process: asyncio.subprocess.Process, *, within_s: float = 40) -> AsyncIterator[dict[str, Any]]:
    assert process.stdout is not None
    async with asyncio.timeout(within_s):
        async for line in process.stdout:
            yield json.loads(line)


def test_an_observer_follows_rounds_and_log_catches_an_equivocation_and_loads_nothing_heavy() -> None:
    async def story() -> None:
        ledger = Ledger()
        ledger.add(plan(0), manifest(0))
        async with members(2, ledger=ledger) as (owner, other):
            for record in (plan(0), manifest(0), ledger.head()):
                await owner.publish(signed(record))
            address = other.addresses[0]
            async with observing(address, "--run", RUN.hex(), "--json") as process:
                told = events(process)
                first = await anext(told)
                assert first["event"] == "observing"
                assert (first["run"], first["coordinator"]) == (RUN.hex(), OWNER.peer_id)
                # What was said before it came, it is told by its neighbours; the log comes from the owner.
                found = [event async for event in _until(told, "log", size=2)]
                assert {one["round"] for one in found if one["event"] == "round"} == {0}

                following = plan(1)
                ledger.add(following, manifest(1))
                for record in (following, manifest(1), ledger.head()):
                    await owner.publish(signed(record))
                found = [event async for event in _until(told, "log", size=4)]
                assert {"plan", "manifest", "log-head"} <= {one.get("kind") for one in found}
                assert not [one for one in found if one["event"] == "alarm"]

                # Another manifest of the same round, handed to one member only.
                with pytest.raises(RefusedError):
                    await other.publish(signed(manifest(1, root=RUN)))
                conflict = await other.conflict()
                assert conflict.second == signed(manifest(1, root=RUN))
                await other.publish(_proof(conflict.first.encode(), conflict.second.encode()))
                await anext(event async for event in told if event["event"] == "alarm")

                await owner.publish(signed(RunEnd(run=RUN, round=2, root=ZERO, reason="all rounds are done")))
                await anext(event async for event in told if event["event"] == "end")
                _, errors = await process.communicate()
            assert process.returncode == 1, "something did not fit"
            assert errors.decode().split("LOADED")[1].split() == []

    asyncio.run(story())


def _proof(first: bytes, second: bytes) -> Any:
    from swarm_protocol.identity import Identity
    from swarm_protocol.records import Equivocation

    return signed(Equivocation(run=RUN, round=1, first=first, second=second), Identity.generate())


async def _until(told: AsyncIterator[dict[str, Any]], event: str, **details: Any) -> AsyncIterator[dict[str, Any]]:
    async for found in told:
        yield found
        if found["event"] == event and details.items() <= found.items():
            return


def test_a_run_that_is_not_the_one_that_was_asked_for_is_refused() -> None:
    async def story() -> None:
        async with members(1) as (owner,), observing(owner.addresses[0], "--run", "0" * 64) as process:
            _, errors = await process.communicate()
            assert process.returncode == 1
            assert f"run {RUN.hex()} is gossiped at" in errors.decode()

    asyncio.run(story())


def test_a_live_run_is_followed_from_its_coordinators_address(start_run: Callable[..., Any]) -> None:
    run = start_run(rounds=2, min_nodes=1, max_nodes=1, numerics="exact")
    settings = run.home / "coordinator.toml"
    settings.write_text(settings.read_text().replace('# listen = ""', 'listen = "/ip4/127.0.0.1/tcp/0"'))
    run.serve()
    address = f"{run.url}/v1/runs/{run.status()['run_id']}/gossip"
    run.until(lambda: httpx.get(address).json()["multiaddrs"] or None, what="the coordinator gossips")

    async def story() -> list[dict[str, Any]]:
        async with observing(run.url, "--json") as process:
            told = events(process, within_s=180)
            run.join("only")
            found = [event async for event in told]
            _, errors = await process.communicate()
            assert process.returncode == 0, errors.decode()
        return found

    found = asyncio.run(story())
    assert [one["round"] for one in found if one["event"] == "round"] == [0, 1]
    assert [one["event"] for one in found if one["event"] in ("alarm", "end")] == ["end"]
    verified = max(one["size"] for one in found if one["event"] == "log")
    assert verified > 10, "the log was fetched from the coordinator's member, and grew into its signed heads"
