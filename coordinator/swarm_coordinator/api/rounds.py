"""Routes about rounds and audits: what nodes, the checkpoint worker and auditors follow. Most of them wait."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from swarm_coordinator.admission import finished
from swarm_coordinator.api.access import (
    CBOR,
    IfNoneMatch,
    RoundNumber,
    TheRun,
    Wait,
    binary,
    check_round,
    missing,
    polled,
    polled_once,
)
from swarm_coordinator.api.models import OpenAudit, RoundDetail
from swarm_coordinator.api.problems import documented
from swarm_coordinator.api.status import open_audit, round_detail
from swarm_coordinator.db.archive import Archive, opened
from swarm_coordinator.rounds import Phase
from swarm_protocol import encoding
from swarm_protocol.errors import RefusedError
from swarm_protocol.records import (
    Appointment,
    BeaconReveal,
    CommitmentSet,
    Envelope,
    PartRecord,
    Role,
    Sketches,
    SketchObjection,
    SketchSet,
    encode_list,
)

router = APIRouter(prefix="/v1/runs/{run_id}")


@router.get(
    "/rounds/{number}/plan",
    tags=["rounds"],
    summary="A round's plan",
    description="Waits until it is published. 410 with the code `run-finished` for the round after the last one.",
    response_class=Response,
    responses=binary(CBOR, "the encoded Envelope of a RoundPlan", 410, may_be_empty=True, unchanging=True),
)
async def plan(run: TheRun, number: RoundNumber, wait_s: Wait, if_none_match: IfNoneMatch = None) -> Response:
    if number != run.spec.rounds.count:
        check_round(run.spec, number)

    def query(archive: Archive) -> bytes | None:
        if number >= run.state.round and run.state.phase is Phase.FINISHED:
            raise RefusedError(finished(run.state), status=410, code="run-finished")
        row = archive.round(number)
        return None if row is None else _envelope(archive, row.plan)

    return await polled_once(run, f"plan:{number}", query, wait_s, if_none_match)


@router.get(
    "/rounds/{number}/commitments",
    tags=["rounds"],
    summary="The contributions that count in a round",
    description="Waits until they are closed. The first is the CommitmentSet, then come the Commitments in slot order.",
    response_class=Response,
    responses=binary(CBOR, "a list of encoded Envelopes", may_be_empty=True, unchanging=True),
)
async def commitments(run: TheRun, number: RoundNumber, wait_s: Wait, if_none_match: IfNoneMatch = None) -> Response:
    check_round(run.spec, number)

    def query(archive: Archive) -> bytes | None:
        row = archive.round(number)
        if row is None or row.commitment_set is None:
            return None
        closing = archive.stored(CommitmentSet, row.commitment_set)
        return _list(archive, [row.commitment_set, *(entry.hash for entry in closing.commitments)])

    return await polled_once(run, f"commitments:{number}", query, wait_s, if_none_match)


@router.get(
    "/rounds/{number}/part-records",
    tags=["rounds"],
    summary="The averages that reducers have published in a round",
    description="As they came in, without the first `after`. Waits until there is one, or the exchange is closed; 204 if "
    "there is none.",
    response_class=Response,
    responses=binary(CBOR, "a list of encoded Envelopes", may_be_empty=True),
)
async def part_records(
    run: TheRun, number: RoundNumber, wait_s: Wait, after: Annotated[int, Query(ge=0)] = 0
) -> Response:
    check_round(run.spec, number)

    def query(archive: Archive) -> list[Envelope] | None:
        rows = archive.of_round(PartRecord.kind, number)
        if len(rows) > after:
            return [Envelope.decode(row.envelope) for row in rows[after:]]
        row = archive.round(number)
        return [] if row is not None and row.parts is not None else None

    found = await run.poll(f"part-records:{number}", query, wait_s)
    return Response(encode_list(found), media_type=CBOR) if found else Response(status_code=204)


@router.get(
    "/rounds/{number}/sketches",
    tags=["rounds"],
    summary="The sketches that senders have signed in a round, and objections to them",
    description="Sketches and SketchObjections as they came in, without the first `after`. Waits until there is one; 204 if "
    "there is none. The sketches themselves are chunks, by the hash in `blob`.",
    response_class=Response,
    responses=binary(CBOR, "a list of encoded Envelopes", may_be_empty=True),
)
async def sketches(run: TheRun, number: RoundNumber, wait_s: Wait, after: Annotated[int, Query(ge=0)] = 0) -> Response:
    check_round(run.spec, number)

    def query(archive: Archive) -> list[Envelope] | None:
        rows = archive.of_round((Sketches.kind, SketchObjection.kind), number)[after:]
        return [Envelope.decode(row.envelope) for row in rows] or None

    found = await run.poll(f"sketches:{number}", query, wait_s)
    return Response(encode_list(found), media_type=CBOR) if found else Response(status_code=204)


@router.get(
    "/rounds/{number}/sketch-set",
    tags=["rounds"],
    summary="Which sketches count in a round, and which slots they select",
    description="Waits until the checkpoint worker has closed them. The first is its Appointment, the second the SketchSet, "
    "then come the Sketches that count, in slot order.",
    response_class=Response,
    responses=binary(CBOR, "a list of encoded Envelopes", may_be_empty=True),
)
async def sketch_set(run: TheRun, number: RoundNumber, wait_s: Wait) -> Response:
    check_round(run.spec, number)

    def query(archive: Archive) -> bytes | None:
        rows = archive.of_round(SketchSet.kind, number)
        if not rows:
            return None
        closing = opened(rows[0])
        assert isinstance(closing, SketchSet)
        appointed = _appointment(archive, rows[0].signer)
        return _list(archive, [appointed, rows[0].hash, *(entry.hash for entry in closing.counted)])

    return await polled(run, f"sketch-set:{number}", query, wait_s)


@router.get(
    "/rounds/{number}/sealing",
    tags=["rounds"],
    summary="What a round will be sealed with",
    description="Waits until the exchange is closed. Per part the hash of a PartRecord, or null: missing. The checkpoint "
    "worker applies these and reports the root.",
    response_class=Response,
    responses=binary(CBOR, "a list of hashes or nulls", may_be_empty=True),
)
async def sealing(run: TheRun, number: RoundNumber, wait_s: Wait) -> Response:
    check_round(run.spec, number)

    def query(archive: Archive) -> bytes | None:
        row = archive.round(number)
        return None if row is None else row.parts

    return await polled(run, f"sealing:{number}", query, wait_s)


@router.get(
    "/rounds/{number}/manifest",
    tags=["rounds"],
    summary="A round's manifest",
    description="Waits until the round is sealed. The first is the RoundManifest, the second the CheckpointManifest of what "
    "the next round starts from, then come the PartRecords that it names, each once, in part order.",
    response_class=Response,
    responses=binary(CBOR, "a list of encoded Envelopes", may_be_empty=True, unchanging=True),
)
async def manifest(run: TheRun, number: RoundNumber, wait_s: Wait, if_none_match: IfNoneMatch = None) -> Response:
    check_round(run.spec, number)

    def query(archive: Archive) -> bytes | None:
        row = archive.round(number)
        if row is None or row.manifest is None or row.parts is None:
            return None
        parts = encoding.decode(row.parts, max_bytes=len(row.parts))
        assert isinstance(parts, list)
        following = archive.checkpoint(number + 1)
        assert following is not None
        named = dict.fromkeys(name for name in parts if isinstance(name, bytes))
        return _list(archive, [row.manifest, following.hash, *named])

    return await polled_once(run, f"manifest:{number}", query, wait_s, if_none_match)


@router.get(
    "/rounds/{number}/beacon",
    tags=["rounds"],
    summary="A round's beacon value",
    description="Waits until it is revealed. With it anybody repeats the audit draw.",
    response_class=Response,
    responses=binary(CBOR, "the encoded Envelope of a BeaconReveal", may_be_empty=True, unchanging=True),
)
async def beacon(run: TheRun, number: RoundNumber, wait_s: Wait, if_none_match: IfNoneMatch = None) -> Response:
    check_round(run.spec, number)

    def query(archive: Archive) -> bytes | None:
        rows = archive.of_round(BeaconReveal.kind, number)
        return rows[0].envelope if rows else None

    return await polled_once(run, f"beacon:{number}", query, wait_s, if_none_match)


@router.get(
    "/rounds/{number}",
    tags=["rounds"],
    summary="A round, for people",
    responses=documented(404, 422),
)
async def detail(run: TheRun, number: RoundNumber) -> RoundDetail:
    found = await run.read(lambda archive: round_detail(archive, number))
    if found is None:
        raise missing(f"plan of round {number}")
    return found


@router.get(
    "/audits",
    tags=["audits"],
    summary="Audits that want this auditor's verdict",
    description="Those of contributions and of averages without an outcome that this auditor has not voted on, oldest first. "
    "Waits while there are none.",
    responses=documented(404, 422),
)
async def audits(
    run: TheRun,
    auditor: Annotated[str, Query(pattern=r"^[0-9a-f]{64}$", description="the auditor's key, in hex")],
    wait_s: Wait,
) -> list[OpenAudit]:
    def query(archive: Archive) -> list[OpenAudit] | None:
        auditors = archive.offices(Role.AUDITOR)
        wanted = archive.open_audits(bytes.fromhex(auditor)) if bytes.fromhex(auditor) in auditors else []
        return [open_audit(row, auditors, archive.verdicts(row)) for row, _ in wanted] or None

    return await run.poll("audits", query, wait_s) or []


def _appointment(archive: Archive, key: bytes) -> bytes:
    """The hash of the record that made this key the checkpoint worker."""
    for row in archive.of_round(Appointment.kind, 0):
        record = opened(row)
        if isinstance(record, Appointment) and (record.role, record.key) == (Role.CHECKPOINT_WORKER, key):
            return row.hash
    raise LookupError("the database lost the appointment of the checkpoint worker")


def _envelope(archive: Archive, digest: bytes) -> bytes:
    row = archive.by_hash(digest)
    assert row is not None
    return row.envelope


def _list(archive: Archive, digests: list[bytes]) -> bytes:
    found = archive.envelopes(digests)
    return encode_list([Envelope.decode(found[digest]) for digest in digests])
