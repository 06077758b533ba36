"""Whatever is made of a signed record, on whatever way it comes: nothing is accepted but what its signer meant, once.

A round is played by hand over HTTP. Before each honest record, everything that a family of attacks makes of it is handed in
and refused; then the record itself is accepted, and again has no effect. In the end the log has exactly the honest leaves,
nobody was accused of anything, and the coordinator answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from swarm_coordinator.api.limits import Limits
from swarm_protocol import encoding, merkle
from swarm_protocol.identity import Identity
from swarm_protocol.records import (
    MAX_SLOTS,
    Addresses,
    Commitment,
    Envelope,
    Equivocation,
    Evidence,
    PartHeld,
    PartRecord,
    Ready,
    Registration,
    Sketches,
    SketchFault,
    SketchObjection,
    SketchSet,
    SlotFault,
    SlotHash,
    SlotWeight,
    Verdict,
)

Api = Any
MakeCast = Callable[..., Any]
Play = Callable[..., None]
Attack = Callable[[Any, Envelope], Iterator[bytes]]
Story = Callable[[Any], AsyncIterator[Envelope]]
"""Each honest record in its turn. Whoever takes one has it accepted before it asks for the next."""

Spoil = Callable[[Any, Envelope], Awaitable[None]]

TOKEN = "sesame"
STRANGER = Identity.from_seed(b"s" * 32)
ROUNDLESS = (Registration, Addresses, Equivocation)
"""Records whose round says nothing."""

FLIPS = 20
BODY_S = 0.2
DEADLINE_S = 120.0
LIMITS = Limits(body_s=BODY_S, identity_burst=10_000, identity_per_s=1000)
HOSTED: dict[str, Any] = {"listen": True, "limits": LIMITS, "within_s": DEADLINE_S}
LEAVES = [b"a" * 32, b"b" * 32]


async def beginning(api: Api) -> AsyncIterator[Envelope]:
    """Up to the plan of round 0."""
    cast = api.cast
    for node in cast.nodes:
        yield cast.registration(node)
    yield Envelope.sign(cast.worker, Addresses(run=cast.run, round=0, multiaddrs=("/ip4/192.0.2.1/tcp/1",)))
    base = await api.base()
    for node in cast.nodes:
        yield cast.ready(node, 0, base)


async def whole_round(api: Api) -> AsyncIterator[Envelope]:
    """A round with its audits, and at last the proof that somebody signed two commitments."""
    cast = api.cast
    async for envelope in beginning(api):
        yield envelope
    plan = await api.plan()
    commitments = [cast.commitment(plan, slot) for slot in range(2)]
    for commitment in commitments:
        yield commitment
    closing = (await api.several("/rounds/0/commitments"))[0].open()
    averages = [cast.part_record(plan, closing, part, slot=part) for part in range(2)]
    for average in averages:
        yield average
    for average in averages:
        yield cast.part_held(average)
    yield cast.report(plan, tuple(average.open().hash for average in averages), b"r" * 32)
    for slot in range(2):
        yield cast.opening(plan, slot)
    yield cast.evidence(cast.auditors[0], commitments[0], b"what it judged by")
    for auditor in cast.auditors:
        for commitment in commitments:
            yield cast.verdict(auditor, commitment)
    for slot, average in enumerate(averages):
        yield cast.part_verdict(cast.auditors[0], average, slot)
    yield cast.evaluation(0, plan.base)
    other = cast.commitment(plan, 0, trace_root=b"x" * 32)
    proof = Equivocation(run=cast.run, round=0, first=commitments[0].encode(), second=other.encode())
    yield Envelope.sign(cast.holder(plan, 1), proof)
    status = (await api.get("")).json()
    assert (status["round"], status["audits"]["accepted"], status["part_audits"]["accepted"]) == (1, 2, 2)
    assert [node["standing"] for node in status["nodes"]].count("ended") == 1


async def sketched_exchange(api: Api) -> AsyncIterator[Envelope]:
    """Sketches, an objection to those of slot 1, and the set that closes them."""
    cast, slots = api.cast, range(3)
    async for envelope in beginning(api):
        yield envelope
    plan = await api.plan()
    for slot in slots:
        yield cast.commitment(plan, slot, parts_root=merkle.root(LEAVES))
    closing = (await api.several("/rounds/0/commitments"))[0].open()
    made = {
        entry.slot: Sketches(
            run=cast.run,
            round=0,
            sequence=entry.slot,
            commitment_set=closing.hash,
            commitment=entry.hash,
            slot=entry.slot,
            root=bytes(32),
            blob=bytes(32),
        )
        for entry in closing.commitments
    }
    for slot in (0, 2):
        yield Envelope.sign(cast.holder(plan, slot), made[slot])
    objection = SketchObjection(
        run=cast.run,
        round=0,
        sequence=MAX_SLOTS + 1,
        part=1,
        slot=1,
        sketches=made[1].hash,
        part_hash=LEAVES[1],
        proof=merkle.proof(LEAVES, 1),
    )
    yield Envelope.sign(cast.holder(plan, 0), objection)
    selection = SketchSet(
        run=cast.run,
        round=0,
        commitment_set=closing.hash,
        counted=tuple(SlotHash(slot=slot, hash=made[slot].hash) for slot in (0, 2)),
        excluded=(SlotFault(slot=1, fault=SketchFault.FORGED),),
        selected=(SlotWeight(slot=0, weight=7),),
    )
    yield Envelope.sign(cast.worker, selection)
    assert [slot["sketch_fault"] for slot in (await api.get("/rounds/0")).json()["roster"]] == [None, "forged", None]


def flipped(_: Any, honest: Envelope) -> Iterator[bytes]:
    """Single bits, in every part of the record."""
    data, chance = honest.encode(), random.Random(honest.signature)
    for place in {0, len(data) - 1, *chance.sample(range(len(data)), min(FLIPS, len(data)))}:
        yield data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]


def cut(_: Any, honest: Envelope) -> Iterator[bytes]:
    """Not all of it, more than it, or another encoding of it."""
    data = honest.encode()
    yield from (b"", data[:1], data[: len(data) // 2], data[:-1], data + b"\0", data + data, b"\xa0", b"\xff" * 100)
    fields = {"key": honest.key, "sig": honest.signature}
    yield encoding.encode({**fields, "body": honest.body, "more": b""})
    yield encoding.encode(fields)
    yield encoding.encode({**fields, "body": honest.body + b"\0"})
    yield encoding.encode([data])


def renamed(cast: Any, honest: Envelope) -> Iterator[bytes]:
    """Signed by its signer, but for another run, or another round."""
    signer, record = signer_of(cast, honest), honest.open()
    yield cast.changed(signer, record, run=b"x" * 32).encode()
    if not isinstance(record, ROUNDLESS):
        for number in (record.round + 1, (1 << 31) - 1):
            yield cast.changed(signer, record, round=number).encode()


def resigned(cast: Any, honest: Envelope) -> Iterator[bytes]:
    """With the signature of something else, or of somebody who has no right to it."""
    record = honest.open()
    another = cast.registration(signer_of(cast, honest), sequence=77)
    yield Envelope(honest.body, honest.key, another.signature).encode()
    yield Envelope(another.body, honest.key, honest.signature).encode()
    yield Envelope(honest.body, STRANGER.public_key, honest.signature).encode()
    yield Envelope(honest.body, honest.key, bytes(64)).encode()
    yield Envelope(honest.body, bytes(32), honest.signature).encode()
    outsiders = [STRANGER]
    if honest.key not in {node.public_key for node in cast.nodes}:
        outsiders += cast.nodes
    elif not isinstance(record, Registration | Equivocation):
        outsiders += [cast.worker, cast.auditors[0]]
    for outsider in outsiders:
        yield Envelope.sign(outsider, record).encode()


def misdirected(cast: Any, honest: Envelope) -> Iterator[bytes]:
    """Signed by its signer, and about what is not there or not its own."""
    signer, record = signer_of(cast, honest), honest.open()
    match record:
        case Ready():
            yield cast.changed(signer, record, base=b"x" * 32).encode()
        case Commitment():
            yield cast.changed(signer, record, slot=(record.slot + 1) % 2, sequence=5).encode()
            yield cast.changed(signer, record, plan=b"x" * 32, sequence=5).encode()
        case PartRecord():
            yield cast.changed(signer, record, commitment_set=b"x" * 32).encode()
            yield cast.changed(signer, record, size_bytes=1).encode()
        case Sketches():
            yield cast.changed(signer, record, commitment=b"x" * 32).encode()
            yield cast.changed(signer, record, slot=1, sequence=1).encode()
        case SketchObjection():
            yield cast.changed(signer, record, part_hash=b"x" * 32).encode()
        case SketchSet():
            yield cast.changed(signer, record, commitment_set=b"x" * 32).encode()
        case PartHeld():
            yield cast.changed(signer, record, part_record=b"x" * 32, sequence=77).encode()
        case Evidence():
            yield cast.changed(signer, record, audited=b"x" * 32).encode()
            yield cast.changed(signer, record, slot=1).encode()
            yield cast.changed(signer, record, items=(*record.items, *record.items)).encode()
        case Verdict():
            yield cast.changed(signer, record, evidence=b"x" * 32).encode()
            yield cast.changed(signer, record, commitment=b"x" * 32, sequence=77).encode()
        case Equivocation():
            yield cast.changed(signer, record, second=record.first, sequence=77).encode()


ATTACKS = [flipped, cut, renamed, resigned, misdirected]


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_is_made_of_a_record_is_accepted_and_the_record_is(
    make_cast: MakeCast, play: Play, attack: Attack
) -> None:
    cast = make_cast(token=TOKEN, reductions=1.0)
    play(cast, lambda api: played(api, whole_round, forging(attack)), **HOSTED)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_is_made_of_a_record_about_sketches_is_accepted(
    make_cast: MakeCast, play: Play, attack: Attack
) -> None:
    cast = make_cast(3, token=TOKEN, aggregator="geometric_median")
    play(cast, lambda api: played(api, sketched_exchange, forging(attack)), **HOSTED)


def test_bodies_that_are_too_long_are_refused_declared_or_not(make_cast: MakeCast, play: Play) -> None:
    async def spoil(api: Api, honest: Envelope) -> None:
        data = honest.encode()

        async def endless() -> AsyncIterator[bytes]:
            yield data
            while True:
                yield bytes(1 << 16)

        for body in (data + bytes(10 << 20), endless()):
            url = f"/v1/runs/{api.cast.run.hex()}/records"
            try:
                answer = await api.http.post(url, content=body)
            except (httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
                continue  # the coordinator hung up while we were still sending
            assert (answer.status_code, answer.json()["code"]) == (413, "too-long")

    play(make_cast(token=TOKEN, reductions=1.0), lambda api: played(api, whole_round, spoil), **HOSTED)


def test_bodies_that_do_not_come_to_an_end_are_refused(make_cast: MakeCast, play: Play) -> None:
    async def spoil(api: Api, honest: Envelope) -> None:
        data = honest.encode()
        slow, gone, short = await asyncio.gather(
            sent_raw(api, data[:-1], len(data), hang_up=False),
            sent_raw(api, data[:-1], len(data), hang_up=True),
            sent_raw(api, data[: len(data) // 2], len(data) // 2, hang_up=False),
        )
        assert slow.startswith(b"HTTP/1.1 408 ")
        assert not gone.startswith(b"HTTP/1.1 2")
        assert short.startswith(b"HTTP/1.1 400 ")

    play(make_cast(token=TOKEN, reductions=1.0), lambda api: played(api, whole_round, spoil), **HOSTED)


def forging(attack: Attack) -> Spoil:
    """Hands in all that an attack makes of a record, at once."""

    async def spoil(api: Api, honest: Envelope) -> None:
        for answer in await asyncio.gather(*(api.offer(forged) for forged in attack(api.cast, honest))):
            assert 400 <= answer.status_code < 500, answer.text
            assert answer.headers["content-type"] == "application/problem+json"

    return spoil


async def played(api: Api, story: Story, spoil: Spoil) -> None:
    """A story in which each honest record is spoiled first, then accepted, then handed in again."""
    owner, token = bytes.fromhex(api.cast.spec.coordinator), {"authorization": f"Bearer {TOKEN}"}
    expected = []
    async for honest in story(api):
        before = api.service.log_head
        await spoil(api, honest)
        assert api.service.log_head == before
        accepted = await api.offer(honest, **token)
        assert accepted.status_code == 201, accepted.text
        after = api.service.log_head
        again = await api.offer(honest, **token)
        kept = not isinstance(honest.open(), Ready)
        assert (again.status_code, again.json()) == (200 if kept else 201, accepted.json())
        assert api.service.log_head == after
        if accepted.json()["leaf"] is not None:
            expected.append(honest)
    entries = await api.several("/log/entries")
    assert [entry for entry in entries if entry.key != owner] == expected
    assert not [entry for entry in entries if entry.key == owner and entry.open().kind == Equivocation.kind]
    assert (await api.http.get("/healthz")).status_code == 200


async def sent_raw(api: Api, data: bytes, length: int, *, hang_up: bool) -> bytes:
    """What the coordinator answers to a body of fewer bytes than it says."""
    url = httpx.URL(api.http.base_url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    path = f"/v1/runs/{api.cast.run.hex()}/records"
    writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n".encode() + data)
    await writer.drain()
    if hang_up:
        writer.write_eof()
    answer = b""
    with contextlib.suppress(ConnectionError):
        answer = await reader.read(1 << 16)
        writer.close()
        await writer.wait_closed()
    return answer


def signer_of(cast: Any, envelope: Envelope) -> Identity:
    everybody: list[Identity] = [*cast.nodes, cast.worker, *cast.auditors]
    return next(one for one in everybody if one.public_key == envelope.key)
