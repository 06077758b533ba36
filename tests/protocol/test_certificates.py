"""Certificates and the routes of credit: what the API serves is verified offline, and nothing in it can be another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from swarm_coordinator.app import create_app
from swarm_coordinator.service import open_service
from swarm_node.cli import app
from swarm_protocol.certificate import check, parse
from swarm_protocol.errors import InvalidDataError, SwarmError
from swarm_protocol.identity import Identity, peer_id
from swarm_protocol.ledger import Balance, megaflops, tree
from swarm_protocol.log import Log, leaf_hash, verify_consistency, verify_inclusion
from swarm_protocol.records import CreditStatement, Envelope, LogHead, Outcome, RunEnd

A, R = Outcome.ACCEPTED, Outcome.REJECTED
ROUNDS = 2


@pytest.fixture
def played(make_stage: Callable[..., Any]) -> Any:
    stage = make_stage(nodes=3, rounds=ROUNDS, reductions=0.0, horizon=1)
    for number in range(ROUNDS):
        stage.play(number)
        for slot in range(len(stage.plan.roster)):
            stage.judge(slot, *((R, R) if (number, slot) == (0, 2) else (A, A)))
        stage.standing = [node for node in stage.standing if node.public_key not in stage.journal.state.ended]
    return stage


def asked(stage: Any, *paths: str) -> list[Any]:
    """Answers of the API, as JSON, with the status in place of what was refused."""
    stage.journal.close()

    async def run() -> list[Any]:
        async with asyncio.timeout(60), open_service(stage.cast.home, stage.cast.clock) as service:
            transport = httpx.ASGITransport(create_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://coordinator") as http:
                answers = [await http.get(f"/v1/runs/{stage.cast.run.hex()}{path}") for path in paths]
        return [answer.json() if answer.status_code == 200 else answer.status_code for answer in answers]

    return asyncio.run(run())


def certified(stage: Any, key: bytes) -> dict[str, Any]:
    (certificate,) = asked(stage, f"/contributors/{peer_id(key)}/certificate")
    assert isinstance(certificate, dict), certificate
    return certificate


def shown(certificate: dict[str, Any], **wanted: bytes) -> Any:
    return check(parse(json.dumps(certificate).encode()), **wanted)


def test_contributors_come_in_pages_in_the_order_of_their_keys(played: Any) -> None:
    keys = sorted(node.public_key.hex() for node in played.cast.nodes)
    whole, first = asked(played, "/contributors", "/contributors?limit=2")
    assert [one["key"] for one in whole["contributors"]] == keys
    assert whole["next"] is None
    assert [one["key"] for one in first["contributors"]] == keys[:2]
    rest, one, by_peer = asked(
        played,
        f"/contributors?limit=2&after={first['next']}",
        f"/contributors/{keys[0]}",
        f"/contributors/{peer_id(bytes.fromhex(keys[0]))}",
    )
    assert rest == {"contributors": whole["contributors"][2:], "next": None}
    assert one == by_peer == whole["contributors"][0]
    work = megaflops(played.cast.spec, played.cast.spec.standard_tokens)
    assert (one["settled"], one["pending"], one["forfeited"], one["standing"]) == (2 * work, 0, 0, "good")
    lost = whole["contributors"][2]
    assert (lost["settled"], lost["pending"], lost["forfeited"], lost["standing"]) == (0, 0, work, "ended")


def test_who_is_nobody_here_is_not_found_and_what_is_no_name_is_refused(played: Any) -> None:
    nobody = Identity.generate()
    assert asked(
        played,
        f"/contributors/{nobody.peer_id}",
        f"/contributors/{nobody.public_key.hex()}/entries",
        f"/contributors/{nobody.peer_id}/certificate",
        "/contributors/nobody",
        "/contributors/" + "z" * 64,
        "/contributors?limit=0",
        "/contributors?after=x",
    ) == [404, 404, 404, 422, 422, 422, 422]


def test_every_entry_of_the_ledger_names_its_contribution_and_the_record_that_it_follows_from(played: Any) -> None:
    log = played.log()
    key = played.cast.holder(played.plan, 0).public_key.hex()
    (answer,) = asked(played, f"/contributors/{key}/entries")
    entries = answer["entries"]
    moves = [(entry["round"], entry["debit"], entry["credit"]) for entry in entries]
    assert sorted(moves) == [
        (0, "pending", "settled"),
        (0, "run", "pending"),
        (1, "pending", "settled"),
        (1, "run", "pending"),
    ]
    statements = [one.open() for one in log if isinstance(one.open(), CreditStatement)]
    for entry in entries:
        cause = log[entry["leaf"]].open()
        assert cause.hash.hex() == entry["cause"]
        assert any(entry["commitment"] == one.open().hash.hex() for one in log)
        named = [move for move in statements[entry["statement"]].moves if move.cause == cause.hash]
        assert (entry["round"], entry["slot"], entry["megaflops"]) in {
            (one.round, one.slot, one.megaflops) for move in named for one in move.entries
        }
    first, rest = asked(
        played, f"/contributors/{key}/entries?limit=3", f"/contributors/{key}/entries?after={entries[2]['seq']}"
    )
    assert first == {"entries": entries[:3], "next": entries[2]["seq"]}
    assert rest == {"entries": entries[3:], "next": None}


def test_credit_counts_for_the_team_that_a_node_was_in_when_it_earned_it(make_stage: Callable[..., Any]) -> None:
    stage = make_stage(nodes=2, rounds=2, reductions=0.0)
    cast, (first, second) = stage.cast, stage.cast.nodes

    def join(node: Identity, team: str, sequence: int) -> None:
        stage.submit(cast.changed(node, cast.registration(node, sequence).open(), team=team))

    join(first, "red", 1)
    join(second, "red", 1)
    stage.play(0)
    join(second, "blue", 2)
    stage.play(1)
    (teams,) = asked(stage, "/teams")
    work = megaflops(cast.spec, cast.spec.standard_tokens)
    # Nobody has audited anything: the end settles nothing of who is in an open audit.
    assert [(team["team"], team["members"], team["contributions"], team["pending"]) for team in teams] == [
        ("blue", 1, 1, work),
        ("red", 2, 3, 3 * work),
    ]


def test_the_log_proves_what_is_in_it_and_what_it_extends(played: Any) -> None:
    log = Log(leaf_hash(envelope.encode()) for envelope in played.log())
    head, included, earlier, extends, *refused = asked(
        played,
        "/log/head",
        "/log/inclusion?leaf=3",
        "/log/inclusion?leaf=3&size=7",
        "/log/consistency?old=7",
        f"/log/inclusion?leaf={log.size}",
        f"/log/inclusion?leaf=3&size={log.size + 1}",
        "/log/inclusion?leaf=3&size=3",
        f"/log/consistency?old={log.size + 1}",
        "/log/consistency?old=5&size=4",
        "/log/inclusion",
    )
    assert refused == [404] * (len(refused) - 1) + [422]
    signed = Envelope.decode(bytes.fromhex(head["signed"]))
    owner = bytes.fromhex(played.cast.spec.coordinator)
    assert signed.open_as(LogHead, run=played.cast.run, round=0, key=owner).root == log.root()
    assert signed.open().sequence == head["size"] == log.size

    def proof(answer: Any) -> list[bytes]:
        return [bytes.fromhex(one) for one in answer["proof"]]

    verify_inclusion(log.leaf(3), 3, included["size"], proof(included), log.root())
    verify_inclusion(log.leaf(3), 3, 7, proof(earlier), log.root(7))
    verify_consistency(7, extends["size"], proof(extends), log.root(7), log.root())
    assert asked(played, "/log/head") == [head]  # signing it again gives the same bytes


def test_a_certificate_shows_what_somebody_earned_and_for_which_checkpoint(played: Any) -> None:
    holder = played.cast.holder(played.plan, 0)
    found = shown(certified(played, holder.public_key))
    work = megaflops(played.cast.spec, played.cast.spec.standard_tokens)
    assert found.balance == Balance(holder.public_key, pending=0, settled=ROUNDS * work, forfeited=0)
    assert (found.peer, found.run, found.rounds) == (holder.peer_id, played.cast.run, ROUNDS)
    end = next(one.open() for one in played_log(played) if isinstance(one.open(), RunEnd))
    assert found.checkpoint == end.root
    shown(certified(played, holder.public_key), run=played.cast.run, checkpoint=end.root)


def played_log(stage: Any) -> list[Envelope]:
    return list(stage.log())


def flip(text: str, at: int) -> str:
    return text[:at] + format(int(text[at], 16) ^ 1, "x") + text[at + 1 :]


def test_no_part_of_a_certificate_can_be_another(played: Any) -> None:
    good = certified(played, played.cast.holder(played.plan, 0).public_key)
    assert good["proof"]
    assert good["log"]["proof"]
    bad: list[dict[str, Any]] = []
    for name in ("spec", "statement"):
        bad += [{**good, name: flip(good[name], at)} for at in range(0, len(good[name]), 37)]
        bad.append({**good, name: good[name][:-2]})
        bad.append({**good, name: ""})
    for name in ("pending", "settled", "forfeited"):
        bad.append({**good, "balance": {**good["balance"], name: good["balance"][name] + 1}})
    bad.append({**good, "balance": {**good["balance"], "key": flip(good["balance"]["key"], 5)}})
    bad += [{**good, "index": index} for index in (good["index"] + 1, 1 << 40)]
    for place in range(len(good["proof"])):
        bad.append({**good, "proof": [flip(one, 7) if at == place else one for at, one in enumerate(good["proof"])]})
    bad += [{**good, "proof": good["proof"][1:]}, {**good, "proof": [*good["proof"], "00" * 32]}]
    log = good["log"]
    head = [{**log, "head": flip(log["head"], at)} for at in range(0, len(log["head"]), 11)]
    proofs = [
        {**log, "proof": [flip(one, 9) if at == place else one for at, one in enumerate(log["proof"])]}
        for place in range(len(log["proof"]))
    ]
    others = [{**log, "leaf": log["leaf"] + 1}, {**log, "proof": []}, {**log, "leaf": -1}, {**log, "more": 1}]
    bad += [{**good, "log": one} for one in (*head, *proofs, *others)]
    bad += [{**good, "format": "another"}, {**good, "more": 1}, {**good, "index": True}, {**good, "index": "0"}]
    bad += [{name: value for name, value in good.items() if name != missing} for missing in good]
    shown(good)
    for one in bad:
        with pytest.raises(InvalidDataError):
            shown(one)


def test_what_another_key_signed_certifies_nothing(played: Any) -> None:
    key = played.cast.holder(played.plan, 0).public_key
    good, forger = certified(played, key), Identity.generate()
    rich = Balance(key, settled=1 << 60)
    statement = Envelope.decode(bytes.fromhex(good["statement"])).open()
    forged = played.cast.changed(forger, statement, balances=tree([rich]).root(), accounts=1).encode()
    log = Log([leaf_hash(forged)])
    head = Envelope.sign(forger, LogHead(run=played.cast.run, round=0, sequence=1, root=log.root())).encode()
    certificate = {
        **good,
        "statement": forged.hex(),
        "balance": {"key": key.hex(), "pending": 0, "settled": 1 << 60, "forfeited": 0},
        "index": 0,
        "proof": [],
        "log": {"leaf": 0, "proof": [], "head": head.hex()},
    }
    with pytest.raises(InvalidDataError, match="signed by"):
        shown(certificate)


def test_a_certificate_is_for_one_run_and_one_checkpoint(played: Any) -> None:
    good = certified(played, played.cast.holder(played.plan, 0).public_key)
    with pytest.raises(InvalidDataError, match="the certificate is for checkpoint"):
        shown(good, checkpoint=b"x" * 32)
    with pytest.raises(InvalidDataError, match="the certificate is of run"):
        shown(good, run=b"x" * 32)


def test_before_the_first_statement_there_is_no_certificate(make_stage: Callable[..., Any]) -> None:
    stage = make_stage(nodes=3, rounds=2)
    stage.play(0)
    peer = stage.cast.nodes[0].peer_id
    certificate, one = asked(stage, f"/contributors/{peer}/certificate", f"/contributors/{peer}")
    assert certificate == 404
    assert one["pending"] > 0


def test_a_certificate_is_of_the_newest_statement_and_not_of_what_moved_since(make_stage: Callable[..., Any]) -> None:
    stage = make_stage(nodes=3, rounds=3, reductions=0.0)
    stage.play(0)
    stage.judge(0, A, A)
    stage.play(1)
    key = stage.plan.roster[0].peer
    found = shown(certified(stage, key))
    (now,) = asked(stage, f"/contributors/{key.hex()}")
    assert now["pending"] == 2 * found.balance.pending > 0
    assert found.rounds == 1


def test_the_command_prints_what_a_certificate_shows_or_says_what_is_wrong(played: Any, tmp_path: Path) -> None:
    holder = played.cast.holder(played.plan, 0)
    good = certified(played, holder.public_key)
    file = tmp_path / "certificate.json"
    file.write_text(json.dumps(good))
    root = shown(good).checkpoint.hex()
    answer = CliRunner().invoke(app, ["verify", "certificate", str(file), "--checkpoint", root])
    assert answer.exit_code == 0, answer.output
    assert holder.peer_id in answer.output
    assert f"{good['balance']['settled']:,} megaflops" in answer.output
    for arguments, error in (
        (["--checkpoint", "00" * 32], "the certificate is for checkpoint"),
        (["--run", "00" * 32], "the certificate is of run"),
        (["--run", "zz"], "--run takes 32 bytes in hex"),
    ):
        answer = CliRunner().invoke(app, ["verify", "certificate", str(file), *arguments])
        assert isinstance(answer.exception, SwarmError)
        assert error in str(answer.exception)
    file.write_text("no JSON")
    answer = CliRunner().invoke(app, ["verify", "certificate", str(file)])
    assert "this is no certificate" in str(answer.exception)
