"""Who had to be audited follows from the log: what `History` makes of it is what the coordinator keeps in its database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, text

from swarm_coordinator.api.status import drawn_segments
from swarm_coordinator.app import create_app
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.tables import AuditRow, NodeRow
from swarm_coordinator.service import open_service
from swarm_node.verifying_draws import compare
from swarm_protocol import encoding
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import InvalidDataError, RefusedError
from swarm_protocol.history import History
from swarm_protocol.identity import Identity
from swarm_protocol.policy import Account
from swarm_protocol.records import (
    Appointment,
    BeaconReveal,
    CommitmentSet,
    Dismissal,
    Envelope,
    NonceOpening,
    Outcome,
    PartRecord,
    Role,
    RoundPlan,
    Verdict,
)

MakeCast = Callable[..., Any]

A, R, U, I = Outcome.ACCEPTED, Outcome.REJECTED, Outcome.UNAVAILABLE, Outcome.INCONCLUSIVE  # noqa: E741
ROUNDS = 8


def replayed(stage: Any, log: list[Envelope]) -> History:
    history = History(stage.cast.spec)
    for envelope in log:
        history.add(envelope)
    return history


def the_same(stage: Any, history: History) -> None:
    """The history has the database's audits, outcomes, segments and accounts, and no others."""
    assert (history.log.size, history.log.root()) == stage.journal.log_head

    def query(archive: Archive) -> tuple[dict[Any, Any], dict[Any, Any]]:
        rows = archive.session.query(AuditRow).all()
        audits = {(row.round, row.slot, None if row.part < 0 else row.part): stored(archive, row) for row in rows}
        return audits, {node.key: account(node) for node in archive.nodes()}

    def account(node: NodeRow) -> Account:
        unavailable: Any = encoding.decode(node.unavailable_rounds, max_bytes=1 << 10)
        return Account(node.vouched_tokens, node.accepted, tuple(unavailable), node.ended_reason)

    def stored(archive: Archive, row: AuditRow) -> tuple[object, ...]:
        return row.peer, row.audited, tuple(drawn_segments(row)), row.outcome, archive.verdicts(row)

    found = {
        (number, *where): (audit.peer, audit.audited, audit.segments, audit.outcome, audit.verdicts)
        for number, played in enumerate(history.rounds)
        for where, audit in played.audits.items()
    }
    assert (found, history.accounts) == stage.journal.read(query)
    assert history.ledger.balances == stage.balances()


def play_on(stage: Any, rounds: int = 2) -> None:
    """Rounds in which everybody is accepted, up to the draw of the last one."""
    for number in range(rounds):
        stage.play(number)
        if number < rounds - 1:
            for slot in range(len(stage.plan.roster)):
                stage.judge(slot, A, A)


def place(log: list[Envelope], kind: type, at: int = 0) -> int:
    return [place for place, envelope in enumerate(log) if isinstance(envelope.open(), kind)][at]


def test_a_run_of_every_kind_of_verdict_is_recomputed_at_each_of_its_rounds(stage: Any) -> None:
    cast = stage.cast
    history, taken = History(cast.spec), 0
    first, second, third, fourth, _ = sorted(cast.nodes, key=lambda node: node.public_key)

    def check() -> None:
        nonlocal taken
        log = stage.log()
        for envelope in log[taken:]:
            history.add(envelope)
        taken = len(log)
        the_same(stage, history)

    def out(node: Identity) -> None:
        stage.standing.remove(node)
        assert history.account(node.public_key).ended

    check()
    stage.play(0)
    check()
    for slot in range(4):
        stage.judge(slot, A, A)
    stage.judge_average(0, A, A)
    stage.judge(4, U, U)
    check()
    assert history.account(first.public_key).vouched_tokens == cast.spec.standard_tokens

    stage.silent = {second.public_key, third.public_key}
    stage.play(1)
    for slot, outcomes in enumerate(((A, A), (R, R), (I, U), (A, A), (U, U))):
        stage.judge(slot, *outcomes)
    check()
    assert history.rounds[1].audits[1, None].outcome is R
    assert history.rounds[1].audits[2, None].outcome is I
    out(second)
    out(next(node for node in stage.standing if node.public_key == stage.plan.roster[4].peer))

    # Somebody signs two averages of one part, after the draw of what it contributed.
    stage.silent = {seat.peer for seat in stage.plan.roster}
    stage.play(2)
    check()
    plan = stage.plan
    assert [seat.peer for seat in plan.roster] == [node.public_key for node in (first, third, fourth)]
    again = cast.changed(third, stage.averages[1].open(), result=b"x" * 32)
    stage.submit(again)
    check()
    out(third)
    assert history.rounds[2].audits[1, None].outcome == "moot"
    # What auditors say after that has no effect; neither has what they say of what is resolved.
    stage.judge(1, R, R)
    stage.judge(0, A, A)
    stage.judge(2, R)
    newcomer = Identity.generate()
    stage.journal.appoint(Role.AUDITOR, newcomer.public_key, cast.now_ms)
    cast.auditors.append(newcomer)
    check()
    stage.submit(cast.verdict(newcomer, stage.commitments[0], R), cast.verdict(newcomer, stage.commitments[2], R))
    check()
    assert history.rounds[2].audits[0, None].outcome is A
    out(fourth)
    assert {account.ended is None for account in history.accounts.values()} == {True, False}


def test_one_verdict_of_a_new_auditor_counts_only_from_the_appointment_on(stage: Any) -> None:
    stage.play(0)
    stage.judge(0, I, A)
    the_same(stage, replayed(stage, stage.log()))
    late = Identity.generate()
    stage.journal.appoint(Role.AUDITOR, late.public_key, stage.cast.now_ms)
    stage.submit(stage.cast.verdict(late, stage.commitments[0], A))
    the_same(stage, replayed(stage, stage.log()))


def test_who_committed_to_nothing_averages_nothing(stage: Any) -> None:
    stage.absent = {min(node.public_key for node in stage.cast.nodes)}
    with pytest.raises(RefusedError, match="committed to nothing in round 0") as refused:
        stage.play(0)
    assert (refused.value.status, refused.value.code) == (403, "no-reducer")


def test_a_dropped_verdict_is_found_at_the_next_plan(stage: Any) -> None:
    play_on(stage)
    log = stage.log()
    del log[place(log, Verdict)]
    with pytest.raises(InvalidDataError, match="the plan of round 1 was made from a log of"):
        replayed(stage, log)


def forged(stage: Any, place_of: int, **changes: object) -> list[Envelope]:
    """The log up to one of the coordinator's records, which it signs with other fields."""
    log = stage.log()
    record = log[place_of].open()
    signer = Identity.load(stage.cast.home.coordinator_key)
    return [*log[:place_of], stage.cast.changed(signer, record, **changes)]


def test_a_beacon_value_of_no_chain_is_found(stage: Any) -> None:
    play_on(stage)
    with pytest.raises(InvalidDataError, match="does not belong to the chain"):
        replayed(stage, forged(stage, place(stage.log(), BeaconReveal), value=b"x" * 32))


def test_a_nonce_that_the_draw_leaves_out_is_found(stage: Any) -> None:
    play_on(stage)
    at = place(stage.log(), BeaconReveal)
    openings = stage.log()[at].open_as(BeaconReveal, run=stage.cast.run).openings
    with pytest.raises(InvalidDataError, match="the nonces that were opened before it"):
        replayed(stage, forged(stage, at, openings=openings[1:]))


def test_a_commitment_that_the_closing_set_leaves_out_is_found(stage: Any) -> None:
    play_on(stage)
    at = place(stage.log(), CommitmentSet)
    entries = stage.log()[at].open_as(CommitmentSet, run=stage.cast.run).commitments
    with pytest.raises(InvalidDataError, match="does not name the commitments that came in before it"):
        replayed(stage, forged(stage, at, commitments=entries[:-1]))


@pytest.mark.parametrize("changes", [{"log_root": b"x" * 32}, {"log_size": 3}, {"previous_beacon": b"x" * 32}])
def test_a_plan_from_another_log_or_beacon_is_found(stage: Any, changes: dict[str, object]) -> None:
    play_on(stage)
    with pytest.raises(InvalidDataError, match="the plan of round 1"):
        replayed(stage, forged(stage, place(stage.log(), RoundPlan, 1), **changes))


def test_a_verdict_by_somebody_not_appointed_is_found(stage: Any) -> None:
    stage.play(0)
    verdict = stage.cast.verdict(Identity.generate(), stage.commitments[0], R)
    with pytest.raises(InvalidDataError, match="who was not appointed as auditor"):
        replayed(stage, [*stage.log(), verdict])


def test_a_verdict_on_what_was_not_drawn_is_found(stage: Any) -> None:
    stage.play(0)
    cast = stage.cast
    elsewhere = cast.commitment(stage.plan, 0, trace_root=b"x" * 32)
    with pytest.raises(InvalidDataError, match="which was not drawn"):
        replayed(stage, [*stage.log(), cast.verdict(cast.auditors[0], elsewhere)])
    stage.journal.appoint(Role.AUDITOR, cast.holder(stage.plan, 0).public_key, cast.now_ms)
    own = cast.verdict(cast.holder(stage.plan, 0), stage.commitments[0])
    with pytest.raises(InvalidDataError, match="by whose it is"):
        replayed(stage, [*stage.log(), own])


@pytest.mark.parametrize("kind", [Appointment, RoundPlan, CommitmentSet, BeaconReveal, PartRecord, NonceOpening])
def test_a_record_by_the_wrong_signer_is_found(stage: Any, kind: type) -> None:
    play_on(stage)
    log = stage.log()
    at = place(log, kind)
    with pytest.raises(InvalidDataError, match=f"leaf {at} of the log: .* by "):
        replayed(stage, [*log[:at], Envelope.sign(Identity.generate(), log[at].open())])


def compared(stage: Any, change: Callable[[Any], None] = lambda _: None) -> tuple[dict[str, Any], list[str]]:
    """What `verify draws` finds at a coordinator that serves the stage's run, with its audits changed by `change`."""
    stage.journal.close()
    lines: list[str] = []

    async def run() -> dict[str, Any]:
        async with asyncio.timeout(30), open_service(stage.cast.home, stage.cast.clock) as service:
            with create_engine(f"sqlite:///{stage.cast.home.database}").begin() as connection:
                change(connection)
            http = httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)))
            async with CoordinatorClient(http, "http://coordinator", stage.cast.spec, None) as client:
                return await compare(client, lines.append)

    return asyncio.run(run()), lines


def test_who_looks_at_a_coordinator_from_outside_finds_the_same(stage: Any) -> None:
    play_on(stage, rounds=3)
    stage.judge(1, R, R)
    stage.judge(2, U, I)
    found, lines = compared(stage)
    assert found["differences"] == []
    assert found["agree"]
    assert found["log"] == {"size": stage.journal.log_head[0], "root": stage.journal.log_head[1].hex()}
    assert [one["round"] for one in found["rounds"]] == [0, 1, 2]
    assert {"slot": 1, "segments": [0, 1], "outcome": "accepted"} in found["rounds"][0]["contributions"]
    assert lines[0].startswith("round    0    5 slots  drawn slots: 0 (segments 0,1) accepted; 1 ")
    assert lines[-1].endswith("rounds: 3; the coordinator says the same.")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("DELETE FROM audits WHERE round = 0 AND slot = 3 AND part = -1", "round 0, slot 3: the coordinator says"),
        ("UPDATE audits SET outcome = 'accepted' WHERE round = 0 AND slot = 1", "audits in the status"),
        ("UPDATE nodes SET vouched_tokens = 1000000", "'probation': False"),
        ("DELETE FROM verdicts WHERE round = 0 AND slot = 0", "round 0, verdicts: the coordinator says"),
    ],
)
def test_what_a_coordinator_says_against_its_log_is_named(stage: Any, change: str, named: str) -> None:
    stage.play(0)
    stage.judge(0, A, A)
    found, lines = compared(stage, lambda connection: connection.execute(text(change)))
    assert not found["agree"]
    assert any(named in difference for difference in found["differences"]), found["differences"]
    assert all(f"DIFFERENT: {difference}" in lines for difference in found["differences"])


def test_open_audits_are_resolved_anew_without_an_auditor_that_is_dismissed(stage: Any) -> None:
    stays, goes = stage.cast.auditors
    stage.play(0)
    for slot, outcome in ((1, I), (2, R), (3, U)):
        stage.submit(stage.cast.verdict(stays, stage.commitments[slot], outcome))
    stage.submit(stage.cast.verdict(goes, stage.commitments[4], I))
    with stage.journal._entry(stage.cast.now_ms) as entry:
        assert entry.dismiss(goes.public_key, "its key was lost")
        assert not entry.dismiss(goes.public_key, "again")
    history = replayed(stage, stage.log())
    the_same(stage, history)
    outcomes = [history.rounds[0].audits[slot, None].outcome for slot in range(1, 5)]
    assert outcomes == [I, I, U, None]
    with pytest.raises(RefusedError, match="only an appointed auditor"):
        stage.submit(stage.cast.verdict(goes, stage.commitments[0]))
    stage.submit(stage.cast.verdict(stays, stage.commitments[4], A))
    stage.journal.appoint(Role.AUDITOR, goes.public_key, stage.cast.now_ms)
    history = replayed(stage, stage.log())
    the_same(stage, history)
    assert history.auditors() == {stays.public_key}
    assert history.rounds[0].audits[4, None].outcome is A
    stage.play(1)
    the_same(stage, replayed(stage, stage.log()))


def test_a_dismissal_is_the_coordinators_and_of_an_auditor_and_ends_its_say(stage: Any) -> None:
    stage.play(0)
    log, cast = stage.log(), stage.cast
    coordinator = Identity.load(cast.home.coordinator_key)
    auditor = cast.auditors[0]
    record = Dismissal(run=cast.run, round=0, key=auditor.public_key, reason="its key was lost")
    dismissed = Envelope.sign(coordinator, record)
    verdict = cast.verdict(auditor, stage.commitments[0])
    replayed(stage, [*log, verdict])
    for tail, words in (
        ([Envelope.sign(auditor, record)], "who is not the run's coordinator"),
        ([dismissed, verdict], "who was not appointed as auditor"),
        ([dismissed, cast.changed(coordinator, record, sequence=1)], "who is no auditor"),
        ([cast.changed(coordinator, record, key=cast.worker.public_key)], "who is no auditor"),
    ):
        with pytest.raises(InvalidDataError, match=words):
            replayed(stage, [*log, *tail])
