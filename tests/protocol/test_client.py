"""What a coordinator says is checked before it is believed. A small HTTP server plays the coordinator, an evil one too."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any, TypeVar

import pytest

from swarm_protocol import encoding
from swarm_protocol.chunks import content_hash, manifest_of
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import (
    ConfigurationError,
    EncodingError,
    HashMismatchError,
    InvalidDataError,
    RefusedError,
    SignatureError,
    UnreachableError,
)
from swarm_protocol.http import persist
from swarm_protocol.identity import Identity
from swarm_protocol.log import leaf_hash
from swarm_protocol.records import Envelope, LogHead, PartHeld, Receipt, encode_list
from swarm_protocol.spec import (
    AuditSpec,
    DataSpec,
    ExchangeSpec,
    ModelSpec,
    OuterSpec,
    RoundsSpec,
    RunSpec,
    TrainingSpec,
)

T = TypeVar("T")
Answer = tuple[int, dict[str, str], bytes]
Route = Answer | Callable[["Request"], Answer]

OWNER = Identity.from_seed(bytes(32))
STRANGER = Identity.from_seed(b"s" * 32)
ZERO = "0" * 64
SPEC = RunSpec(
    name="test",
    seed=1,
    numerics="native",
    coordinator=OWNER.public_key.hex(),
    checkpoint=ZERO,
    beacon=ZERO,
    model=ModelSpec(vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1),
    data=DataSpec(root=ZERO, tokenizer="bytes", train_tokens=1, held_out_windows=1),
    training=TrainingSpec(),
    exchange=ExchangeSpec(),
    outer=OuterSpec(),
    rounds=RoundsSpec(),
    audit=AuditSpec(),
)
RUN = SPEC.run_id
POSTED = Envelope.sign(OWNER, PartHeld(run=RUN, round=0, part_record=bytes(32)))


class Request(BaseHTTPRequestHandler):
    """Answers from the routes of its server; a route that is a function may also write to `wfile` itself."""

    server: FakeCoordinator
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(self.path)
        route = self.server.routes.get(path, (404, {}, b""))
        answer = route(self) if callable(route) else route
        try:
            self.send_response(answer[0])
            for name, value in {"content-length": str(len(answer[2])), **answer[1]}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer[2])
        except OSError:
            self.close_connection = True  # the client has had enough

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


class FakeCoordinator(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.routes: dict[str, Route] = {}
        self.asked: list[str] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answers(self, path: str, body: bytes = b"", *, status: int = 200, **headers: str) -> None:
        """Answer what is under the run's own path."""
        self.routes[f"/v1/runs/{RUN.hex()}{path}"] = (status, headers, body)


@pytest.fixture
def server() -> Iterator[FakeCoordinator]:
    with FakeCoordinator() as fake:
        threading.Thread(target=fake.serve_forever, args=(0.01,), daemon=True).start()
        fake.answers("/spec", SPEC.encode())
        fake.routes["/v1/runs"] = (200, {}, json.dumps([{"run_id": RUN.hex()}]).encode())
        yield fake
        fake.released.set()
        fake.shutdown()


def connected(server: FakeCoordinator, ask: Callable[[CoordinatorClient], Awaitable[T]], token: str | None = None) -> T:
    """The answer of one question, put by a client of its own."""

    async def main() -> T:
        async with await CoordinatorClient.connect(server.url, token=token) as client:
            return await ask(client)

    return asyncio.run(main())


# Finding the run


@pytest.mark.parametrize("suffix", ["", "/", f"/v1/runs/{RUN.hex()}", f"/v1/runs/{RUN.hex()}/"])
def test_the_run_is_found_by_its_address_or_as_the_only_one(server: FakeCoordinator, suffix: str) -> None:
    async def main() -> tuple[str, RunSpec]:
        async with await CoordinatorClient.connect(server.url + suffix) as client:
            return client.url, client.spec

    assert asyncio.run(main()) == (server.url, SPEC)


def test_an_address_without_a_scheme_is_http(server: FakeCoordinator) -> None:
    async def main() -> RunSpec:
        async with await CoordinatorClient.connect(server.url.removeprefix("http://")) as client:
            return client.spec

    assert asyncio.run(main()) == SPEC


@pytest.mark.parametrize(
    ("runs", "named"),
    [([], "none"), ([{"run_id": "aa"}, {"run_id": "bb"}], "aa, bb"), ({"run_id": "aa"}, "none"), (["aa"], "none")],
)
def test_with_none_or_several_runs_one_has_to_be_named(server: FakeCoordinator, runs: object, named: str) -> None:
    server.routes["/v1/runs"] = (200, {}, json.dumps(runs).encode())
    with pytest.raises(ConfigurationError, match=f"say which run.*: {named}$"):
        connected(server, CoordinatorClient.status)


def test_a_spec_that_does_not_hash_to_the_run_id_is_refused(server: FakeCoordinator) -> None:
    other = RunSpec(**{**{name: getattr(SPEC, name) for name in RunSpec.model_fields}, "seed": 2})
    server.answers("/spec", other.encode())
    with pytest.raises(HashMismatchError, match="run id"):
        connected(server, CoordinatorClient.status)


@pytest.mark.parametrize("raw", [b"", b"<html>", encoding.encode({"name": "x"}), SPEC.encode() + b"\0"])
def test_what_is_no_spec_is_refused(server: FakeCoordinator, raw: bytes) -> None:
    server.answers("/spec", raw)
    with pytest.raises((EncodingError, ConfigurationError)):
        connected(server, CoordinatorClient.status)


def test_a_web_page_in_place_of_a_coordinator_is_recognised(server: FakeCoordinator) -> None:
    server.routes["/v1/runs"] = (200, {"content-type": "text/html"}, b"<html>Welcome to the hotel network</html>")
    with pytest.raises(InvalidDataError, match="is the URL that of a coordinator"):
        connected(server, CoordinatorClient.status)


def test_a_redirect_names_the_address_to_use(server: FakeCoordinator) -> None:
    server.routes["/v1/runs"] = (301, {"location": "https://swarm.example.org/v1/runs"}, b"")
    with pytest.raises(UnreachableError, match=r"https://swarm\.example\.org/v1/runs; give that address"):
        connected(server, CoordinatorClient.status)


def test_an_address_that_is_none_is_a_mistake_in_the_configuration() -> None:
    for url in ("http://[", "http://host:port", "ftp://127.0.0.1"):
        with pytest.raises((ConfigurationError, UnreachableError)):
            asyncio.run(CoordinatorClient.connect(url))


# Answers of every kind


def test_a_refusal_carries_the_reason_and_code_of_its_problem_detail(server: FakeCoordinator) -> None:
    problem = {"title": "Refused", "detail": "this run asks for a token", "code": "token", "status": 401}
    server.answers("", json.dumps(problem).encode(), status=401)
    with pytest.raises(RefusedError) as caught:
        connected(server, CoordinatorClient.status)
    assert (caught.value.reason, caught.value.status, caught.value.code) == ("this run asks for a token", 401, "token")


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b'{"code": "x"}', b"\xff"])
def test_a_refusal_without_a_problem_detail_is_one_too(server: FakeCoordinator, body: bytes) -> None:
    server.answers("", body, status=404)
    with pytest.raises(RefusedError, match="HTTP 404") as caught:
        connected(server, CoordinatorClient.status)
    assert (caught.value.status, caught.value.code) == (404, "refused")


def test_a_refusal_does_not_fill_the_screen(server: FakeCoordinator) -> None:
    server.answers("", json.dumps({"detail": "x" * 100_000}).encode(), status=422)
    with pytest.raises(RefusedError) as caught:
        connected(server, CoordinatorClient.status)
    assert len(str(caught.value)) <= 1000


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_fault_of_the_coordinator_may_pass(server: FakeCoordinator, status: int) -> None:
    server.answers("", b"{}", status=status)
    with pytest.raises(UnreachableError, match=f"HTTP {status}"):
        connected(server, CoordinatorClient.status)


def test_nobody_at_the_address_is_unreachable() -> None:
    with FakeCoordinator() as gone:
        url = gone.url
    with pytest.raises(UnreachableError, match=url):
        asyncio.run(CoordinatorClient.connect(url))


def test_a_coordinator_that_does_not_answer_is_unreachable_at_the_deadline(server: FakeCoordinator) -> None:
    def silence(request: Request) -> Answer:
        server.released.wait()
        return 200, {}, b""

    server.routes["/v1/runs"] = silence
    started = time.monotonic()
    with pytest.raises(UnreachableError, match="does not answer"):
        asyncio.run(CoordinatorClient.connect(server.url, timeout_s=0.2))
    assert time.monotonic() - started < 3


def test_a_coordinator_that_drips_is_unreachable_at_the_deadline(server: FakeCoordinator) -> None:
    def drip(request: Request) -> Answer:
        request.send_response(200)
        request.send_header("content-length", "1000")
        request.end_headers()
        while not server.released.wait(0.05):
            try:
                request.wfile.write(b"x")
            except OSError:
                break
        return 200, {}, b""

    server.answers("/chunks/" + bytes(32).hex())
    server.routes[f"/v1/runs/{RUN.hex()}/chunks/{bytes(32).hex()}"] = drip
    started = time.monotonic()
    with pytest.raises(UnreachableError, match="does not answer"):
        connected(server, lambda client: client.chunk(bytes(32), timeout_s=0.3))
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("declared", [True, False])
def test_an_answer_beyond_its_bound_is_cut_while_it_comes(server: FakeCoordinator, declared: bool) -> None:
    written = 0

    def endless(request: Request) -> Answer:
        nonlocal written
        request.send_response(200)
        request.send_header(*(("content-length", str(1 << 40)) if declared else ("connection", "close")))
        request.end_headers()
        try:
            while written < 1 << 28:
                written += request.wfile.write(bytes(1 << 16))
        except OSError:
            pass
        request.close_connection = True
        return 200, {}, b""

    server.routes[f"/v1/runs/{RUN.hex()}/chunks/{bytes(32).hex()}"] = endless
    with pytest.raises(InvalidDataError, match="more than 1000 bytes"):
        connected(server, lambda client: client.chunk(bytes(32), max_bytes=1000))
    assert written < 1 << 25


def test_no_answer_is_ever_unpacked(server: FakeCoordinator) -> None:
    encodings = []

    def bomb(request: Request) -> Answer:
        encodings.append(request.headers["accept-encoding"])
        return 200, {"content-encoding": "gzip"}, gzip.compress(bytes(1 << 24))

    digest = content_hash(bytes(1 << 24))
    server.routes[f"/v1/runs/{RUN.hex()}/chunks/{digest.hex()}"] = bomb
    with pytest.raises(HashMismatchError):
        connected(server, lambda client: client.chunk(digest, max_bytes=1 << 20))
    assert encodings == ["identity"]


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"null", b'{"round": 1}', b'{"round": 1, "root": "zz"}', b"\xff{"])
def test_json_of_another_shape_is_refused(server: FakeCoordinator, body: bytes) -> None:
    server.answers("/checkpoints/latest", body)
    with pytest.raises(InvalidDataError):
        connected(server, CoordinatorClient.latest_checkpoint)


def test_the_status_and_a_receipt_are_objects(server: FakeCoordinator) -> None:
    server.answers("", b'{"phase": "training"}')
    assert connected(server, CoordinatorClient.status) == {"phase": "training"}
    for body in (b"[]", b"not json"):
        server.answers("", body)
        with pytest.raises(InvalidDataError):
            connected(server, CoordinatorClient.status)
        server.answers("/records", body)
        with pytest.raises(InvalidDataError):
            connected(server, lambda client: client.post(POSTED))


def test_a_log_that_ends_before_its_size_is_no_log(server: FakeCoordinator) -> None:
    async def leaves(client: CoordinatorClient) -> list[Envelope]:
        return [envelope async for envelope in client.log(2, 4)]

    server.answers("/log/entries", encode_list([POSTED]))
    assert connected(server, leaves) == [POSTED, POSTED]
    assert [path.partition("?")[2] for path in server.asked if "/log/" in path] == ["start=2", "start=3"]
    server.answers("/log/entries", encode_list([POSTED] * 9))
    assert connected(server, leaves) == [POSTED, POSTED]
    server.answers("/log/entries", encode_list([]))
    with pytest.raises(InvalidDataError, match="no leaf 2 of a log of 4"):
        connected(server, leaves)


@pytest.mark.parametrize("body", [b"[]", b'{"size": 1}', b'{"size": "x", "root": ""}', b'{"size": 1, "root": "zz"}'])
def test_a_log_head_is_a_size_and_a_root(server: FakeCoordinator, body: bytes) -> None:
    server.answers("/log/head", body)
    with pytest.raises(InvalidDataError):
        connected(server, CoordinatorClient.log_head)


def test_a_record_is_posted_with_its_bytes_and_the_token(server: FakeCoordinator) -> None:
    seen: dict[str, Any] = {}

    def records(request: Request) -> Answer:
        seen["token"] = request.headers["authorization"]
        seen["type"] = request.headers["content-type"]
        seen["body"] = request.rfile.read(int(request.headers["content-length"]))
        return 201, {}, b'{"leaf": 7}'

    server.routes[f"/v1/runs/{RUN.hex()}/records"] = records
    assert connected(server, lambda client: client.post(POSTED), token="sesame") == {"leaf": 7}
    assert seen == {"token": "Bearer sesame", "type": "application/cbor", "body": POSTED.encode()}


# Content


def test_a_receipt_in_the_answer_is_checked(server: FakeCoordinator) -> None:
    record, leaf = POSTED.open().hash, leaf_hash(POSTED.encode())
    for signer, named, accepted in ((OWNER, record, True), (OWNER, bytes(32), False), (STRANGER, record, False)):
        receipt = Receipt(run=RUN, round=1, sequence=7, record=named, leaf_hash=leaf)
        answer = {"leaf": 7, "receipt": Envelope.sign(signer, receipt).encode().hex()}
        server.answers("/records", json.dumps(answer).encode())
        if accepted:
            assert connected(server, lambda client: client.post(POSTED)) == answer
        else:
            with pytest.raises(InvalidDataError):
                connected(server, lambda client: client.post(POSTED))


def test_a_signed_head_of_the_log_is_the_coordinators(server: FakeCoordinator) -> None:
    head = LogHead(run=RUN, round=0, sequence=3, root=bytes(32))
    for signer in (OWNER, STRANGER):
        server.answers("/log/head", json.dumps({"signed": Envelope.sign(signer, head).encode().hex()}).encode())
        if signer is OWNER:
            assert connected(server, lambda client: client.signed_log_head())[0] == head
        else:
            with pytest.raises(SignatureError):
                connected(server, lambda client: client.signed_log_head())
    for body in (b"{}", b'{"signed": 1}', b'{"signed": "zz"}', b"[]"):
        server.answers("/log/head", body)
        with pytest.raises(InvalidDataError):
            connected(server, lambda client: client.signed_log_head())


def test_a_chunk_comes_with_the_bytes_of_its_hash_or_not_at_all(server: FakeCoordinator) -> None:
    data = b"a piece of a checkpoint"
    digest = content_hash(data)
    server.answers(f"/chunks/{digest.hex()}", data)
    assert connected(server, lambda client: client.chunk(digest)) == data
    for wrong in (b"", data[:-1], data + b"\0", b"A" + data[1:]):
        server.answers(f"/chunks/{digest.hex()}", wrong)
        with pytest.raises(HashMismatchError):
            connected(server, lambda client: client.chunk(digest))


def test_the_manifest_of_a_checkpoint_has_its_root_and_the_models_size(server: FakeCoordinator) -> None:
    state = manifest_of(bytes(8 * SPEC.model.num_parameters))
    other = manifest_of(b"\1" * (8 * SPEC.model.num_parameters))
    too_large = manifest_of(bytes(8 * SPEC.model.num_parameters + 1))
    path = f"/checkpoints/{state.root.hex()}"
    server.answers(path, state.encode())
    assert connected(server, lambda client: client.state_manifest(state.root)) == state
    for raw, error in (
        (other.encode(), HashMismatchError),
        (too_large.encode(), EncodingError),
        (state.encode()[:-1], EncodingError),
        (b"", EncodingError),
    ):
        server.answers(path, raw)
        with pytest.raises(error):
            connected(server, lambda client: client.state_manifest(state.root))


def test_a_long_poll_says_how_long_it_waits(server: FakeCoordinator) -> None:
    server.answers("/rounds/4/plan", status=204)
    server.answers("/rounds/4/part-records", status=204)

    async def both(client: CoordinatorClient) -> list[object]:
        return [await client.plan(4, wait_s=1.5), await client.part_records(4, after=3, wait_s=2.5)]

    assert connected(server, both) == [None, None]
    assert server.asked[-2].endswith("/plan?wait_s=1.5")
    assert server.asked[-1].endswith("/part-records?wait_s=2.5&after=3")


# Patience


class Attempts:
    """Fails a number of times, then answers."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.made = 0
        self._failures = failures
        self._error = error or UnreachableError("not yet")

    async def __call__(self) -> str:
        self.made += 1
        if self.made <= self._failures:
            raise self._error
        return "answer"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, by a clock that only they move."""
    made: list[float] = []

    async def sleep(seconds: float) -> None:
        loop = asyncio.get_running_loop()
        made.append(seconds)
        monkeypatch.setattr(loop, "time", lambda: 1000.0 + sum(made))

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return made


def test_patience_grows_between_attempts_up_to_a_longest_pause(pauses: list[float]) -> None:
    attempts, reasons = Attempts(7), list[str]()

    async def main() -> str:
        asyncio.get_running_loop().time = lambda: 1000.0 + sum(pauses)  # type: ignore[method-assign]
        return await persist(attempts, deadline_s=60.0, waiting=reasons.append)

    assert asyncio.run(main()) == "answer"
    assert attempts.made == 8
    assert reasons == ["not yet"] * 7
    assert pauses[:3] == pytest.approx([0.25, 0.4, 0.64])
    assert all(earlier <= later for earlier, later in pairwise(pauses))
    assert max(pauses) <= 5.0


def test_patience_ends_at_its_deadline_with_the_last_error(pauses: list[float]) -> None:
    attempts = Attempts(1000)

    async def main() -> str:
        asyncio.get_running_loop().time = lambda: 1000.0 + sum(pauses)  # type: ignore[method-assign]
        return await persist(attempts, deadline_s=30.0)

    with pytest.raises(UnreachableError, match="not yet"):
        asyncio.run(main())
    assert 20.0 < sum(pauses) <= 30.0


@pytest.mark.parametrize("error", [RefusedError("no"), InvalidDataError("wrong"), ValueError("bug")], ids=repr)
def test_patience_is_only_for_what_may_pass(error: Exception) -> None:
    attempts = Attempts(1, error)
    with pytest.raises(type(error)):
        asyncio.run(persist(attempts, deadline_s=30.0))
    assert attempts.made == 1
