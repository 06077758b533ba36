"""How long a request's head may take: whoever is slow with it is cut off, and nobody else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from swarm_coordinator import connections

Api = Any
MakeCast = Callable[..., Any]
Play = Callable[..., None]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

HEAD_S = 0.4
SLOW_S = 2.5 * HEAD_S
GET = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", HEAD_S)


async def connected(api: Api) -> Streams:
    url = httpx.URL(api.http.base_url)
    return await asyncio.open_connection(url.host, url.port)


async def silence(api: Api) -> bytes:
    """What comes of a connection on which nothing is sent."""
    reader, writer = await connected(api)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


async def dripped(api: Api, data: bytes, *, first: bytes = b"") -> bytes:
    """What comes of bytes that are sent one at a time for ever, after those that come at once."""
    reader, writer = await connected(api)
    writer.write(first)

    async def drip() -> None:
        while True:
            for number in range(len(data)):
                writer.write(data[number : number + 1])
                await asyncio.sleep(HEAD_S / 8)

    dripping = asyncio.create_task(drip())
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        dripping.cancel()
        writer.close()


async def answer(reader: asyncio.StreamReader) -> bytes:
    """One answer on a connection that stays open."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None
    return head + await reader.readexactly(int(length[1]))


def test_a_head_that_does_not_come_in_time_ends_its_connection(make_cast: MakeCast, play: Play) -> None:
    async def script(api: Api) -> None:
        silent, head, name, newlines = await asyncio.gather(
            silence(api),
            dripped(api, b"a: b\r\n", first=b"GET /healthz HTTP/1.1\r\n"),
            dripped(api, b"G"),
            dripped(api, b"\r\n", first=GET),
        )
        for cut in (silent, head):
            assert cut.startswith(b"HTTP/1.1 408 ")
            assert b'"code":"too-slow"' in cut
        assert name.startswith(b"HTTP/1.1 4")
        assert newlines.startswith(b"HTTP/1.1 200 ")

    play(make_cast(), script, listen=True)


def test_waiting_answers_slow_bodies_and_pauses_between_requests_are_none_of_its_business(
    make_cast: MakeCast, play: Play
) -> None:
    cast = make_cast()
    base = f"/v1/runs/{cast.run.hex()}"

    async def pausing(api: Api) -> None:
        reader, writer = await connected(api)
        for _ in range(2):
            writer.write(GET)
            assert (await answer(reader)).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(SLOW_S)
        writer.close()

    async def waiting(api: Api) -> None:
        assert (await api.get(f"/rounds/0/plan?wait_s={SLOW_S}")).status_code == 204

    async def slow_body(api: Api) -> None:
        reader, writer = await connected(api)
        body = cast.registration(cast.nodes[0]).encode()
        writer.write(f"POST {base}/records HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode())
        for piece in (body[:10], body[10:]):
            await asyncio.sleep(SLOW_S / 2)
            writer.write(piece)
        assert (await answer(reader)).startswith(b"HTTP/1.1 201 ")
        writer.close()

    async def script(api: Api) -> None:
        await asyncio.gather(pausing(api), waiting(api), slow_body(api))

    play(cast, script, listen=True)
