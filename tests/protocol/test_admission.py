"""Who may register, whom an invitation makes what, and where a volunteer stands on its way to a slot."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest

from swarm_coordinator import config, entrance, owner
from swarm_coordinator.app import create_app
from swarm_coordinator.journal import Journal
from swarm_coordinator.service import Service, open_service
from swarm_protocol.errors import ConfigurationError, RefusedError
from swarm_protocol.identity import Identity
from swarm_protocol.records import Ready

MakeCast = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("database_url")

STRANGER = Identity.from_seed(b"s" * 32)


class Door:
    """A run's journal, and who knocks."""

    def __init__(self, cast: Any, mode: config.Mode) -> None:
        config.write(cast.home.config_file, cast.home.config().changed("admission", mode=mode))
        self.cast = cast
        self.journal = Journal.open(cast.home, cast.now_ms)
        self._sequence = 0

    def invite(self, uses: int = 1, expires_ms: int | None = None, label: str = "") -> str:
        with owner.transaction(self.cast.home) as (session, run):
            return entrance.invite(session, run, label=label, uses=uses, now_ms=self.cast.now_ms, expires_ms=expires_ms)

    def register(self, node: Identity, token: str | None = None) -> None:
        envelope = self.cast.registration(node, self._sequence)
        self._sequence += 1
        self.journal.submit(envelope, envelope.open(), token, self.cast.now_ms)

    def refusal(self, node: Identity, token: str | None = None) -> str:
        with pytest.raises(RefusedError) as refused:
            self.register(node, token)
        assert refused.value.reason.endswith(("TOKEN", "another", "to be allowed"))
        return refused.value.code

    def used(self) -> list[int]:
        with owner.transaction(self.cast.home) as (session, run):
            return [row.used for row in entrance.invitations(session, run)]

    def invited(self, node: Identity) -> bool | None:
        row = self.journal.read(lambda archive: archive.node(node.public_key))
        return None if row is None else row.invited


@pytest.fixture
def door(make_cast: MakeCast, request: pytest.FixtureRequest) -> Any:
    cast = make_cast(token="sesame" if request.param == "token" else None)
    opened = Door(cast, request.param)
    yield opened
    opened.journal.close()


@pytest.mark.parametrize("door", ["open"], indirect=True)
def test_in_an_open_run_anybody_registers_and_an_invitation_is_still_worth_something(door: Door) -> None:
    first, second = door.cast.nodes
    door.register(first, "whatever")
    assert door.invited(first) is False
    door.register(second, door.invite())
    assert (door.invited(second), door.used()) == (True, [1])


@pytest.mark.parametrize("door", ["token"], indirect=True)
def test_the_shared_token_is_asked_for(door: Door) -> None:
    first, second = door.cast.nodes
    assert door.refusal(first) == door.refusal(first, "sesam") == "token"
    door.register(first, "sesame")
    assert door.invited(first) is False
    door.register(second, door.invite())
    assert door.invited(second) is True


@pytest.mark.parametrize("door", ["invite"], indirect=True)
def test_an_invitation_is_good_for_as_many_identities_as_it_says(door: Door) -> None:
    first, second = door.cast.nodes
    assert door.refusal(first) == door.refusal(first, "guessed") == "token"
    token = door.invite()
    door.register(first, token)
    door.register(first, token)
    door.register(first)
    assert door.used() == [1]
    assert door.refusal(second, token) == "invite-used"
    assert door.invited(second) is None
    both = door.invite(uses=2)
    door.register(second, both)
    door.register(STRANGER, both)
    assert sorted(door.used()) == [1, 2]


@pytest.mark.parametrize("door", ["invite"], indirect=True)
def test_an_invitation_ends_at_its_time_or_when_it_is_withdrawn(door: Door) -> None:
    first, _ = door.cast.nodes
    token, other = door.invite(expires_ms=door.cast.now_ms + 1000), door.invite(label="for ada")
    with owner.transaction(door.cast.home) as (session, run):
        assert entrance.withdraw(session, run, "for bob", door.cast.now_ms) == 0
        assert entrance.withdraw(session, run, "for ada", door.cast.now_ms) == 1
    assert door.refusal(first, other) == "invite-expired"
    door.cast.now_ms += 1000
    assert door.refusal(first, token) == "invite-expired"
    assert door.used() == [0, 0]


@pytest.mark.parametrize("door", ["invite"], indirect=True)
def test_of_an_invitation_only_the_hash_is_stored(door: Door) -> None:
    token = door.invite()
    with owner.transaction(door.cast.home) as (session, run):
        (row,) = entrance.invitations(session, run)
        stored = [getattr(row, column.key) for column in row.__table__.columns]
        assert len(row.token_hash) == 32
    assert not any(token in str(value) or token.encode() == value for value in stored)


@pytest.mark.parametrize("door", ["invite"], indirect=True)
def test_a_refused_registration_uses_nothing_up(door: Door) -> None:
    token = door.invite()
    envelope = door.cast.registration(door.cast.nodes[0], protocol=99)
    with pytest.raises(RefusedError, match="protocol"):
        door.journal.submit(envelope, envelope.open(), token, door.cast.now_ms)
    assert door.used() == [0]


@pytest.mark.parametrize("door", ["allow-list"], indirect=True)
def test_only_who_is_on_the_list_registers(door: Door) -> None:
    first, second = door.cast.nodes
    with owner.transaction(door.cast.home) as (session, run):
        entrance.allow(session, run, first.public_key, "ada")
    door.register(first)
    assert door.refusal(second) == door.refusal(second, door.invite()) == "not-allowed"
    with owner.transaction(door.cast.home) as (session, run):
        assert entrance.disallow(session, run, first.public_key)
        assert not entrance.disallow(session, run, second.public_key)
    assert door.refusal(first) == "not-allowed"


def test_who_was_invited_has_weight_from_the_start_and_is_audited_all_the_same(make_cast: MakeCast) -> None:
    cast = make_cast()
    cast.spec = cast.spec.model_copy(update={"exchange": cast.spec.exchange.model_copy(update={"weight_after": 3})})
    cast.home.spec_file.write_bytes(cast.spec.encode())
    door = Door(cast, "open")
    door.register(cast.nodes[0], door.invite())
    door.register(cast.nodes[1])
    for node in cast.nodes:
        ready = cast.ready(node, 0, door.journal.state.base)
        door.journal.submit(ready, ready.open(), None, cast.now_ms)
    weights = {seat.peer: seat.weight for seat in door.journal.state.roster}
    assert weights[cast.nodes[0].public_key] > 0
    assert weights[cast.nodes[1].public_key] == 0
    assert not any(node.offer.trusted for node in door.journal.state.nodes.values())
    door.journal.close()


def test_a_run_that_asks_for_a_token_has_one(make_cast: MakeCast) -> None:
    with pytest.raises(ConfigurationError, match="the run has none"):
        Door(make_cast(), "token")


@asynccontextmanager
async def serving(cast: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    async with open_service(cast.home, cast.clock) as service:
        transport = httpx.ASGITransport(create_app(service))
        base = f"http://test/v1/runs/{cast.run.hex()}"
        async with httpx.AsyncClient(transport=transport, base_url=base) as http:
            yield http, service


def test_a_volunteer_is_told_where_it_stands(make_cast: MakeCast) -> None:
    cast = make_cast(nodes=5)
    audit = cast.spec.audit.model_copy(update={"budget": 0.5})
    pace = cast.spec.rounds.model_copy(update={"min_nodes": 2, "assemble_s": 5.0})
    cast.spec = cast.spec.model_copy(update={"audit": audit, "rounds": pace})
    cast.home.spec_file.write_bytes(cast.spec.encode())

    async def play() -> None:
        async with serving(cast) as (http, service):

            async def place(node: Identity) -> dict[str, Any]:
                answer = await http.get(f"/nodes/{node.public_key.hex()}/place")
                assert answer.status_code == 200, answer.text
                cast.now_ms += 1000
                found: dict[str, Any] = answer.json()
                return found

            assert (await place(cast.nodes[0]))["state"] == "unknown"
            for node in cast.nodes:
                await service.submit(cast.registration(node).encode(), None)
            assert "not heard" in (await place(cast.nodes[0]))["sentence"]
            base = service.state.base
            await service.submit(cast.ready(cast.nodes[4], 0, base).encode(), None)
            assert (await place(cast.nodes[4]))["sentence"] == "a round takes 2 nodes, and 1 are ready"
            for node in cast.nodes[:4]:
                await service.submit(cast.ready(node, 0, base).encode(), None)
            found = [await place(node) for node in cast.nodes]
            assert [one["state"] for one in found] == ["waiting"] * 2 + ["queued"] * 3
            assert [one["position"] for one in found] == [None, None, 1, 2, 3]
            assert found[4]["sentence"] == (
                "3rd in the queue: this run audits newcomers whole and has room for 2 at a time"
            )
            assert (found[4]["room"], found[4]["vouched"], found[4]["probation"]) == (2, 0.0, 10)
            cast.now_ms += 5000
            await service.tick()
            assert (await place(cast.nodes[0]))["sentence"] == "slot 0 of round 0"
            assert (await place(cast.nodes[2]))["position"] == 1
            assert (await http.get("/nodes/zz/place")).status_code == 422

    anyio.run(play)


def test_registrations_stand_in_the_queue_in_the_order_of_the_log(make_cast: MakeCast) -> None:
    cast = make_cast()
    door = Door(cast, "open")
    for node in reversed(cast.nodes):
        door.register(node)
    door.register(cast.nodes[1])
    for node in cast.nodes:
        record = Ready(
            run=cast.run, round=0, sequence=0, base=door.journal.state.base, tokens_per_s=1.0, can_reduce=True,
            upload_bytes_per_s=0,
        )  # fmt: skip
        envelope = cast.changed(node, record)
        door.journal.submit(envelope, envelope.open(), None, cast.now_ms)
    since = [door.journal.state.nodes[node.public_key].offer.since for node in cast.nodes]
    assert since[0] == since[1] + 1
    door.journal.close()
