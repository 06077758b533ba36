"""`verify log` against the real API in process: the coordinator says what follows from its log, or the lie is named."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, text

from swarm_coordinator.app import create_app
from swarm_coordinator.journal import Journal
from swarm_coordinator.rounds import Phase
from swarm_coordinator.service import open_service
from swarm_node.verifying_log import HEADS_FILE, SeenHeads, compare
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.identity import Identity
from swarm_protocol.ledger import megaflops
from swarm_protocol.records import (
    BeaconReveal,
    CreditStatement,
    Envelope,
    LogHead,
    NonceOpening,
    Outcome,
    Record,
    RoundPlan,
    Verdict,
)

A, R, U, I = Outcome.ACCEPTED, Outcome.REJECTED, Outcome.UNAVAILABLE, Outcome.INCONCLUSIVE  # noqa: E741
ROUNDS = 3
Change = Callable[[Any], object]


@pytest.fixture
def played(make_stage: Callable[..., Any]) -> Any:
    """A run to its end, in which somebody was rejected, and credit was settled by the horizon and by the end."""
    stage = make_stage(nodes=3, rounds=ROUNDS, horizon=1)
    for number in range(ROUNDS):
        stage.play(number)
        for slot in range(len(stage.plan.roster)):
            stage.judge(slot, *((R, R) if (number, slot) == (1, 2) else (A, A)))
        for part in range(2):
            stage.judge_average(part, A, A)
        stage.standing = [node for node in stage.standing if node.public_key not in stage.journal.state.ended]
    assert stage.journal.state.phase is Phase.FINISHED
    return stage


def changed(stage: Any, change: Change) -> None:
    """Work on the database of a coordinator that is down."""
    stage.journal.close()
    with create_engine(f"sqlite:///{stage.cast.home.database}").begin() as connection:
        change(connection)


def verified(stage: Any, heads: Path, change: Change | None = None) -> tuple[dict[str, Any], list[str]]:
    """What `verify log` says of the stage's run; `change` is made while the coordinator is up, and its log in memory."""
    stage.journal.close()
    lines: list[str] = []

    async def run() -> dict[str, Any]:
        async with asyncio.timeout(60), open_service(stage.cast.home, stage.cast.clock) as service:
            if change is not None:
                with create_engine(f"sqlite:///{stage.cast.home.database}").begin() as connection:
                    change(connection)
            http = httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)))
            async with CoordinatorClient(http, "http://coordinator", stage.cast.spec, None) as client:
                return await compare(client, SeenHeads(heads), lines.append)

    return asyncio.run(run()), lines


def leaf_of(stage: Any, kind: type[Record], at: int = 0) -> int:
    return [leaf for leaf, envelope in enumerate(stage.log()) if isinstance(envelope.open(), kind)][at]


def resigned(stage: Any, leaf: int, **changes: object) -> Change:
    """The coordinator puts another record in a leaf's place, signed with its own key."""
    envelope: Envelope = stage.cast.changed(
        Identity.load(stage.cast.home.coordinator_key), stage.log()[leaf].open(), **changes
    )
    statement = text("UPDATE records SET envelope = :envelope, hash = :hash WHERE leaf = :leaf")
    values = {"envelope": envelope.encode(), "hash": envelope.open().hash, "leaf": leaf}
    return lambda connection: connection.execute(statement, values)


def dropped(leaf: int) -> Change:
    """A record never was; those after it move up."""

    def change(connection: Any) -> None:
        connection.execute(text("DELETE FROM records WHERE leaf = :leaf"), {"leaf": leaf})
        last = connection.execute(text("SELECT max(leaf) FROM records")).scalar()
        for later in range(leaf + 1, last + 1):
            connection.execute(
                text("UPDATE records SET leaf = :now WHERE leaf = :was"), {"now": later - 1, "was": later}
            )

    return change


def found(answer: tuple[dict[str, Any], list[str]], named: str) -> None:
    report, lines = answer
    assert not report["agree"]
    assert any(named in difference for difference in report["differences"]), report["differences"]
    assert all(f"DIFFERENT: {difference}" in lines for difference in report["differences"])


def test_an_honest_coordinator_says_what_follows_from_its_log(played: Any, tmp_path: Path) -> None:
    size, root = played.journal.log_head
    report, lines = verified(played, tmp_path)
    assert report["differences"] == []
    assert report["agree"]
    assert report["log"] == {"size": size, "root": root.hex()}
    assert report["ended"] == "all rounds are done"
    assert sum(report["records"].values()) == size
    assert (report["records"]["plan"], report["records"]["run-end"]) == (ROUNDS, 1)
    work = megaflops(played.cast.spec, played.cast.spec.standard_tokens)
    credit = report["credit"]
    # One of three was rejected in the second round of three, when its first contribution had been settled.
    assert (credit["settled"], credit["forfeited"], credit["pending"]) == (7 * work, work, 0)
    assert credit["statements"] == report["records"]["credit"] > 2
    assert lines[-1] == "The coordinator says what follows from its log."
    assert any(line.startswith("before") and "nothing verified" in line for line in lines)
    # Once more: nothing has changed since, and the head seen before is in the report.
    again, _ = verified(played, tmp_path)
    assert again["agree"]
    assert again["seen_before"] == report["log"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("UPDATE nodes SET settled = settled + 5", "credit of 12D3Koo"),
        ("UPDATE nodes SET forfeited = 0", "credit of 12D3Koo"),
        ("DELETE FROM audits WHERE round = 0 AND slot = 1 AND part = -1", "round 0, slot 1: the coordinator says"),
        ("UPDATE audits SET segments = x'8100' WHERE round = 0 AND slot = 1", "round 0, slot 1: the coordinator says"),
        ("UPDATE nodes SET ended_reason = NULL", "the coordinator says {'standing': 'good'"),
    ],
)
def test_what_is_said_against_the_log_is_named(played: Any, tmp_path: Path, change: str, named: str) -> None:
    found(verified(played, tmp_path, lambda connection: connection.execute(text(change))), named)
    assert (tmp_path / HEADS_FILE).exists()  # the log itself is right


def test_the_head_that_is_kept_is_signed(played: Any, tmp_path: Path) -> None:
    size, root = played.journal.log_head
    verified(played, tmp_path)
    ((name, kept),) = json.loads((tmp_path / HEADS_FILE).read_text()).items()
    assert name == f"{played.cast.run.hex()}/{played.cast.spec.coordinator}"
    owner = bytes.fromhex(played.cast.spec.coordinator)
    head = Envelope.decode(bytes.fromhex(kept["signed"])).open_as(LogHead, run=played.cast.run, key=owner)
    assert (head.sequence, head.root.hex()) == (kept["size"], kept["root"]) == (size, root.hex())


def test_altered_credit_in_a_signed_statement_is_found(played: Any, tmp_path: Path) -> None:
    last = leaf_of(played, CreditStatement, -1)
    statement = played.log()[last].open()
    entry = statement.moves[0].entries[0]
    more = entry.model_copy(update={"megaflops": entry.megaflops + 1})
    moves = (statement.moves[0].model_copy(update={"entries": (more, *statement.moves[0].entries[1:])}),)
    changed(played, resigned(played, last, moves=(*moves, *statement.moves[1:])))
    found(
        verified(played, tmp_path), f"has {more.megaflops} megaflops {statement.moves[0].move} in it, {entry.megaflops}"
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"balances": b"x" * 32}, "has other balances than follow from its moves"),
        ({"accounts": 2}, "has other balances than follow from its moves"),
        ({"checkpoint": b"x" * 32}, "names another checkpoint than the newest one"),
    ],
)
def test_a_signed_statement_that_does_not_follow_is_found(
    played: Any, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    changed(played, resigned(played, leaf_of(played, CreditStatement, -1), **changes))
    found(verified(played, tmp_path), named)
    assert not (tmp_path / HEADS_FILE).exists()


@pytest.mark.parametrize("at", [0, -1])
def test_a_statement_that_never_was_is_found(played: Any, tmp_path: Path, at: int) -> None:
    changed(played, dropped(leaf_of(played, CreditStatement, at)))
    found(verified(played, tmp_path), "credit statement that was due" if at == 0 else "a credit statement was due")


@pytest.mark.parametrize(
    ("kind", "named"),
    [(Verdict, "the plan of round 1 was made from a log of"), (NonceOpening, "the nonces that were opened before it")],
)
def test_a_dropped_record_is_found(played: Any, tmp_path: Path, kind: type[Record], named: str) -> None:
    changed(played, dropped(leaf_of(played, kind)))
    found(verified(played, tmp_path), named)


def test_a_dropped_record_is_found_though_the_next_plan_is_signed_anew(played: Any, tmp_path: Path) -> None:
    changed(played, dropped(leaf_of(played, Verdict)))
    played.journal = Journal.open(played.cast.home, played.cast.now_ms)
    log = played.journal.log
    plan = leaf_of(played, RoundPlan, 1)
    changed(played, resigned(played, plan, log_size=plan, log_root=log.root(plan)))
    found(verified(played, tmp_path), "is late, of another plan")


def test_a_changed_draw_is_found(played: Any, tmp_path: Path) -> None:
    changed(played, resigned(played, leaf_of(played, BeaconReveal, 1), value=b"x" * 32))
    found(verified(played, tmp_path), "does not belong to the chain")


def test_a_draw_from_which_a_nonce_was_left_out_is_found(played: Any, tmp_path: Path) -> None:
    at = leaf_of(played, BeaconReveal, -1)
    openings = played.log()[at].open().openings
    changed(played, resigned(played, at, openings=openings[1:]))
    found(verified(played, tmp_path), "does not go with the nonces that were opened before it")


def test_a_history_that_is_right_in_itself_but_rewritten_is_found(
    make_stage: Callable[..., Any], tmp_path: Path
) -> None:
    stage = make_stage(nodes=3, rounds=1, horizon=1)
    stage.play(0)
    stage.journal.close()
    backup = tmp_path / "backup.sqlite"
    shutil.copy(stage.cast.home.database, backup)

    def judged(outcome: Outcome) -> tuple[int, dict[str, Any]]:
        stage.journal = Journal.open(stage.cast.home, stage.cast.now_ms)
        for slot in range(3):
            stage.judge(slot, outcome, outcome)
        report, _ = verified(stage, tmp_path)
        return report["log"]["size"], report

    size, first = judged(A)
    assert first["agree"]
    shutil.copy(backup, stage.cast.home.database)
    # It forgets what it had acknowledged ...
    found(verified(stage, tmp_path), f"HISTORY WAS REWRITTEN: the log of {size} records that was verified before")
    # ... and goes on otherwise.
    _, second = judged(I)
    (difference,) = second["differences"]
    assert difference.startswith(f"HISTORY WAS REWRITTEN: the log of {size} records")
    assert first["log"]["root"] in difference
    # Somebody who looks for the first time cannot tell.
    assert verified(stage, tmp_path / "elsewhere")[0]["agree"]


def test_a_rewritten_record_is_found_as_such_though_the_replay_stops_at_it(played: Any, tmp_path: Path) -> None:
    assert verified(played, tmp_path)[0]["agree"]
    played.journal = Journal.open(played.cast.home, played.cast.now_ms)
    changed(played, resigned(played, leaf_of(played, BeaconReveal), value=b"x" * 32))
    answer = verified(played, tmp_path)
    found(answer, "does not belong to the chain")
    found(answer, "the coordinator cannot show that the")


def test_a_damaged_file_of_heads_is_an_error_and_no_first_look(played: Any, tmp_path: Path) -> None:
    (tmp_path / HEADS_FILE).write_text("{")
    with pytest.raises(ConfigurationError, match="holds the log heads seen before"):
        verified(played, tmp_path)
