"""For whoever watches the coordinator: health, readiness with its reason, metrics, and the dashboard that shows them."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from swarm_coordinator.api.limits import Limits
from swarm_protocol.records import Outcome

Api = Any
MakeCast = Callable[..., Any]
Play = Callable[..., None]
Usage = namedtuple("Usage", "total used free")
DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "swarm-coordinator.json"
PREFIX = "swarm_coordinator_"


async def values(api: Api) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All samples of the metrics, by name and labels."""
    answer = await api.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_a_coordinator_whose_clock_ticks_is_ready(make_cast: MakeCast, play: Play) -> None:
    async def script(api: Api) -> None:
        await api.service.tick()
        for path in ("/healthz", "/readyz"):
            answer = await api.http.get(path)
            assert (answer.status_code, answer.json()) == (200, {"status": "ok"})

    play(make_cast(), script)


def test_a_coordinator_is_not_ready_for_a_reason(
    make_cast: MakeCast, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(api: Api) -> None:
        async def reason() -> str:
            answer = await api.http.get("/readyz")
            assert (answer.status_code, answer.json()["code"]) == (503, "not-ready")
            assert answer.headers["content-type"] == "application/problem+json"
            assert int(answer.headers["retry-after"]) > 0
            assert (await api.http.get("/healthz")).status_code == 200
            return str(answer.json()["detail"])

        def away(*_: object) -> None:
            raise OperationalError("SELECT 1", {}, OSError("gone"))

        with monkeypatch.context() as patched:
            patched.setattr("swarm_coordinator.api.health.MAX_TICK_AGE_S", -1.0)
            assert "clock has not ticked" in await reason()
        with monkeypatch.context() as patched:
            patched.setattr(api.service, "read", away)
            assert "database does not answer" in await reason()
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 1 << 40, 1 << 20))
            assert "disk is full: 1 MiB are free, at least 256" in await reason()
        assert (await api.http.get("/readyz")).status_code == 200
        api.service.stop_waiting()
        assert "stopping" in await reason()

    play(make_cast(), script)


def test_metrics_tell_what_came_in_and_how_far_the_run_is(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        plan, commitments = await api.to_audits()
        await api.accept(cast.verdict(cast.auditors[0], commitments[0], Outcome.INCONCLUSIVE))
        await api.accept(cast.evaluation(0, plan.base))
        await api.offer(commitments[0])
        await api.refuse(b"nonsense", 400, "bad-record")
        await api.refuse(cast.commitment(plan, 0, sequence=9), 409, "closed")
        await api.get("/rounds/0/plan")
        await api.http.get("/nowhere/at/all")
        found = await values(api)
        run = (("run", cast.run.hex()[:32]),)
        assert found["log_leaves", run] == api.service.log_head[0]
        assert found["round", run] == 1
        assert found["nodes_present", run] == 2
        assert found["checkpoint_loss_nats", run] == 5.4
        audits = {dict(labels)["outcome"]: value for (name, labels), value in found.items() if name == "audits"}
        assert sum(audits.values()) == 2
        records = {
            (dict(labels)["kind"], dict(labels)["result"]): value
            for (name, labels), value in found.items()
            if name == "records_total"
        }
        assert records["registration", "accepted"] == 2
        assert records["commitment", "accepted"] == 2
        assert records["commitment", "repeated"] == 1
        assert records["commitment", "refused"] == 1
        assert records["none", "refused"] == 1
        assert found["commit_duration_seconds_count", ()] >= 10
        route = "/v1/runs/{run_id}/rounds/{number}/plan"
        labels = (("method", "GET"), ("route", route), ("status", "200"))
        assert found["request_duration_seconds_count", labels] == 2
        nowhere = (("method", "GET"), ("route", "none"), ("status", "404"))
        assert found["request_duration_seconds_count", nowhere] == 1

    play(cast, script)


def test_a_record_that_a_limit_refused_is_counted_as_such(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        await api.accept(cast.registration(cast.nodes[0]))
        assert (await api.offer(cast.registration(cast.nodes[0], sequence=1))).status_code == 429
        found = await values(api)
        assert found["records_total", (("kind", "registration"), ("result", "limited"))] == 1

    play(cast, script, limits=Limits(identity_burst=1, identity_per_s=0.01))


def test_methods_that_do_not_exist_are_one(make_cast: MakeCast, play: Play) -> None:
    async def script(api: Api) -> None:
        for method in ("BREW", "WHEN"):
            assert (await api.http.request(method, "/healthz")).status_code == 405
        methods = {
            dict(labels)["method"]
            for (name, labels), _ in (await values(api)).items()
            if name == "request_duration_seconds_count"
        }
        assert methods == {"other"}

    play(make_cast(), script)


@pytest.mark.parametrize(
    ("address", "public", "status"),
    [("127.0.0.1", False, 200), ("::1", False, 200), ("192.0.2.7", False, 403), ("192.0.2.7", True, 200)],
)
def test_metrics_are_for_this_machine_unless_they_are_public(
    make_cast: MakeCast, play: Play, address: str, public: bool, status: int
) -> None:
    async def script(api: Api) -> None:
        assert (await api.http.get("/metrics")).status_code == status

    play(make_cast(), script, address=address, metrics_public=public)


def test_a_proxy_on_this_machine_says_who_asks(make_cast: MakeCast, play: Play) -> None:
    async def script(api: Api) -> None:
        for forwarded, status in (("192.0.2.7", 403), ("127.0.0.1, 192.0.2.7", 403), ("::1", 200)):
            answer = await api.http.get("/metrics", headers={"x-forwarded-for": forwarded})
            assert answer.status_code == status

    play(make_cast(), script, listen=True)


def test_every_application_counts_for_itself(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        found = await values(api)
        assert not [name for name, _ in found if name == "request_duration_seconds_count"]

    play(cast, script)
    play(cast, script)


def test_the_dashboard_shows_metrics_that_exist_and_all_of_them(make_cast: MakeCast, play: Play) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    shown = {name for panel in dashboard["panels"] for target in panel["targets"] for name in _metrics(target["expr"])}
    cast = make_cast()

    async def script(api: Api) -> None:
        plan, _ = await api.to_audits()
        await api.accept(cast.evaluation(0, plan.base))
        waiting = asyncio.create_task(api.get("/rounds/1/plan?wait_s=0.1"))
        found = await values(api)
        await waiting
        names = {name for name, _ in found}
        assert {name.removeprefix(PREFIX) for name in shown} <= names
        told = {re.sub(r"_(bucket|count|sum|created|total)$", "", name) for name in names if "process_" not in name}
        assert told == {
            re.sub(r"_(bucket|count|total)$", "", name.removeprefix(PREFIX)) for name in shown if "process_" not in name
        }
        labels = {label for _, pairs in found for label, _ in pairs}
        of_a_run = {PREFIX + name for name, pairs in found if "run" in dict(pairs)}
        assert [one["name"] for one in dashboard["templating"]["list"]] == ["datasource", "instance", "run"]
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                used = set(re.findall(r'([a-z_]+)=~?"', target["expr"])) | set(
                    re.findall(r"[a-z]+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"])))
                )
                assert used - {"instance"} <= labels, target["expr"]
                told_apart = 'run=~"$run"' in target["expr"]
                assert told_apart == (not of_a_run.isdisjoint(_metrics(target["expr"]))), target["expr"]

    play(cast, script)


def _metrics(expression: str) -> list[str]:
    return re.findall(rf"(?:{PREFIX}|process_)[a-z_]+", expression)
