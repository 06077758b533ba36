"""A signed record is read as it was signed, by whom, for which run and round, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from swarm_protocol import encoding, records
from swarm_protocol.errors import EncodingError, InvalidDataError, SignatureError, SwarmError
from swarm_protocol.identity import Identity
from swarm_protocol.records import Envelope, Record

RUN = bytes([1]) * 32
ALICE = Identity.from_seed(bytes([2]) * 32)
BOB = Identity.from_seed(bytes([3]) * 32)


def digest(name: str) -> bytes:
    return blake3(name.encode()).digest()


SEAT = records.Seat(peer=ALICE.public_key, steps=20, weight=20480, reducer=True)
NAME: dict[str, Any] = {"run": RUN, "round": 3, "sequence": 5}
ONE_OF_EACH: dict[str, Record] = {
    record.kind: record
    for record in (
        records.Registration(
            **NAME,
            protocol=1,
            name="Zoë's node",
            agent="swarm-node 0.1.0",
            device="cpu",
            fingerprint=digest("runtime"),
            team="Δ",
        ),
        records.Appointment(**NAME, role=records.Role.AUDITOR, key=BOB.public_key),
        records.Dismissal(**NAME, key=BOB.public_key, reason="its key was lost"),
        records.Addresses(**NAME, multiaddrs=(f"/ip4/127.0.0.1/tcp/4001/p2p/{ALICE.peer_id}",)),
        records.Holding(**NAME, root=digest("root")),
        records.TransportKey(**NAME, key=digest("transport key"), expires_ms=1_790_000_000_000),
        records.Ready(**NAME, base=digest("base"), tokens_per_s=1234.5, can_reduce=True, upload_bytes_per_s=0),
        records.RoundPlan(
            **NAME,
            base=digest("base"),
            roster=(SEAT, records.Seat(peer=BOB.public_key, steps=7, weight=0, reducer=False)),
            cursor=4096,
            commit_by_ms=1_790_000_000_000,
            exchange_by_ms=1_790_000_060_000,
            previous_beacon=digest("beacon"),
            log_size=17,
            log_root=digest("log"),
        ),
        records.Commitment(
            **NAME,
            plan=digest("plan"),
            slot=1,
            tokens=20480,
            trace_root=digest("trace"),
            parts_root=digest("parts"),
            nonce_hash=digest("nonce"),
            fingerprint=digest("runtime"),
            train_loss=5.4375,
        ),
        records.CommitmentSet(
            **NAME, plan=digest("plan"), commitments=(records.SlotHash(slot=1, hash=digest("commitment")),)
        ),
        records.Sketches(
            **NAME,
            commitment_set=digest("set"),
            commitment=digest("commitment"),
            slot=1,
            root=digest("sketches"),
            blob=digest("sketch bytes"),
        ),
        records.SketchObjection(
            **NAME, part=5, slot=1, sketches=digest("signed"), part_hash=digest("encoded part"), proof=(digest("step"),)
        ),
        records.SketchSet(
            **NAME,
            commitment_set=digest("set"),
            counted=(records.SlotHash(slot=1, hash=digest("signed")), records.SlotHash(slot=3, hash=digest("other"))),
            excluded=(records.SlotFault(slot=2, fault=records.SketchFault.FORGED),),
            selected=(records.SlotWeight(slot=1, weight=20480),),
        ),
        records.PartRecord(
            **NAME, part=5, commitment_set=digest("set"), result=digest("average"), size_bytes=1000, slots=(0, 1)
        ),
        records.PartReceipt(**NAME, commitment=digest("commitment"), part=5, slot=1, part_hash=digest("encoded part")),
        records.PartHeld(**NAME, part_record=digest("part record")),
        records.CheckpointManifest(
            **NAME,
            parent=digest("base"),
            root=digest("root"),
            size_bytes=8 << 20,
            chunk_bytes=1 << 20,
            layout=digest("layout"),
        ),
        records.CheckpointReport(**NAME, base=digest("base"), parts=(digest("part"), None), root=digest("root")),
        records.RoundManifest(
            **NAME,
            plan=digest("plan"),
            commitment_set=digest("set"),
            parts=(None, digest("part")),
            base=digest("base"),
            root=digest("root"),
        ),
        records.NonceOpening(**NAME, slot=1, nonce=digest("opened")),
        records.BeaconReveal(
            **NAME,
            value=digest("beacon value"),
            manifest=digest("manifest"),
            openings=(records.SlotNonce(slot=1, nonce=digest("opened")),),
        ),
        records.Evidence(
            **NAME,
            slot=1,
            part=None,
            audited=digest("commitment"),
            segment=2,
            items=(
                records.EvidenceItem(name="trace", size_bytes=96, chunks=(digest("roots"),)),
                records.EvidenceItem(name="state-2", size_bytes=1 << 20, chunks=(digest("a state"),)),
            ),
        ),
        records.Verdict(
            **NAME,
            slot=1,
            commitment=digest("commitment"),
            outcome=records.Outcome.REJECTED,
            comparison=records.Comparison.OUTSIDE,
            statistic=0.75,
            reason="the replay is farther away than the tolerance",
            steps_replayed=20,
            fingerprint=digest("runtime"),
            evidence=digest("evidence"),
        ),
        records.PartVerdict(
            **NAME,
            part=5,
            slot=1,
            part_record=digest("part record"),
            outcome=records.Outcome.REJECTED,
            reason="wrong average of part 5 in round 3",
        ),
        records.Equivocation(**NAME, first=b"one signed record", second=b"another one"),
        records.Evaluation(**NAME, root=digest("root"), loss=5.5, tokens=8192, sample="All that is ‖ gold"),
        records.Receipt(**NAME, record=digest("record"), leaf_hash=digest("leaf")),
        records.LogHead(**NAME, root=digest("log")),
        records.Ban(**NAME, key=BOB.public_key, reason="spam"),
        records.RunEnd(**NAME, root=digest("root"), reason="all rounds are done"),
        records.CreditStatement(
            **NAME,
            checkpoint=digest("root"),
            moves=(
                records.CreditMove(
                    move=records.Move.EARNED,
                    cause=digest("manifest"),
                    entries=(records.CreditEntry(round=3, slot=1, megaflops=1 << 40),),
                ),
            ),
            balances=digest("balances"),
            accounts=2,
        ),
    )
}
EACH = pytest.mark.parametrize("record", ONE_OF_EACH.values(), ids=ONE_OF_EACH.keys())


def test_every_kind_is_tested_here() -> None:
    assert ONE_OF_EACH.keys() == records.KINDS.keys()


def test_a_receipt_is_broken_by_a_record_that_leaves_its_slot_out() -> None:
    receipt, record = ONE_OF_EACH["part-receipt"], ONE_OF_EACH["part-record"]
    assert isinstance(receipt, records.PartReceipt)
    assert isinstance(record, records.PartRecord)
    assert not receipt.broken_by(record)
    without = record.model_copy(update={"slots": (0, 2)})
    assert receipt.broken_by(without)
    for elsewhere in ({"part": 6}, {"round": record.round + 1}, {"run": digest("another run")}):
        assert not receipt.broken_by(without.model_copy(update=elsewhere))


def test_a_receipt_by_sketches_is_broken_only_if_these_selected_its_slot() -> None:
    receipt, record, closing = (ONE_OF_EACH[kind] for kind in ("part-receipt", "part-record", "sketch-set"))
    assert isinstance(receipt, records.PartReceipt)
    assert isinstance(record, records.PartRecord)
    assert isinstance(closing, records.SketchSet)
    without = record.model_copy(update={"slots": (0, 2)})
    by_these = receipt.model_copy(update={"sketches": digest("signed")})
    assert by_these.broken_by(without, closing)
    assert not by_these.broken_by(record, closing)
    assert not by_these.broken_by(without, closing.model_copy(update={"selected": ()}))
    assert not by_these.model_copy(update={"sketches": digest("others")}).broken_by(without, closing)
    assert not receipt.broken_by(without, closing)


def test_records_are_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    golden(
        "records",
        {
            kind: {
                "body": record.body.hex(),
                "hash": record.hash.hex(),
                "signature": Envelope.sign(ALICE, record).signature.hex(),
            }
            for kind, record in ONE_OF_EACH.items()
        },
    )


@EACH
def test_every_kind_comes_back_as_it_was_signed(record: Record) -> None:
    envelope = Envelope.decode(Envelope.sign(ALICE, record).encode())
    assert envelope == Envelope.sign(ALICE, record)
    assert envelope.peer == ALICE.peer_id
    opened = envelope.open()
    assert type(opened) is type(record)
    assert opened == record
    assert (opened.body, opened.hash) == (record.body, record.hash)
    assert envelope.open_as(type(record), run=RUN, round=3, key=ALICE.public_key) == record


hashes = st.binary(min_size=32, max_size=32)
finite = st.floats(allow_nan=False, allow_infinity=False)
names: dict[str, Any] = {"run": hashes, "round": st.integers(0, 2**31 - 1), "sequence": st.integers(0, 2**62 - 1)}
commitments = st.builds(
    records.Commitment,
    **names,
    plan=hashes,
    slot=st.integers(0, records.MAX_SLOTS - 1),
    tokens=st.integers(1, 2**53 - 1),
    trace_root=hashes,
    parts_root=hashes,
    nonce_hash=hashes,
    fingerprint=hashes,
    sketch_root=st.none() | hashes,
    train_loss=finite,
)
verdicts = st.builds(
    records.Verdict,
    **names,
    slot=st.integers(0, records.MAX_SLOTS - 1),
    commitment=hashes,
    outcome=st.sampled_from(records.Outcome),
    comparison=st.none() | st.sampled_from(records.Comparison),
    statistic=st.none() | finite,
    reason=st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=500),
    steps_replayed=st.integers(0, 10_000),
    fingerprint=hashes,
    evidence=st.none() | hashes,
)
manifests = st.builds(
    records.RoundManifest,
    **names,
    plan=hashes,
    commitment_set=hashes,
    sketches=st.none() | hashes,
    parts=st.lists(st.none() | hashes, min_size=1, max_size=20).map(tuple),
    base=hashes,
    root=hashes,
)


@given(commitments | verdicts | manifests)
def test_any_record_comes_back_as_it_was_signed(record: Record) -> None:
    opened = Envelope.decode(Envelope.sign(BOB, record).encode()).open()
    assert opened == record
    assert opened.body == record.body


@pytest.mark.parametrize("kind", ["part-held", "nonce-opening", "manifest", "verdict"])
def test_an_envelope_with_any_bit_flipped_is_refused(kind: str) -> None:
    encoded = Envelope.sign(ALICE, ONE_OF_EACH[kind]).encode()
    for bit in range(8 * len(encoded)):
        flipped = bytearray(encoded)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InvalidDataError):
            Envelope.decode(bytes(flipped)).open()


@given(st.binary(max_size=300))
def test_garbage_is_neither_a_record_nor_an_envelope(data: bytes) -> None:
    for read in (records.parse, Envelope.decode, lambda data: records.decode_list(data, max_bytes=1000)):
        try:
            read(data)
        except EncodingError:
            continue
        assert data == b"\x80"  # the empty list of envelopes


def test_the_same_fields_under_two_kinds_have_two_hashes() -> None:
    body = ONE_OF_EACH["part-held"].body
    assert len({records.record_hash(kind, body) for kind in records.KINDS}) == len(records.KINDS)


def test_no_record_passes_for_another_kind() -> None:
    opening = ONE_OF_EACH["nonce-opening"]
    envelope = Envelope.sign(ALICE, opening)
    with pytest.raises(InvalidDataError, match="a nonce-opening where a verdict was expected"):
        envelope.open_as(records.Verdict, run=RUN)
    # The same signature under the other kind's name, with fields that this kind takes.
    twin = records.Appointment(**NAME, role=records.Role.AUDITOR, key=BOB.public_key)
    fields: Any = encoding.decode(twin.body)
    stolen = Envelope(encoding.encode(fields | {"kind": "part-held"}), ALICE.public_key, ALICE.sign(twin.hash))
    with pytest.raises(InvalidDataError):
        stolen.open()


def test_a_signature_over_the_body_itself_does_not_count() -> None:
    record = ONE_OF_EACH["part-held"]
    with pytest.raises(SignatureError):
        Envelope(record.body, ALICE.public_key, ALICE.sign(record.body)).open()


def test_another_run_round_or_signer_is_refused_by_name() -> None:
    envelope = Envelope.sign(ALICE, ONE_OF_EACH["part-held"])
    with pytest.raises(InvalidDataError, match="another run"):
        envelope.open_as(records.PartHeld, run=bytes(32))
    with pytest.raises(InvalidDataError, match="round 3 where round 4"):
        envelope.open_as(records.PartHeld, run=RUN, round=4)
    with pytest.raises(SignatureError, match=f"{ALICE.peer_id} instead of {BOB.peer_id}"):
        envelope.open_as(records.PartHeld, run=RUN, key=BOB.public_key)
    with pytest.raises(SignatureError):
        Envelope(envelope.body, BOB.public_key, envelope.signature).open_as(records.PartHeld, run=RUN)


def changed(record_kind: str, **fields: object) -> bytes:
    """The canonical body of a record of this kind with some fields changed; those that are `...` are left out."""
    body: Any = encoding.decode(ONE_OF_EACH[record_kind].body)
    return encoding.encode({name: value for name, value in (body | fields).items() if value is not ...})


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("part-held", {"run": bytes(31)}),
        ("part-held", {"run": bytes(33)}),
        ("part-held", {"run": "0" * 32}),
        ("part-held", {"run": None}),
        ("part-held", {"run": ...}),
        ("part-held", {"round": -1}),
        ("part-held", {"round": 1 << 31}),
        ("part-held", {"round": 3.0}),
        ("part-held", {"round": True}),
        ("part-held", {"round": "3"}),
        ("part-held", {"round": ...}),
        ("part-held", {"sequence": 1 << 62}),
        ("part-held", {"sequence": ...}),
        ("part-held", {"surprise": 1}),
        ("part-held", {"part_record": bytes(31)}),
        ("registration", {"name": "x" * 65}),
        ("registration", {"name": b"x"}),
        ("registration", {"name": "a\0b"}),
        ("registration", {"agent": "\0"}),
        ("registration", {"device": "cpu\n\0"}),
        ("registration", {"team": "team\0"}),
        ("appointment", {"role": "emperor"}),
        ("addresses", {"multiaddrs": []}),
        ("addresses", {"multiaddrs": ["/ip4/127.0.0.1/tcp/1"] * 17}),
        ("addresses", {"multiaddrs": ["x" * 257]}),
        ("addresses", {"multiaddrs": [""]}),
        ("ready", {"tokens_per_s": 0.0}),
        ("ready", {"tokens_per_s": 1}),
        ("ready", {"tokens_per_s": 2e12}),
        ("ready", {"can_reduce": 1}),
        ("plan", {"roster": []}),
        ("plan", {"roster": [{"peer": bytes(32), "steps": 0, "weight": 0, "reducer": True}]}),
        ("plan", {"roster": [{"peer": bytes(32), "steps": 1, "weight": (1 << 24) + 1, "reducer": True}]}),
        ("plan", {"roster": [{"peer": bytes(32), "steps": 1, "weight": 1}]}),
        ("plan", {"roster": None}),
        ("plan", {"cursor": 1 << 62}),
        ("commitment", {"slot": records.MAX_SLOTS}),
        ("commitment", {"tokens": 0}),
        ("commitment", {"train_loss": 5}),
        ("commitment", {"sketch_root": ...}),
        ("commitment-set", {"commitments": [{"slot": 0}]}),
        ("commitment-set", {"commitments": [{"slot": 0, "hash": bytes(32), "more": 0}]}),
        ("part-record", {"slots": []}),
        ("part-record", {"slots": [0] * (records.MAX_SLOTS + 1)}),
        ("part-record", {"size_bytes": 0}),
        ("part-record", {"size_bytes": 1 << 40}),
        ("part-record", {"part": records.MAX_PARTS}),
        ("manifest", {"parts": []}),
        ("manifest", {"parts": [None] * (records.MAX_PARTS + 1)}),
        ("manifest", {"parts": {"0": None}}),
        ("verdict", {"outcome": "maybe"}),
        ("verdict", {"comparison": ...}),
        ("verdict", {"reason": "x" * 501}),
        ("verdict", {"reason": "wrong\0"}),
        ("part-verdict", {"reason": "\0wrong"}),
        ("ban", {"reason": "\0"}),
        ("run-end", {"reason": "done\0"}),
        ("verdict", {"steps_replayed": 10_001}),
        ("evaluation", {"loss": -0.5}),
        ("evaluation", {"sample": "x" * 2001}),
        ("evaluation", {"sample": "once upon a \0"}),
    ],
    ids=str,
)
def test_a_field_that_is_missing_unknown_or_out_of_bounds_is_refused_by_name(
    kind: str, fields: dict[str, object]
) -> None:
    with pytest.raises(EncodingError, match=kind) as caught:
        records.parse(changed(kind, **fields))
    missing_default = fields in ({"sequence": ...}, {"sketch_root": ...})
    rewritten = fields in ({"tokens_per_s": 1}, {"train_loss": 5})
    named = "leaves out a field" if missing_default or rewritten else f"{kind}.{next(iter(fields))}"
    assert named in str(caught.value)


@pytest.mark.parametrize("text", ["", "\x01\t\r\n\x7f", "two\nlines\n", "Zoë ‖ 名 \U0001f600"])
def test_a_text_may_have_any_character_but_nul(text: str) -> None:
    record = records.parse(changed("registration", name=text, agent=text, device=text, team=text))
    assert isinstance(record, records.Registration)
    assert (record.name, record.agent, record.device, record.team) == (text, text, text, text)


@pytest.mark.parametrize(
    "fields",
    [{"kind": "part-hold"}, {"kind": None}, {"kind": ["part-held"]}, {"kind": ...}, {"v": 2}, {"v": 1.5}, {"v": ...}],
    ids=str,
)
def test_an_unknown_kind_or_version_suggests_an_upgrade(fields: dict[str, object]) -> None:
    with pytest.raises(EncodingError, match="upgrade swarm-node"):
        records.parse(changed("part-held", **fields))


@pytest.mark.parametrize("value", [None, 1, [], "text", b"bytes", {}])
def test_what_is_no_map_with_a_kind_is_no_record(value: object) -> None:
    with pytest.raises(EncodingError):
        records.parse(encoding.encode(value))


def test_an_unknown_kind_does_not_fill_the_screen() -> None:
    with pytest.raises(EncodingError) as caught:
        records.parse(changed("part-held", kind="x" * 10_000))
    assert len(str(caught.value)) < 200


@EACH
def test_no_field_of_a_record_can_be_changed(record: Record) -> None:
    for name in type(record).model_fields:
        with pytest.raises(ValidationError):
            setattr(record, name, getattr(record, name))


def test_a_seat_and_its_roster_cannot_be_changed() -> None:
    plan: Any = ONE_OF_EACH["plan"]
    assert isinstance(plan.roster, tuple)
    with pytest.raises(ValidationError):
        plan.roster[0].weight = 0


def test_an_out_of_bounds_record_cannot_even_be_made() -> None:
    with pytest.raises(ValidationError):
        records.PartHeld(run=RUN[:-1], round=0, part_record=bytes(32))
    with pytest.raises(ValidationError):
        records.Evaluation(**NAME, root=bytes(32), loss=float("nan"), tokens=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"key": bytes(31)},
        {"sig": bytes(63)},
        {"sig": None},
        {"body": "text"},
        {"body": ...},
        {"extra": 1},
        {"key": {"a": {"b": 1}}},
    ],
    ids=str,
)
def test_an_envelope_of_another_form_is_refused(fields: dict[str, object]) -> None:
    value: Any = encoding.decode(Envelope.sign(ALICE, ONE_OF_EACH["part-held"]).encode())
    with pytest.raises(EncodingError):
        Envelope.decode(encoding.encode({key: item for key, item in (value | fields).items() if item is not ...}))


def test_an_envelope_beyond_the_bound_is_refused() -> None:
    huge = Envelope(bytes(records.MAX_RECORD_BYTES), ALICE.public_key, bytes(64)).encode()
    with pytest.raises(EncodingError, match="at most"):
        Envelope.decode(huge)


def test_the_largest_plan_still_fits_an_envelope() -> None:
    plan: Any = ONE_OF_EACH["plan"]
    fields = {name: getattr(plan, name) for name in type(plan).model_fields}
    seat = records.Seat(peer=bytes([255]) * 32, steps=10_000, weight=1 << 24, reducer=False)
    largest = records.RoundPlan(**fields | {"roster": (seat,) * records.MAX_SLOTS})
    assert Envelope.decode(Envelope.sign(ALICE, largest).encode()).open() == largest


def test_lists_of_envelopes_come_back_in_order_and_bounded() -> None:
    envelopes = [Envelope.sign(ALICE, record) for record in ONE_OF_EACH.values()]
    raw = records.encode_list(envelopes)
    assert records.decode_list(raw, max_bytes=len(raw)) == envelopes
    assert records.decode_list(records.encode_list([]), max_bytes=10) == []
    with pytest.raises(EncodingError, match="at most"):
        records.decode_list(raw, max_bytes=len(raw) - 1)
    for wrong in ({"a": b""}, [1], [b"no envelope"], [[b""]], b""):
        with pytest.raises(EncodingError):
            records.decode_list(encoding.encode(wrong), max_bytes=1000)


def test_a_plan_knows_the_slot_of_a_key() -> None:
    plan: Any = ONE_OF_EACH["plan"]
    assert [plan.slot_of(key) for key in (ALICE.public_key, BOB.public_key, bytes(32))] == [0, 1, None]


def test_every_refusal_is_an_error_of_ours() -> None:
    assert issubclass(EncodingError, InvalidDataError)
    assert issubclass(SignatureError, InvalidDataError)
    assert issubclass(InvalidDataError, SwarmError)
