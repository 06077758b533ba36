"""The coordinator of a cast as its clients see it, for the fixtures of `conftest.py`: in process, or at a port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from swarm_coordinator.app import create_app
from swarm_coordinator.connections import Connection
from swarm_coordinator.service import Service, open_service
from swarm_protocol.records import CommitmentSet, Envelope, RoundPlan, decode_list

Cast = Any


class Api:
    """The coordinator as its clients see it, in process."""

    def __init__(self, cast: Cast, http: httpx.AsyncClient, service: Service) -> None:
        self.cast = cast
        self.http = http
        self.service = service

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.http.get(f"/v1/runs/{self.cast.run.hex()}{path}", **options)

    async def offer(self, data: bytes | Envelope, **headers: str) -> httpx.Response:
        content = data if isinstance(data, bytes) else data.encode()
        return await self.http.post(f"/v1/runs/{self.cast.run.hex()}/records", content=content, headers=headers)

    async def accept(self, *envelopes: Envelope) -> None:
        for envelope in envelopes:
            response = await self.offer(envelope)
            assert response.status_code == 201, response.text

    async def refuse(self, envelope: Envelope | bytes, status: int, code: str, **headers: str) -> str:
        response = await self.offer(envelope, **headers)
        problem = response.json()
        assert (response.status_code, problem["code"]) == (status, code), response.text
        assert response.headers["content-type"] == "application/problem+json"
        assert problem["status"] == status
        assert problem["type"].endswith(code)
        return str(problem["detail"])

    async def base(self) -> bytes:
        return bytes.fromhex((await self.get("/checkpoints/latest")).json()["root"])

    async def plan(self, number: int = 0) -> RoundPlan:
        envelope = Envelope.decode((await self.get(f"/rounds/{number}/plan")).content)
        return envelope.open_as(RoundPlan, run=self.cast.run, key=bytes.fromhex(self.cast.spec.coordinator))

    async def several(self, path: str) -> list[Envelope]:
        return decode_list((await self.get(path)).content, max_bytes=1 << 20)

    async def to_training(self) -> RoundPlan:
        await self.accept(*(self.cast.registration(node) for node in self.cast.nodes))
        base = await self.base()
        await self.accept(*(self.cast.ready(node, 0, base) for node in self.cast.nodes))
        return await self.plan()

    async def to_exchanging(self) -> tuple[RoundPlan, CommitmentSet, list[Envelope]]:
        plan = await self.to_training()
        commitments = [self.cast.commitment(plan, slot) for slot in range(len(plan.roster))]
        await self.accept(*commitments)
        closing, *_ = await self.several("/rounds/0/commitments")
        return plan, closing.open_as(CommitmentSet, run=self.cast.run), commitments

    async def to_opening(self) -> tuple[RoundPlan, list[Envelope]]:
        plan, closing, commitments = await self.to_exchanging()
        records = [self.cast.part_record(plan, closing, part, slot=part) for part in range(2)]
        await self.accept(*records, *(self.cast.part_held(record) for record in records))
        await self.accept(self.cast.report(plan, tuple(record.open().hash for record in records), b"r" * 32))
        return plan, commitments

    async def to_audits(self) -> tuple[RoundPlan, list[Envelope]]:
        plan, commitments = await self.to_opening()
        await self.accept(*(self.cast.opening(plan, slot) for slot in range(len(plan.roster))))
        return plan, commitments


class _Server(uvicorn.Server):
    """Leaves signals to the tests."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[str]:
    """The application on a port of this machine; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, http=Connection, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for service in app.state.services:
                service.stop_waiting()
            server.should_exit = True
            await task


@asynccontextmanager
async def serving(
    cast: Cast, *, address: str = "127.0.0.1", listen: bool = False, **options: Any
) -> AsyncIterator[Api]:
    """The cast's coordinator, in process or, if it is to `listen`, at a port; the other options are the application's."""
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(open_service(cast.home, cast.clock))
        app = create_app(service, **options)
        if listen:
            http = httpx.AsyncClient(base_url=await stack.enter_async_context(listening(app)))
        else:
            http = httpx.AsyncClient(
                transport=httpx.ASGITransport(app, client=(address, 1)), base_url="http://coordinator"
            )
        yield Api(cast, await stack.enter_async_context(http), service)
