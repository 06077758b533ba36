"""The HTTP API, in process: a whole round by hand-made records, and every way in which a record is refused."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from swarm_protocol import draw, encoding
from swarm_protocol.chunks import StateManifest
from swarm_protocol.identity import Identity
from swarm_protocol.layout import checkpoint_manifest
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.records import (
    Addresses,
    BeaconReveal,
    Envelope,
    Equivocation,
    LogHead,
    Outcome,
    PartRecord,
    RoundManifest,
    record_hash,
)
from swarm_protocol.spec import RunSpec

MakeCast = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("database_url")


Play = Callable[..., None]
Api = Any


def test_a_round_goes_through_from_registration_to_verdicts(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        plan, closing, commitments = await api.to_exchanging()
        assert [seat.peer for seat in plan.roster] == sorted(node.public_key for node in cast.nodes)
        assert [entry.hash for entry in closing.commitments] == [entry.open().hash for entry in commitments]
        assert (await api.several("/rounds/0/commitments"))[1:] == commitments

        assert (await api.get("/rounds/0/part-records")).status_code == 204
        records = [cast.part_record(plan, closing, part, slot=part) for part in range(2)]
        await api.accept(*records)
        assert await api.several("/rounds/0/part-records?after=1&wait_s=1") == records[1:]
        assert (await api.get("/rounds/0/sealing")).status_code == 204
        await api.accept(*(cast.part_held(record) for record in records))
        chosen = encoding.decode((await api.get("/rounds/0/sealing")).content)
        assert chosen == [record.open().hash for record in records]
        assert (await api.get("/rounds/0/part-records?after=2&wait_s=30")).status_code == 204

        await api.accept(cast.report(plan, tuple(chosen), b"r" * 32))
        signed, following, *named = await api.several("/rounds/0/manifest")
        manifest = signed.open_as(RoundManifest, run=cast.run, key=bytes.fromhex(cast.spec.coordinator))
        assert (manifest.root, manifest.commitment_set) == (b"r" * 32, closing.hash)
        assert named == records
        parent = bytes.fromhex(cast.spec.checkpoint)
        assert following.open() == checkpoint_manifest(cast.spec, 1, b"r" * 32, parent)
        assert (await api.get("/checkpoints/latest")).json() == {"round": 1, "root": (b"r" * 32).hex()}

        await api.accept(*(cast.opening(plan, slot) for slot in range(2)))
        reveal = Envelope.decode((await api.get("/rounds/0/beacon")).content).open_as(BeaconReveal, run=cast.run)
        draw.verify_value(reveal.value, bytes.fromhex(cast.spec.beacon))
        assert reveal.manifest == manifest.hash

        auditor = cast.auditors[0].public_key.hex()
        drawn = (await api.get(f"/audits?auditor={auditor}")).json()
        assert [(audit["slot"], audit["verdicts"]) for audit in drawn] == [(0, 0), (1, 0)]
        await api.accept(*(cast.verdict(cast.auditors[0], commitment) for commitment in commitments))
        assert (await api.get(f"/audits?auditor={auditor}")).json() == []
        await api.accept(*(cast.verdict(cast.auditors[1], commitment) for commitment in commitments))  # a cross-check
        await api.accept(cast.evaluation(0, plan.base, sample="gold ‖ en"), cast.evaluation(1, b"r" * 32))

        status = (await api.get("")).json()
        assert (status["round"], status["phase"]) == (1, "assembling")
        assert status["audits"] == {
            "drawn": 2, "pending": 0, "accepted": 2, "rejected": 0, "inconclusive": 0, "unavailable": 0, "moot": 0,
            "comparisons": {"equal": 4, "different": 0, "within": 0, "outside": 0},
        }  # fmt: skip
        assert [node["contributions"] for node in status["nodes"]] == [1, 1]
        assert [(entry["round"], entry["sample"]) for entry in status["evaluations"]] == [(0, "gold ‖ en"), (1, None)]
        assert status["history"] == [
            {"round": 0, "slots": 2, "committed": 2, "parts": 2, "missing_parts": 0, "root": (b"r" * 32).hex()}
        ]
        detail = (await api.get("/rounds/0")).json()
        assert detail["evaluation"] == status["evaluations"][0]
        assert [slot["audit"] for slot in detail["roster"]] == ["accepted", "accepted"]
        assert all(record["counted"] for record in detail["part_records"])

    play(cast, script)


def test_the_run_ends_after_its_last_round_and_says_so(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast(rounds=1)

    async def script(api: Api) -> None:
        waiting = asyncio.create_task(api.get("/rounds/1/plan?wait_s=20"))
        await api.to_audits()
        response = await waiting
        assert (response.status_code, response.json()["code"]) == (410, "run-finished")
        assert (await api.get("")).json()["phase"] == "finished"
        await api.refuse(cast.ready(cast.nodes[0], 1, b"r" * 32), 410, "run-finished")

    play(cast, script)


def test_a_long_poll_wakes_when_the_plan_is_published(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        waiting = asyncio.create_task(api.get("/rounds/0/plan?wait_s=20"))
        plan = await api.to_training()
        assert Envelope.decode((await waiting).content).open().hash == plan.hash

    play(cast, script)


def test_a_long_poll_ends_empty_when_nothing_comes_or_the_coordinator_stops(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        assert (await api.get("/rounds/0/plan?wait_s=0.05")).status_code == 204
        waiting = asyncio.create_task(api.get("/rounds/0/plan?wait_s=20"))
        await asyncio.sleep(0)
        api.service.stop_waiting()
        assert (await waiting).status_code == 204

    play(cast, script)


def test_the_same_record_again_gets_the_same_receipt(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        envelope = cast.registration(cast.nodes[0])
        first, again = await api.offer(envelope), await api.offer(envelope)
        assert (first.status_code, again.status_code) == (201, 200)
        assert first.json() == again.json()
        assert first.json()["leaf"] == 4  # after the first checkpoint and three appointments

    play(cast, script)


def test_another_record_under_the_same_name_is_an_equivocation(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        plan = await api.to_training()
        await api.accept(cast.commitment(plan, 0))
        await api.refuse(cast.commitment(plan, 0, sequence=1), 409, "already-committed")
        await api.refuse(cast.commitment(plan, 0, trace_root=b"x" * 32), 409, "equivocation")
        status = (await api.get("")).json()
        (proved,) = status["equivocations"]
        assert (proved["peer"], proved["kind"], proved["round"]) == (cast.holder(plan, 0).peer_id, "commitment", 0)
        assert [node["standing"] for node in status["nodes"]].count("ended") == 1
        await api.refuse(cast.ready(cast.holder(plan, 0), 0, plan.base), 403, "standing-ended")

    play(cast, script)


def test_whoever_holds_two_records_under_one_name_can_report_them_once(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    def report(first: Envelope, second: Envelope, sequence: int) -> Envelope:
        record = Equivocation(run=cast.run, round=0, sequence=sequence, first=first.encode(), second=second.encode())
        return Envelope.sign(cast.nodes[1], record)

    async def script(api: Api) -> None:
        plan = await api.to_training()
        slot = plan.slot_of(cast.nodes[0].public_key)
        first, second = cast.commitment(plan, slot), cast.commitment(plan, slot, trace_root=b"x" * 32)
        await api.refuse(report(first, first, 0), 422, "no-proof")
        await api.accept(report(first, second, 1))
        (proved,) = (await api.get("")).json()["equivocations"]
        assert (proved["peer"], proved["reporter"]) == (cast.nodes[0].peer_id, cast.nodes[1].peer_id)
        await api.refuse(first, 403, "standing-ended")
        await api.refuse(report(second, first, 2), 409, "closed")

    play(cast, script)


def test_what_is_not_a_signed_record_is_refused(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        envelope = cast.registration(cast.nodes[0])
        await api.refuse(b"nonsense", 400, "bad-record")
        await api.refuse(Envelope(envelope.body, envelope.key, bytes(64)), 403, "bad-signature")
        await api.refuse(Envelope(envelope.body, cast.nodes[1].public_key, envelope.signature), 403, "bad-signature")
        await api.refuse(bytes((1 << 20) + 1), 413, "too-long")

    play(cast, script)


def test_a_text_that_a_database_may_not_hold_is_no_record(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    def rewritten(signer: Identity, envelope: Envelope, name: str) -> Envelope:
        fields: Any = encoding.decode(envelope.body)
        body = encoding.encode(fields | {name: fields[name] + "\0"})
        return Envelope(body, signer.public_key, signer.sign(record_hash(fields["kind"], body)))

    async def script(api: Api) -> None:
        _, commitments = await api.to_audits()
        node, auditor = cast.nodes[0], cast.auditors[0]
        registration, verdict = cast.registration(node, sequence=1), cast.verdict(auditor, commitments[0])
        for name in ("name", "team", "agent", "device"):
            assert name in await api.refuse(rewritten(node, registration, name), 400, "bad-record")
        assert "reason" in await api.refuse(rewritten(auditor, verdict, "reason"), 400, "bad-record")
        await api.accept(registration, verdict)

    play(cast, script)


def test_a_body_without_a_length_is_read_no_further_than_a_record_is_long(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1 << 16)

    async def script(api: Api) -> None:
        response = await api.http.post(f"/v1/runs/{cast.run.hex()}/records", content=endless())
        assert response.status_code == 413

    play(cast, script)


def test_a_registration_needs_the_protocol_version_and_the_token(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast(token="sesame")

    async def script(api: Api) -> None:
        node = cast.nodes[0]
        detail = await api.refuse(cast.registration(node, protocol=99), 426, "upgrade")
        assert "pip install --upgrade swarm-node" in detail
        await api.refuse(cast.registration(node), 401, "token")
        await api.refuse(cast.registration(node), 401, "token", authorization="Bearer open")
        response = await api.offer(cast.registration(node), authorization="Bearer sesame")
        assert response.status_code == 201

    play(cast, script)


def test_only_registered_nodes_and_appointed_offices_are_heard(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()
    stranger = Identity.from_seed(b"s" * 32)

    async def script(api: Api) -> None:
        await api.refuse(cast.ready(stranger, 0, await api.base()), 403, "not-registered")
        addresses = Addresses(run=cast.run, round=0, multiaddrs=("/ip4/192.0.2.1/tcp/1",))
        await api.refuse(Envelope.sign(stranger, addresses), 403, "not-appointed")
        await api.accept(Envelope.sign(cast.worker, addresses))
        assert (await api.get("")).json()["peers"] == ["/ip4/192.0.2.1/tcp/1"]
        plan = await api.to_training()
        await api.refuse(Envelope.sign(stranger, plan), 403, "not-yours")
        await api.refuse(cast.evaluation(1, plan.base), 422, "unknown-checkpoint")

    play(cast, script)


def test_readiness_is_for_the_current_round_from_its_checkpoint(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        node, base = cast.nodes[0], await api.base()
        await api.accept(cast.registration(node))
        assert base.hex() in await api.refuse(cast.ready(node, 0, b"x" * 32), 409, "wrong-base")
        await api.refuse(cast.ready(node, 1, base), 409, "early")
        await api.refuse(cast.ready(node, 99, base), 422, "no-such-round")
        heartbeat = cast.ready(node, 0, base)
        assert (await api.offer(heartbeat)).status_code == 201
        cast.now_ms += 5000
        again = await api.offer(heartbeat)
        assert (again.status_code, again.json()["leaf"], again.json()["receipt"]) == (201, None, None)
        await api.service.mark_alive()
        assert (await api.get("")).json()["nodes"][0]["last_seen_ms"] == cast.now_ms

    play(cast, script)


def test_a_commitment_has_to_fit_the_plan(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        plan = await api.to_training()
        other = Envelope.sign(cast.holder(plan, 1), cast.commitment(plan, 0).open())
        await api.refuse(other, 403, "not-your-slot")
        await api.refuse(cast.commitment(plan, 0, tokens=1), 422, "wrong-tokens")
        another = cast.changed(cast.holder(plan, 0), cast.commitment(plan, 0).open(), plan=b"x" * 32)
        await api.refuse(another, 422, "wrong-plan")
        await api.refuse(cast.opening(plan, 0), 409, "early")
        await api.accept(cast.commitment(plan, 0), cast.commitment(plan, 1))
        await api.refuse(cast.commitment(plan, 0, sequence=1), 409, "closed")

    play(cast, script)


def test_a_part_record_has_to_fit_the_commitments(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        plan, closing, _ = await api.to_exchanging()
        signer = cast.holder(plan, 0)
        good = cast.part_record(plan, closing, 0).open_as(PartRecord, run=cast.run)
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"part": 2, "sequence": 2}, "wrong-part"),
            ({"sequence": 1}, "wrong-part"),
            ({"commitment_set": b"x" * 32}, "wrong-commitment-set"),
            ({"slots": (0, 5)}, "wrong-slots"),
            ({"slots": (1, 0)}, "wrong-slots"),
            ({"size_bytes": 1}, "wrong-size"),
        ]
        for changes, code in wrong:
            await api.refuse(cast.changed(signer, good, **changes), 422, code)
        await api.refuse(cast.part_held(Envelope.sign(signer, good)), 422, "unknown-record")
        await api.accept(Envelope.sign(signer, good))

    play(cast, script)


def test_two_reducers_may_say_the_same(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        plan, closing, _ = await api.to_exchanging()
        await api.accept(cast.part_record(plan, closing, 0, slot=0), cast.part_record(plan, closing, 0, slot=1))
        assert len(await api.several("/rounds/0/part-records")) == 2

    play(cast, script)


def test_a_nonce_has_to_be_the_one_that_was_committed_to(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        plan, _ = await api.to_opening()
        await api.refuse(cast.opening(plan, 0, nonce=b"x" * 32), 422, "wrong-nonce")
        await api.accept(cast.opening(plan, 0))

    play(cast, script)


def test_a_verdict_is_an_appointed_auditors_on_a_contribution_that_was_drawn(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        plan, commitments = await api.to_opening()
        await api.refuse(cast.verdict(cast.auditors[0], commitments[0]), 422, "no-audit")
        await api.accept(*(cast.opening(plan, slot) for slot in range(2)))
        await api.refuse(cast.verdict(cast.nodes[0], commitments[0]), 403, "not-appointed")
        other = cast.commitment(plan, 0, trace_root=b"x" * 32)
        await api.refuse(cast.verdict(cast.auditors[0], other), 422, "wrong-commitment")

    play(cast, script)


def test_a_rejection_takes_two_auditors_and_is_shown_with_its_reason(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        plan, commitments = await api.to_audits()
        first, second = cast.auditors
        await api.accept(cast.verdict(first, commitments[0], Outcome.REJECTED))
        pending = (await api.get(f"/audits?auditor={second.public_key.hex()}")).json()
        assert [(audit["slot"], audit["verdicts"]) for audit in pending] == [(0, 1), (1, 0)]
        await api.accept(cast.verdict(second, commitments[0], Outcome.REJECTED))
        status = (await api.get("")).json()
        assert [(entry["round"], entry["slot"], entry["reason"]) for entry in status["rejected"]] == [
            (0, 0, "the replay says so")
        ]
        ended = [node for node in status["nodes"] if node["standing"] == "ended"]
        assert [node["peer"] for node in ended] == [cast.holder(plan, 0).peer_id]
        await api.refuse(cast.ready(cast.holder(plan, 0), 1, b"r" * 32), 403, "standing-ended")

    play(cast, script)


def test_what_else_was_drawn_from_a_rejected_node_is_moot(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        first, commitments = await api.to_audits()
        await api.accept(*(cast.ready(node, 1, b"r" * 32) for node in cast.nodes))
        plan = await api.plan(1)
        await api.accept(*(cast.commitment(plan, slot) for slot in range(2)))
        cast.now_ms += 60_000
        await api.service.tick()
        await api.accept(cast.report(plan, (None, None), b"s" * 32))
        await api.accept(cast.opening(plan, 0), cast.opening(plan, 1))
        await api.accept(*(cast.verdict(auditor, commitments[0], Outcome.REJECTED) for auditor in cast.auditors))
        cheater = cast.holder(first, 0).public_key.hex()
        wanted = (await api.get(f"/audits?auditor={cast.auditors[0].public_key.hex()}")).json()
        assert [audit["round"] for audit in wanted] == [0, 1]
        assert all(audit["peer"] != cheater for audit in wanted)
        assert [slot["audit"] for slot in (await api.get("/rounds/1")).json()["roster"]] == ["moot", "pending"]
        assert (await api.get("")).json()["audits"]["moot"] == 1

    play(cast, script)


def test_the_log_is_served_with_the_head_that_its_entries_have(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        await api.to_audits()
        head = (await api.get("/log/head")).json()
        entries = await api.several("/log/entries?count=4") + await api.several("/log/entries?start=4")
        log = Log(leaf_hash(entry.encode()) for entry in entries)
        assert (head["size"], head["root"]) == (log.size, log.root().hex())
        signed = Envelope.decode(bytes.fromhex(head["signed"])).open_as(LogHead, run=cast.run)
        assert (signed.sequence, signed.root) == (log.size, log.root())
        assert "ready" not in {entry.open().kind for entry in entries}
        record = entries[-1].open()
        assert Envelope.decode((await api.get(f"/records/{record.hash.hex()}")).content) == entries[-1]

    play(cast, script)


def test_the_spec_and_the_checkpoint_are_those_of_the_run(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        (run,) = (await api.http.get("/v1/runs")).json()
        assert RunSpec.decode((await api.get("/spec")).content).run_id.hex() == run["run_id"]
        root = await api.base()
        raw = (await api.get(f"/checkpoints/{root.hex()}")).content
        manifest = StateManifest.decode(raw, max_size_bytes=8 * cast.spec.model.num_parameters)
        assert manifest.root == root
        manifest.verify_chunk(0, (await api.get(f"/chunks/{manifest.hashes[0].hex()}")).content)

    play(cast, script)


def test_the_api_loads_neither_torch_nor_hivemind() -> None:
    code = "import sys, swarm_coordinator.server; sys.exit(bool({'torch', 'hivemind'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
