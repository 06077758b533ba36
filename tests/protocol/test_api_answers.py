"""How the HTTP API answers whatever the record: pages, caching, ranges, errors, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from swarm_coordinator.api import status as status_module
from swarm_coordinator.store import Store
from swarm_protocol.chunks import content_hash
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import RefusedError
from swarm_protocol.records import Outcome

Api = Any
MakeCast = Callable[..., Any]
Play = Callable[..., None]
UNCHANGING = "public, max-age=31536000, immutable"


def test_blobs_come_whole_in_ranges_or_not_at_all(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()
    blob = bytes(range(256)) * 8192  # two pieces
    digest = content_hash(blob)
    Store(cast.home.objects).put(digest, blob)
    path = f"/chunks/{digest.hex()}"

    async def script(api: Api) -> None:
        whole = await api.get(path)
        assert whole.content == blob
        assert "immutable" in whole.headers["cache-control"]
        for header, expected in [
            ("bytes=5-9", blob[5:10]),
            ("bytes=2097000-", blob[2097000:]),
            ("bytes=-7", blob[-7:]),
        ]:
            part = await api.get(path, headers={"range": header})
            assert (part.status_code, part.content) == (206, expected)
        beyond = await api.get(path, headers={"range": "bytes=2097152-"})
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, "bytes */2097152")
        assert (await api.get(path, headers={"if-none-match": whole.headers["etag"]})).status_code == 304
        assert (await api.get(f"/chunks/{bytes(32).hex()}")).json()["code"] == "not-found"

    play(cast, script)


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/nowhere", 404, "not-found"),
        ("/v1/runs/00/spec", 404, "no-such-run"),
        ("RUN/rounds/2/beacon", 404, "no-such-round"),
        ("RUN/rounds/0", 404, "not-found"),
        ("RUN/rounds/0/plan?wait_s=31", 422, "bad-request"),
        ("RUN/rounds/-1/plan", 422, "bad-request"),
        ("RUN/chunks/zz", 422, "bad-request"),
        ("RUN/audits", 422, "bad-request"),
    ],
)
def test_every_error_is_a_problem_detail(make_cast: MakeCast, play: Play, path: str, status: int, code: str) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        response = await api.http.get(path.replace("RUN", f"/v1/runs/{cast.run.hex()}"))
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert set(response.json()) == {"type", "title", "status", "detail", "code"}
        assert response.headers["content-type"] == "application/problem+json"

    play(cast, script)


@pytest.mark.parametrize(
    ("header", "status", "start", "end"),
    [
        ("bytes=0-0", 206, 0, 1),
        ("bytes=99-5000", 206, 99, 100),
        ("bytes=0-", 200, 0, 100),
        ("bytes=-100", 200, 0, 100),
        ("bytes=-5000", 200, 0, 100),
        ("bytes=-0", 416, 0, 0),
        ("bytes=100-", 416, 0, 0),
        ("bytes=9-5", 200, 0, 100),
        ("bytes=0-1,5-6", 200, 0, 100),
        ("bytes=-", 200, 0, 100),
        ("bytes=a-b", 200, 0, 100),
        ("lines=0-1", 200, 0, 100),
        ("bytes=" + "9" * 30 + "-", 200, 0, 100),
    ],
)
def test_a_range_is_one_that_we_know_and_else_the_blob_comes_whole(
    make_cast: MakeCast, play: Play, header: str, status: int, start: int, end: int
) -> None:
    cast, blob = make_cast(), bytes(range(100))
    Store(cast.home.objects).put(content_hash(blob), blob)

    async def script(api: Api) -> None:
        answer = await api.get(f"/chunks/{content_hash(blob).hex()}", headers={"range": header})
        assert answer.status_code == status
        if status == 416:
            assert answer.headers["content-range"] == "bytes */100"
            return
        assert answer.content == blob[start:end]
        assert answer.headers["content-length"] == str(end - start)
        assert answer.headers.get("content-range") == (f"bytes {start}-{end - 1}/100" if status == 206 else None)

    play(cast, script)


def test_a_range_that_is_meant_for_another_blob_is_ignored(make_cast: MakeCast, play: Play) -> None:
    cast, blob = make_cast(), bytes(100)
    Store(cast.home.objects).put(content_hash(blob), blob)

    async def script(api: Api) -> None:
        path, name = f"/chunks/{content_hash(blob).hex()}", f'"{content_hash(blob).hex()}"'
        for given, status in ((name, 206), ('"another"', 200)):
            answer = await api.get(path, headers={"range": "bytes=1-2", "if-range": given})
            assert answer.status_code == status

    play(cast, script)


def test_what_never_changes_says_so_and_is_sent_once(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        await api.to_audits()
        record = (await api.several("/rounds/0/manifest"))[0].open().hash.hex()
        checkpoint = f"/checkpoints/{cast.spec.checkpoint}"
        rounds = [f"/rounds/0/{name}" for name in ("plan", "commitments", "manifest", "beacon")]
        for path in ["/spec", f"/records/{record}", checkpoint, *rounds]:
            first = await api.get(path)
            assert first.headers["cache-control"] == UNCHANGING, path
            again = await api.get(path, headers={"if-none-match": f'W/"other", {first.headers["etag"]}'})
            assert (again.status_code, again.content) == (304, b"")
            assert (await api.get(path, headers={"if-none-match": '"other"'})).content == first.content
        for path in ("", "/rounds/1/plan", "/rounds/0/part-records", "/rounds/0", "/log/head", "/nodes", "/nowhere"):
            assert (await api.get(path)).headers["cache-control"] == "no-store", path

    play(cast, script)


def test_head_answers_as_get_does_without_the_body(make_cast: MakeCast, play: Play) -> None:
    cast, blob = make_cast(), bytes(100)
    Store(cast.home.objects).put(content_hash(blob), blob)

    async def script(api: Api) -> None:
        base = f"/v1/runs/{cast.run.hex()}"
        for path in ("/spec", f"/checkpoints/{cast.spec.checkpoint}", f"/chunks/{content_hash(blob).hex()}"):
            whole, head = await api.http.get(base + path), await api.http.head(base + path)
            assert (head.status_code, head.content) == (200, b"")
            for name in ("content-length", "content-type", "etag", "cache-control"):
                assert head.headers[name] == whole.headers[name]
        missing = await api.http.head(f"{base}/chunks/{bytes(32).hex()}")
        assert (missing.status_code, missing.content) == (404, b"")

    play(cast, script)


def test_a_method_that_a_route_does_not_have_is_a_problem_that_names_those_it_has(
    make_cast: MakeCast, play: Play
) -> None:
    async def script(api: Api) -> None:
        answer = await api.http.delete("/v1/runs")
        assert (answer.status_code, answer.json()["code"]) == (405, "method-not-allowed")
        assert answer.headers["allow"] == "GET"
        assert (await api.http.post(f"/v1/runs/{api.cast.run.hex()}/spec")).headers["allow"] in (
            "GET, HEAD",
            "HEAD, GET",
        )
        assert answer.headers["content-type"] == "application/problem+json"

    play(make_cast(), script)


def test_a_fault_is_a_problem_that_tells_nothing_but_its_id(
    make_cast: MakeCast, play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    async def script(api: Api) -> None:
        monkeypatch.setattr("swarm_coordinator.api.runs.run_status", broken)
        answer = await api.get("", headers={"x-request-id": "mine-7"})
        assert (answer.status_code, answer.json()["code"]) == (500, "internal")
        assert answer.headers["x-request-id"] == "mine-7"
        assert "secret" not in answer.text
        assert "a secret" in caplog.text

    play(make_cast(), script)


def test_every_answer_has_a_request_id_of_harmless_letters(make_cast: MakeCast, play: Play) -> None:
    async def script(api: Api) -> None:
        own = [(await api.http.get("/healthz")).headers["x-request-id"] for _ in range(2)]
        assert own[0] != own[1]
        for given in ("a b", "x" * 65, "<script>"):
            assert (await api.http.get("/healthz", headers={"x-request-id": given})).headers["x-request-id"] != given

    play(make_cast(), script)


def test_rounds_come_in_pages_newest_first(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast(rounds=3)

    async def script(api: Api) -> None:
        assert (await api.get("/rounds")).json() == {"rounds": [], "next": None}
        base = await api.base()
        await api.accept(*(cast.registration(node) for node in cast.nodes))
        for number in range(3):
            await api.accept(*(cast.ready(node, number, base) for node in cast.nodes))
            plan = await api.plan(number)
            await api.accept(*(cast.commitment(plan, slot) for slot in range(2)))
            cast.now_ms += 60_000
            await api.service.tick()
            base = bytes([number]) * 32
            await api.accept(cast.report(plan, (None, None), base))
            await api.accept(cast.opening(plan, 0), cast.opening(plan, 1))
        first = (await api.get("/rounds?limit=2")).json()
        assert ([entry["round"] for entry in first["rounds"]], first["next"]) == ([2, 1], 1)
        last = (await api.get(f"/rounds?limit=2&before={first['next']}")).json()
        assert ([entry["round"] for entry in last["rounds"]], last["next"]) == ([0], None)
        history = (await api.get("")).json()["history"]
        assert history == [*last["rounds"], *first["rounds"][::-1]]

    play(cast, script)


def test_a_status_has_a_bounded_number_of_nodes_and_the_pages_have_all(
    make_cast: MakeCast, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast = make_cast(nodes=5)
    monkeypatch.setattr(status_module, "MAX_ITEMS", 2)

    async def script(api: Api) -> None:
        for node in cast.nodes:
            cast.now_ms += 1000
            await api.accept(cast.registration(node))
        cast.now_ms += 1000
        await api.accept(cast.ready(cast.nodes[1], 0, await api.base()))
        await api.service.mark_alive()
        found = (await api.get("")).json()
        assert found["registered"] == 5
        assert [node["peer"] for node in found["nodes"]] == [cast.nodes[1].peer_id, cast.nodes[4].peer_id]
        client = CoordinatorClient(api.http, "http://coordinator", cast.spec, None)
        assert {node["peer"] for node in await client.nodes()} == {node.peer_id for node in cast.nodes}
        by_key = sorted(cast.nodes, key=lambda node: node.public_key)
        page = (await api.get("/nodes?limit=3")).json()
        assert [node["peer"] for node in page["nodes"]] == [node.peer_id for node in by_key[:3]]
        assert page["next"] == by_key[2].public_key.hex()
        page = (await api.get(f"/nodes?limit=3&after={page['next']}")).json()
        assert ([node["peer"] for node in page["nodes"]], page["next"]) == ([node.peer_id for node in by_key[3:]], None)
        one = await client.node(cast.nodes[1].public_key)
        assert one == next(node for node in found["nodes"] if node["peer"] == cast.nodes[1].peer_id)
        with pytest.raises(RefusedError):
            await client.node(bytes(32))

    play(cast, script)


def test_open_audits_and_verdicts_are_public(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        assert (await api.get("/challenges")).json() == []
        _, commitments = await api.to_audits()
        first, second = cast.auditors
        wanted = (await api.get("/challenges?round=0")).json()
        assert wanted == (await api.get(f"/audits?auditor={first.public_key.hex()}")).json()
        assert [entry["slot"] for entry in wanted] == [0, 1]
        assert (await api.get("/challenges?round=1")).json() == []
        await api.accept(cast.verdict(first, commitments[0], Outcome.REJECTED))
        wanted = (await api.get("/challenges")).json()
        assert (wanted[0]["verdicts"], wanted[0]["turn"]) == (1, second.public_key.hex())
        await api.accept(cast.verdict(second, commitments[0], Outcome.REJECTED), cast.verdict(first, commitments[1]))
        assert (await api.get("/challenges")).json() == []
        page = (await api.get("/verdicts?limit=2")).json()
        said = [(one["slot"], one["auditor"], one["outcome"]) for one in page["verdicts"]]
        assert said == [(0, first.peer_id, "rejected"), (0, second.peer_id, "rejected")]
        rest = (await api.get(f"/verdicts?limit=2&after={page['next']}")).json()
        assert ([one["slot"] for one in rest["verdicts"]], rest["next"]) == ([1], None)
        head = (await api.get("/log/head")).json()
        assert page["next"] < rest["verdicts"][0]["leaf"] < head["size"]
        assert (await api.get(f"/records/{rest['verdicts'][0]['hash']}")).status_code == 200

    play(cast, script)
