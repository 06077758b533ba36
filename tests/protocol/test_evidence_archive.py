"""Evidence at the coordinator: who may hand it in, how much of it, and that anybody can have what a rejection rests on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from swarm_coordinator import kept_evidence
from swarm_protocol.chunks import content_hash
from swarm_protocol.evidence import max_bytes
from swarm_protocol.records import Envelope, Evidence, EvidenceItem, Outcome, Verdict

Api = Any
MakeCast = Callable[..., Any]
Play = Callable[..., None]

PIECES = (b"the state roots", b"a state at the end of a segment")


async def put(api: Api, piece: bytes | AsyncIterator[bytes], name: bytes | None = None) -> httpx.Response:
    digest = content_hash(piece) if isinstance(piece, bytes) and name is None else name
    assert digest is not None
    return await api.http.put(f"/v1/runs/{api.cast.run.hex()}/evidence/{digest.hex()}", content=piece)


async def said(api: Api, piece: bytes | AsyncIterator[bytes], name: bytes | None = None) -> tuple[int, str]:
    """How a piece is refused."""
    answer = await put(api, piece, name)
    return answer.status_code, answer.json()["code"]


def naming(api: Api, auditor: Any, verdict: Envelope, evidence: Envelope, **changes: object) -> Envelope:
    return api.cast.changed(auditor, verdict.open(), evidence=evidence.open().hash, **changes)


def test_what_a_rejection_rests_on_is_archived_before_it_and_served_to_anybody(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        _, commitments = await api.to_audits()
        first, second = cast.auditors
        assert (await api.get("/audits/0/0/evidence")).json() == {"round": 0, "slot": 0, "evidence": [], "without": []}
        evidence = cast.evidence(first, commitments[0], *PIECES)
        verdict = naming(api, first, cast.verdict(first, commitments[0], Outcome.REJECTED), evidence)
        await api.refuse(verdict, 422, "unknown-evidence")
        await api.accept(evidence)
        assert (await put(api, PIECES[0])).status_code == 201
        assert "1 pieces" in await api.refuse(verdict, 409, "evidence-missing")
        assert [(await put(api, piece)).status_code for piece in PIECES] == [200, 201]
        await api.accept(verdict, cast.verdict(second, commitments[0], Outcome.REJECTED))

        found = (await api.get("/audits/0/0/evidence")).json()
        (kept,), (without,) = found["evidence"], found["without"]
        assert (kept["auditor"], kept["segment"], kept["part"]) == (first.peer_id, 1, None)
        assert (without["auditor"], without["evidence"]) == (second.peer_id, None)
        for item, piece in zip(kept["items"], PIECES, strict=True):
            (named,) = item["pieces"]
            assert (item["size_bytes"], named["size_bytes"]) == (len(piece), len(piece))
            assert (await api.http.get(named["href"])).content == piece
        shown = (await api.get("/verdicts")).json()["verdicts"] + (await api.get("/rounds/0")).json()["verdicts"]
        assert {one["evidence"] for one in shown if one["auditor"] == first.peer_id} == {kept["hash"]}
        signed = Envelope.decode((await api.get(f"/records/{kept['hash']}")).content)
        assert signed.open_as(Evidence, run=cast.run, key=first.public_key).items[1].chunks == (
            content_hash(PIECES[1]),
        )
        assert "evidence" not in {entry.open().kind for entry in await api.several("/log/entries")}
        assert (await api.get("/audits/1/0/evidence")).status_code == 404

    play(cast, script)


def test_evidence_is_pinned_with_the_checkpoint_that_a_replay_begins_from(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast(reductions=1.0)

    async def script(api: Api) -> None:
        plan, commitments = await api.to_audits()
        averages = await api.several("/rounds/0/part-records")
        await api.accept(cast.evidence(cast.auditors[0], averages[1], PIECES[0], slot=1))
        pinned = await api.service.read(lambda archive: kept_evidence.checkpoints(archive.session, archive.run))
        assert pinned == set(), "an average is made again without it"
        await api.accept(cast.evidence(cast.auditors[0], commitments[0], *PIECES))
        pinned = await api.service.read(lambda archive: kept_evidence.checkpoints(archive.session, archive.run))
        assert pinned == {plan.base}
        objects = await api.service.read(lambda archive: kept_evidence.objects(archive.session, archive.run))
        assert objects == set(map(content_hash, PIECES))

    play(cast, script)


def test_only_an_auditor_whose_verdict_is_wanted_hands_in_a_list_and_no_longer_one_than_the_spec_allows(
    make_cast: MakeCast, play: Play
) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        plan, commitments = await api.to_opening()
        first, second = cast.auditors
        evidence = cast.evidence(first, commitments[0], *PIECES)
        await api.refuse(evidence, 422, "no-audit")
        await api.accept(*(cast.opening(plan, slot) for slot in range(2)))
        await api.refuse(cast.evidence(cast.worker, commitments[0], *PIECES), 403, "not-appointed")
        await api.refuse(cast.changed(first, evidence.open(), audited=bytes(32)), 422, "wrong-record")
        await api.refuse(cast.changed(first, evidence.open(), part=0), 422, "no-audit")
        most = max_bytes(cast.spec, 2, None)
        name = [content_hash(bytes([number])) for number in range(-(-(most + 1) // (1 << 20)))]
        large = EvidenceItem(name="state-1", size_bytes=most + 1, chunks=tuple(name))
        await api.refuse(cast.changed(first, evidence.open(), items=(large,)), 422, "too-much")
        crooked = EvidenceItem(name="state-1", size_bytes=5, chunks=tuple(name[:1] * 2))
        await api.refuse(cast.changed(first, evidence.open(), items=(crooked,)), 422, "bad-evidence")
        await api.accept(evidence)
        await api.refuse(cast.evidence(first, commitments[0], b"other"), 409, "equivocation")
        await api.accept(cast.verdict(second, commitments[0], Outcome.REJECTED))
        await api.refuse(cast.evidence(second, commitments[0], *PIECES), 409, "closed")

    play(cast, script)


def test_a_verdict_names_evidence_only_if_it_rejects_and_only_its_own(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast(reductions=1.0)

    async def script(api: Api) -> None:
        _, commitments = await api.to_audits()
        average = (await api.several("/rounds/0/part-records"))[0]
        first, second = cast.auditors
        evidence, of_average = (
            cast.evidence(first, commitments[0], *PIECES),
            cast.evidence(first, average, *PIECES, slot=0),
        )
        await api.accept(evidence, of_average)
        for piece in PIECES:
            await put(api, piece)
        rejecting = [cast.verdict(auditor, commitments[0], Outcome.REJECTED) for auditor in cast.auditors]
        accepting = naming(api, first, cast.verdict(first, commitments[0]), evidence)
        await api.refuse(accepting, 422, "unknown-evidence")
        await api.refuse(naming(api, second, rejecting[1], evidence), 422, "unknown-evidence")
        await api.refuse(naming(api, first, rejecting[0], of_average), 422, "unknown-evidence")
        await api.accept(naming(api, first, rejecting[0], evidence))
        verdict = cast.part_verdict(first, average, 0, Outcome.REJECTED)
        await api.accept(naming(api, first, verdict, of_average))
        kept = (await api.get("/audits/0/0/evidence")).json()["evidence"]
        assert [one["part"] for one in kept] == [None, 0]

    play(cast, script)


def test_bytes_that_no_list_names_are_not_read(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        _, commitments = await api.to_audits()
        await api.accept(cast.evidence(cast.auditors[0], commitments[0], *PIECES))
        named = content_hash(PIECES[0])

        async def undeclared() -> AsyncIterator[bytes]:
            yield PIECES[0]

        assert await said(api, b"something else") == (404, "not-found")
        assert await said(api, PIECES[0] + b"!", named) == (422, "wrong-size")
        assert await said(api, PIECES[0].upper(), named) == (422, "wrong-hash")
        assert await said(api, undeclared(), named) == (411, "length-required")
        assert not api.service.store.exists(named)
        assert (await put(api, PIECES[0])).status_code == 201

    play(cast, script)


def test_a_verdict_without_evidence_says_so(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        _, commitments = await api.to_audits()
        await api.accept(cast.verdict(cast.auditors[0], commitments[1], Outcome.UNAVAILABLE))
        await api.accept(cast.verdict(cast.auditors[0], commitments[0], Outcome.ACCEPTED))
        found = (await api.get("/audits/0/1/evidence")).json()
        assert (found["evidence"], [one["outcome"] for one in found["without"]]) == ([], ["unavailable"])
        assert (await api.get("/audits/0/0/evidence")).json()["without"] == []
        signed = [entry.open() for entry in await api.several("/log/entries")]
        assert [record.evidence for record in signed if isinstance(record, Verdict)] == [None, None]

    play(cast, script)
