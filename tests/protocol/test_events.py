"""The run as Server-Sent Events: every leaf of the log, in order, whenever one comes and however often the line is cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from swarm_coordinator.api.limits import Limits
from swarm_protocol.records import Outcome

Api = Any
MakeCast = Callable[..., Any]
Play = Callable[..., None]


class Listener:
    """What a client of the events has received: raw blocks, one at a time."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    async def block(self) -> dict[str, str]:
        """The next event or comment, its fields by their names; a comment's is empty."""
        fields: dict[str, str] = {}
        async for line in self._lines:
            if not line:
                return fields
            name, _, value = line.partition(":")
            fields[name] = value.strip()
        raise EOFError("the stream has ended")

    async def events(self, count: int) -> list[dict[str, Any]]:
        """The data of the next events; each goes by its leaf and its kind."""
        found: list[dict[str, Any]] = []
        while len(found) < count:
            fields = await self.block()
            if "data" in fields:
                data = json.loads(fields["data"])
                assert (fields["id"], fields["event"]) == (str(data["leaf"]), data["kind"])
                found.append(data)
        return found


@asynccontextmanager
async def following(api: Api, query: str = "", **headers: str) -> AsyncIterator[Listener]:
    path = f"/v1/runs/{api.cast.run.hex()}/events{query}"
    async with api.http.stream("GET", path, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        listener = Listener(response)
        assert "from leaf" in (await listener.block())[""]
        yield listener


def test_whoever_listens_hears_of_every_record_of_the_log_as_it_comes(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        async with following(api) as listener:
            plan, _ = await api.to_audits()
            head = (await api.get("/log/head")).json()
            heard = await listener.events(head["size"] - 4)
        assert [one["leaf"] for one in heard] == list(range(4, head["size"]))
        entries = (await api.several("/log/entries"))[4:]
        assert [(one["kind"], one["hash"]) for one in heard] == [
            (entry.open().kind, entry.open().hash.hex()) for entry in entries
        ]
        assert [one["signer"] for one in heard] == [entry.peer for entry in entries]
        by_kind = {one["kind"]: one["record"] for one in heard}
        assert by_kind["plan"]["roster"] == {"count": 2}
        assert by_kind["plan"]["base"] == plan.base.hex()
        assert by_kind["commitment-set"]["commitments"] == {"count": 2}
        assert by_kind["commitment"]["train_loss"] == 5.5

    play(cast, script, listen=True)


def test_whoever_comes_back_misses_nothing(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        async with following(api, "?after=-1") as listener:
            assert [one["leaf"] for one in await listener.events(2)] == [0, 1]
        await api.to_training()
        size = (await api.get("/log/head")).json()["size"]
        headers = {"last-event-id": "1"}
        async with following(api, "?after=4", **headers) as listener:
            assert [one["leaf"] for one in await listener.events(size - 2)] == list(range(2, size))
            waiting = asyncio.create_task(listener.events(1))
            await api.accept(cast.commitment(await api.plan(), 0))
            assert [one["leaf"] for one in await waiting] == [size]

    play(cast, script, listen=True)


def test_verdicts_and_proofs_are_told_in_few_bytes(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        plan, commitments = await api.to_audits()
        await api.accept(cast.verdict(cast.auditors[0], commitments[1], Outcome.ACCEPTED))
        await api.accept(*(cast.ready(node, 1, b"r" * 32) for node in cast.nodes))
        await api.refuse(cast.commitment(plan, 0, trace_root=b"x" * 32), 409, "equivocation")
        size = (await api.get("/log/head")).json()["size"]
        async with following(api, "?after=-1") as listener:
            heard = {one["kind"]: one["record"] for one in await listener.events(size)}
        assert (heard["verdict"]["outcome"], heard["verdict"]["reason"]) == ("accepted", "the replay says so")
        assert heard["equivocation"]["first"] == {"size_bytes": len(commitments[0].encode())}
        assert all(len(json.dumps(record)) < 2000 for record in heard.values())

    play(cast, script, listen=True)


def test_silence_is_kept_alive(make_cast: MakeCast, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastapi.routing._PING_INTERVAL", 0.05)

    async def script(api: Api) -> None:
        async with following(api) as listener:
            assert await listener.block() == {"": "ping"}

    play(make_cast(), script, listen=True)


def test_the_stream_ends_when_the_coordinator_stops(make_cast: MakeCast, play: Play) -> None:
    async def script(api: Api) -> None:
        async with following(api) as listener:
            waiting = asyncio.create_task(listener.block())
            api.service.stop_waiting()
            with pytest.raises(EOFError):
                await waiting

    play(make_cast(), script, listen=True)


def test_only_so_many_listen_at_once_and_who_leaves_makes_room(make_cast: MakeCast, play: Play) -> None:
    async def script(api: Api) -> None:
        async with following(api), following(api):
            full = await api.get("/events")
            assert (full.status_code, full.json()["code"]) == (503, "busy")
            assert int(full.headers["retry-after"]) > 0
            assert (await api.http.get("/healthz")).status_code == 200
        async with asyncio.timeout(10):
            while "event_listeners 0.0" not in (await api.http.get("/metrics")).text:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # the event is at the coordinator
        async with following(api):
            pass

    play(make_cast(), script, listen=True, limits=Limits(listeners=2))


@pytest.mark.parametrize("given", ["-1", "x", "1" * 19])
def test_an_id_that_we_never_gave_is_refused(make_cast: MakeCast, play: Play, given: str) -> None:
    async def script(api: Api) -> None:
        answer = await api.get("/events", headers={"last-event-id": given})
        assert (answer.status_code, answer.json()["code"]) == (422, "bad-request")

    play(make_cast(), script)
