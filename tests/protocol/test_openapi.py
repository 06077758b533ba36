"""The OpenAPI document against the API that it describes: schemathesis asks for everything in it, of a run in mid-round.

No answer is a fault, has a status or a media type that is not documented, or does not fit its schema.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.generation.case import Case
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from swarm_coordinator.app import create_app
from swarm_protocol.records import Envelope, Outcome

Api = Any
Serving = Callable[..., AbstractAsyncContextManager[Api]]

CBOR = "application/cbor"
EXAMPLES = 8
LONGEST_WAIT_S = 0.05
QUIET = settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


# The document is the same whatever the run.
schemathesis.openapi.media_type(CBOR, st.binary(max_size=300))
schema = schemathesis.openapi.from_dict(
    create_app().openapi(),
    config=SchemathesisConfig.from_dict({"seed": 7, "generation": {"database": "none"}}),
)


@dataclass(frozen=True)
class Stage:
    """A coordinator in mid-round, in a thread of its own: its address, names of what it has, and records to send it."""

    url: str
    document: dict[str, Any]
    run: str
    digests: list[str]
    keys: list[str]
    bodies: list[bytes]
    stop: Callable[[], None]


@asynccontextmanager
async def staged(cast: Any, serving: Serving) -> AsyncIterator[Stage]:
    async with serving(cast, listen=True) as api:
        clock = asyncio.create_task(api.service.run_clock())
        plan, commitments = await api.to_audits()
        await api.accept(cast.verdict(cast.auditors[0], commitments[0]), cast.evaluation(0, plan.base))
        await api.accept(cast.verdict(cast.auditors[0], commitments[1], Outcome.INCONCLUSIVE))
        checkpoint = bytes.fromhex(cast.spec.checkpoint)
        manifest = await api.several("/rounds/0/manifest")
        names = [checkpoint.hex(), plan.hash.hex(), *(envelope.open().hash.hex() for envelope in manifest)]
        names += [path.name for path in (cast.home.objects / "chunks").iterdir()]
        heartbeats = [cast.ready(node, 1, b"r" * 32).encode() for node in cast.nodes]
        known = [envelope.encode() for envelope in [*manifest, *commitments]]
        broken = [bytes([data[0] ^ 1]) + data[1:] for data in known[:2]] + [data[:-1] + b"x" for data in known[:2]]
        loop = asyncio.get_running_loop()
        yield Stage(
            url=str(api.http.base_url),
            document=(await api.http.get("/openapi.json")).json(),
            run=cast.run.hex(),
            digests=names,
            keys=[node.public_key.hex() for node in [*cast.nodes, *cast.auditors]],
            bodies=[*heartbeats, *known, *broken, b""],
            stop=lambda: loop.call_soon_threadsafe(api.service.stop_waiting) and None,
        )
        clock.cancel()


@contextmanager
def in_thread(work: AbstractAsyncContextManager[Stage]) -> Iterator[Stage]:
    """What an asynchronous context yields, which lives in a thread until the end."""
    ready, over = threading.Event(), threading.Event()
    found: list[Stage] = []

    async def run() -> None:
        async with work as stage:
            found.append(stage)
            ready.set()
            await asyncio.to_thread(over.wait)

    def main() -> None:
        try:
            asyncio.run(run())
        finally:
            ready.set()

    thread = threading.Thread(target=main)
    thread.start()
    try:
        assert ready.wait(60)
        assert found, "the coordinator did not start"
        yield found[0]
    finally:
        over.set()
        thread.join(60)


@pytest.fixture(scope="module")
def stage(cast: Any, serving: Serving) -> Iterator[Stage]:
    with in_thread(staged(cast, serving)) as found:
        yield found


def of_this_run(case: Case, stage: Stage) -> Case:
    """The request with names that this run has in place of made-up ones, its records, and a short wait."""
    if "run_id" in case.path_parameters and case.path_parameters["run_id"] != "0":
        case.path_parameters["run_id"] = stage.run
    for name, known in (("digest", stage.digests), ("root", stage.digests), ("key", stage.keys)):
        value = case.path_parameters.get(name)
        if isinstance(value, str) and len(value) == 64:
            case.path_parameters[name] = known[sum(value.encode()) % len(known)]
    wait_s = case.query.get("wait_s")
    if isinstance(wait_s, float | int) and LONGEST_WAIT_S < wait_s <= 30:
        case.query["wait_s"] = LONGEST_WAIT_S
    if isinstance(case.body, bytes) and len(case.body) % 2:
        case.body = stage.bodies[len(case.body) % len(stage.bodies)]
    return case


@schema.exclude(path_regex="/events$").parametrize()
@QUIET
def test_every_answer_is_one_that_is_documented(case: Case, stage: Stage) -> None:
    # A body is any bytes to the schema, and what was meant as a wrong one may have become a record of the run.
    excluded = [negative_data_rejection, positive_data_acceptance] if case.method in ("POST", "PUT") else []
    of_this_run(case, stage).call_and_validate(base_url=stage.url, excluded_checks=excluded)


def test_every_operation_says_what_it_is_and_how_it_fails(stage: Stage) -> None:
    operations = {
        (method, path): operation
        for path, methods in stage.document["paths"].items()
        for method, operation in methods.items()
    }
    names = [operation["operationId"] for operation in operations.values()]
    assert len(set(names)) == len(names) >= 40
    for operation in operations.values():
        assert operation["tags"]
        assert operation["summary"]
        assert {"429", "500", "503"} <= operation["responses"].keys()
        for status, response in operation["responses"].items():
            assert int(status) < 400 or response["content"] == {
                "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
            }


def test_names_of_operations_are_those_that_clients_were_made_with(stage: Stage) -> None:
    paths = stage.document["paths"]
    assert paths["/v1/runs/{run_id}/records"]["post"]["operationId"] == "records_submit"
    assert paths["/v1/runs/{run_id}/rounds/{number}/plan"]["get"]["operationId"] == "rounds_plan"
    assert paths["/v1/runs/{run_id}/chunks/{digest}"]["get"]["operationId"] == "objects_chunk"
    assert paths["/v1/runs/{run_id}/chunks/{digest}"]["head"]["operationId"] == "objects_chunk_head"


def test_every_model_has_an_example_that_fits_it(stage: Stage) -> None:
    components = stage.document["components"]
    for name, schema in components["schemas"].items():
        if schema["type"] == "object":
            (example,) = schema["examples"]
            whole = {"$ref": f"#/components/schemas/{name}", "components": components}
            jsonschema_rs.validator_for(whole).validate(example)


def test_the_example_of_a_record_is_one(stage: Stage) -> None:
    body = stage.document["paths"]["/v1/runs/{run_id}/records"]["post"]["requestBody"]["content"][CBOR]
    example = body["examples"]["heartbeat"]["value"]
    assert Envelope.decode(bytes.fromhex(example)).open().kind == "ready"


def test_the_document_can_be_read_in_a_browser(stage: Stage) -> None:
    page = requests.get(f"{stage.url}/docs", timeout=10)
    assert page.status_code == 200
    assert "/openapi.json" in page.text


@schema.include(path_regex="/events$").parametrize()
@QUIET
def test_events_are_documented_too(case: Case, stage: Stage) -> None:
    stage.stop()  # a stream ends with its coordinator
    of_this_run(case, stage).call_and_validate(base_url=stage.url)
