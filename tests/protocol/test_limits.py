"""Limits: what is too much, too slow or too often is refused before it costs anything, and honest nodes lose nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from swarm_coordinator.api.limits import Buckets, Limits, address_of
from swarm_coordinator.sharing import away
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError, UnreachableError
from swarm_protocol.http import persist
from swarm_protocol.identity import Identity
from swarm_protocol.records import MAX_RECORD_BYTES, Addresses, Envelope, NonceOpening

Api = Any
MakeCast = Callable[..., Any]
Play = Callable[..., None]
ABROAD = "192.0.2.7"


def test_a_bucket_lets_a_burst_through_and_then_the_rate() -> None:
    now = [0.0]
    buckets = Buckets(2.0, 4.0, 10, lambda: now[0])
    for _ in range(4):
        assert buckets.wait_s("a") == 0
        buckets.spend("a")
    assert buckets.wait_s("a") == 0.5
    assert buckets.wait_s("b") == 0
    now[0] = 0.5
    assert buckets.wait_s("a") == 0
    now[0] = 1000.0
    for _ in range(4):
        buckets.spend("a")
    assert buckets.wait_s("a") == 0.5


def test_buckets_remember_a_bounded_number_and_forget_the_oldest() -> None:
    buckets = Buckets(1.0, 1.0, 3, lambda: 0.0)
    for key in ("a", "b", "c", "a", "d"):
        buckets.spend(key)
    assert len(buckets) == 3
    assert [buckets.wait_s(key) > 0 for key in ("a", "b", "c", "d")] == [True, False, True, True]


@pytest.mark.parametrize(
    ("host", "limited_as"),
    [
        ("127.0.0.1", None),
        ("::1", None),
        ("::ffff:127.0.0.1", None),
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        (None, "unknown"),
        ("proxy", "proxy"),
    ],
)
def test_an_address_is_limited_with_those_that_its_owner_has_as_well(host: str | None, limited_as: str | None) -> None:
    assert address_of(host) == limited_as


@pytest.mark.parametrize("wrong", [{"body_s": 0.0}, {"address_burst": 0.5}, {"max_body_bytes": 1 << 30}])
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Limits(**wrong)


def test_an_address_that_asks_too_often_is_told_when_to_come_back(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        before = api.service.log_head
        for _ in range(3):
            assert (await api.http.get("/healthz")).status_code == 200
        answer = await api.offer(cast.registration(cast.nodes[0]))
        assert (answer.status_code, answer.json()["code"]) == (429, "too-many-requests")
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["retry-after"] == "100"
        assert api.service.log_head == before

    play(cast, script, address=ABROAD, limits=Limits(address_per_s=0.01, address_burst=3))


def test_this_machines_own_addresses_are_not_limited(make_cast: MakeCast, play: Play) -> None:
    async def script(api: Api) -> None:
        for _ in range(5):
            assert (await api.http.get("/healthz")).status_code == 200

    play(make_cast(), script, limits=Limits(address_per_s=0.01, address_burst=1))


def test_an_identity_that_sends_too_much_waits_and_nobody_else_does(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        first, second = cast.nodes
        base = await api.base()
        await api.accept(cast.registration(first), cast.ready(first, 0, base))
        assert (await api.offer(cast.ready(first, 0, base))).status_code == 201  # a heartbeat counts every time
        answer = await api.offer(cast.ready(first, 0, base))
        assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (
            429,
            "too-many-requests",
            "100",
        )
        await api.accept(cast.registration(second))

    play(cast, script, limits=Limits(identity_per_s=0.01, identity_burst=3))


def test_nobody_can_use_up_anothers_tokens(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        node = cast.nodes[0]
        registration = cast.registration(node)
        await api.accept(registration)
        forged = type(registration)(registration.body, registration.key, bytes(64))
        said_to_peers = Envelope.sign(node, NonceOpening(run=cast.run, round=0, slot=0, nonce=bytes(32)))
        for _ in range(5):
            assert (await api.offer(registration)).status_code == 200  # the log is public: anybody can repeat it
            await api.refuse(forged, 403, "bad-signature")
            await api.refuse(said_to_peers, 409, "early")
        await api.accept(cast.ready(node, 0, await api.base()))

    play(cast, script, limits=Limits(identity_per_s=0.01, identity_burst=3))


def test_offices_are_not_limited_by_identity_and_who_only_claims_one_is(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    def addresses(signer: Identity, number: int) -> Envelope:
        return Envelope.sign(signer, Addresses(run=cast.run, round=0, sequence=number, multiaddrs=(f"/ip4/{number}",)))

    async def script(api: Api) -> None:
        await api.accept(*(addresses(cast.worker, number) for number in range(9)))
        for number in range(3):
            await api.refuse(addresses(cast.nodes[0], number), 403, "not-appointed")
        await api.refuse(addresses(cast.nodes[0], 3), 429, "too-many-requests")

    play(cast, script, limits=Limits(identity_per_s=0.01, identity_burst=3))


def test_an_address_holds_only_so_many_long_polls(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        waiting = [asyncio.create_task(api.get("/rounds/0/plan?wait_s=20")) for _ in range(2)]
        async with asyncio.timeout(10):
            while "swarm_coordinator_long_polls 2.0" not in (await api.http.get("/metrics")).text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # the event is at the coordinator
        answer = await api.get("/rounds/0/plan?wait_s=20")
        assert (answer.status_code, answer.json()["code"]) == (429, "too-many-requests")
        assert (await api.get("/rounds/0/plan")).status_code == 204
        await api.to_training()
        assert [(await one).status_code for one in waiting] == [200, 200]
        assert (await api.get("/rounds/0/beacon?wait_s=0.01")).status_code == 204

    play(cast, script, address=ABROAD, metrics_public=True, limits=Limits(waiting_per_address=2))


@pytest.mark.parametrize("path", ["/records", "", "/spec", "/chunks/" + "00" * 32])
@pytest.mark.parametrize("length", [MAX_RECORD_BYTES + 1, 10 << 20, 10**30])
def test_no_route_takes_a_body_that_is_declared_too_long(
    make_cast: MakeCast, play: Play, path: str, length: int
) -> None:
    async def script(api: Api) -> None:
        read = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal read
            read += 1
            yield b""

        method = "POST" if path == "/records" else "GET"
        url = f"/v1/runs/{api.cast.run.hex()}{path}"
        answer = await api.http.request(method, url, content=body(), headers={"content-length": str(length)})
        assert (answer.status_code, answer.json()["code"]) == (413, "too-long")
        assert answer.headers["connection"] == "close"
        assert read == 0

    play(make_cast(), script)


def test_a_body_that_takes_too_long_ends_with_its_connection(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        url = httpx.URL(api.http.base_url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        data = cast.registration(cast.nodes[0]).encode()
        path = f"/v1/runs/{cast.run.hex()}/records"
        writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data[:-1])
        answer = await reader.read()  # until the coordinator hangs up
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"too-slow"' in answer
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        await api.accept(cast.registration(cast.nodes[0]))

    play(cast, script, listen=True, limits=Limits(body_s=0.2))


def test_a_client_that_is_asked_to_wait_does_and_its_record_is_accepted(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        client = CoordinatorClient(api.http, "http://coordinator", cast.spec, None)
        node, base = cast.nodes[0], await api.base()
        await client.post(cast.registration(node))
        said: list[str] = []
        started_s = asyncio.get_running_loop().time()
        posted = cast.ready(node, 0, base)
        await persist(lambda: client.post(posted), deadline_s=20, waiting=said.append, first_pause_s=0.01)
        assert asyncio.get_running_loop().time() - started_s >= 1
        assert ["asks us to wait: this identity has sent too many records" in line for line in said] == [True]

    play(cast, script, limits=Limits(identity_per_s=1.0, identity_burst=1))


def test_a_client_does_not_wait_beyond_its_deadline() -> None:
    calls = 0

    async def busy() -> None:
        nonlocal calls
        calls += 1
        raise UnreachableError("busy", retry_after_s=60.0)

    with pytest.raises(UnreachableError, match="busy"):
        asyncio.run(persist(busy, deadline_s=5))
    assert calls == 1


def test_while_a_coordinator_changes_hands_it_says_when_to_come_back(
    make_cast: MakeCast, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        async def nobody(*_: object) -> None:
            raise away()

        monkeypatch.setattr(api.service, "submit", nobody)
        answer = await api.offer(cast.registration(cast.nodes[0]))
        assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (
            503,
            "changing-hands",
            "2",
        )

    play(cast, script)
