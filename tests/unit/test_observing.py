"""An observer believes nothing that is not signed, and notices what does not fit."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_node.observing import Observation, Said
from swarm_protocol import encoding
from swarm_protocol.errors import EncodingError, InvalidDataError, RefusedError
from swarm_protocol.gossip import log_ranges, wire
from swarm_protocol.identity import Identity
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.records import Envelope, Equivocation, LogHead, Record, RoundManifest, RoundPlan, RunEnd, Seat
from swarm_protocol.spec import RunSpec

OWNER = Identity.from_seed(bytes([2]) * 32)
ZERO = bytes(32)


def root(number: int) -> bytes:
    return number.to_bytes(32, "big")


@pytest.fixture
def spec(run_spec: RunSpec) -> RunSpec:
    return run_spec.model_copy(update={"coordinator": OWNER.public_key.hex()})


class Run:
    """The owner's records, which fit together unless they are changed."""

    def __init__(self, spec: RunSpec) -> None:
        self.id = spec.run_id
        self.entries: list[bytes] = []
        self.log = Log()

    def plan(self, round: int, **change: object) -> RoundPlan:
        plan = RoundPlan(
            run=self.id,
            round=round,
            base=root(round),
            roster=(Seat(peer=OWNER.public_key, steps=1, weight=1, reducer=True),),
            cursor=0,
            commit_by_ms=1,
            exchange_by_ms=2,
            previous_beacon=ZERO,
            log_size=0,
            log_root=ZERO,
        )
        return plan.model_copy(update=change)

    def manifest(self, round: int, **change: object) -> RoundManifest:
        manifest = RoundManifest(
            run=self.id,
            round=round,
            plan=self.plan(round).hash,
            commitment_set=ZERO,
            parts=(ZERO, None),
            base=root(round),
            root=root(round + 1),
        )
        return manifest.model_copy(update=change)

    def add(self, *records: Record) -> LogHead:
        for record in records:
            self.entries.append(sign(record).encode())
            self.log.append(leaf_hash(self.entries[-1]))
        return LogHead(run=self.id, round=0, sequence=self.log.size, root=self.log.root())

    def range(self, first: int, count: int, head: LogHead) -> bytes:
        wanted = wire.Wanted("log", first=first, count=count, size=head.sequence)
        return log_ranges.provide(self.entries, self.log, wanted)


def sign(record: Record, by: Identity = OWNER) -> Envelope:
    return Envelope.sign(by, record)


@pytest.fixture
def run(spec: RunSpec) -> Run:
    return Run(spec)


@pytest.fixture
def seen(spec: RunSpec) -> Observation:
    return Observation(spec)


def take(seen: Observation, *records: Record) -> list[Said]:
    return [said for record in records for said in seen.take(sign(record))]


def alarms(said: Iterable[Said]) -> list[str]:
    return [one.text for one in said if one.event == "alarm"]


def test_rounds_that_follow_from_each_other_are_told_in_a_line_each(seen: Observation, run: Run) -> None:
    said = take(seen, *(record for round in range(3) for record in (run.plan(round), run.manifest(round))))
    assert alarms(said) == []
    lines = [one for one in said if one.event == "round"]
    assert [one.details["round"] for one in lines] == [0, 1, 2]
    assert lines[0].text.startswith("round 0")
    assert "parts 1/2" in lines[0].text
    records = [one.details for one in said if one.event == "record"]
    assert {one["kind"] for one in records} == {"plan", "manifest"}
    assert records[0]["hash"] == run.plan(0).hash.hex()


@pytest.mark.parametrize(
    ("wrong", "alarm"),
    [
        (lambda run: (run.plan(1), run.manifest(1, plan=ZERO)), "another plan"),
        (lambda run: (run.manifest(0), run.plan(1, base=root(9))), "another checkpoint"),
        (lambda run: (run.plan(1), run.manifest(0, root=root(9))), "another checkpoint"),
        (lambda run: (run.manifest(0), run.manifest(0, root=root(9))), "EQUIVOCATION"),
    ],
    ids=["plan", "base", "root", "equivocation"],
)
def test_what_does_not_fit_is_an_alarm(seen: Observation, run: Run, wrong: object, alarm: str) -> None:
    found = alarms(take(seen, *wrong(run)))  # type: ignore[operator]
    assert any(alarm in text for text in found)
    assert seen.alarms == len(found)


def test_records_that_the_coordinator_did_not_sign_or_of_another_run_are_an_alarm(seen: Observation, run: Run) -> None:
    assert alarms(seen.take(sign(run.plan(0), Identity.generate())))
    assert alarms(seen.take(sign(run.plan(0, run=ZERO))))
    assert seen.rounds == 0


def test_a_proof_of_equivocation_names_who_signed_twice(seen: Observation, run: Run) -> None:
    first, second = sign(run.manifest(4)).encode(), sign(run.manifest(4, root=ZERO)).encode()
    report = Equivocation(run=run.id, round=4, first=first, second=second)
    (text,) = alarms(seen.take(sign(report, Identity.generate())))
    assert OWNER.peer_id in text
    assert "round 4" in text


def test_the_log_grows_into_every_head_range_by_range(seen: Observation, run: Run) -> None:
    for records in ([run.plan(0)], [run.manifest(0), run.plan(1)], [run.manifest(round) for round in range(1, 40)]):
        head = run.add(*records)
        assert alarms(take(seen, head)) == []
        while (behind := seen.behind()) is not None:
            assert alarms(seen.grow(run.range(seen.log.size, 7, behind), behind)) == []
        assert seen.verified == run.log.size


def test_a_history_that_was_rewritten_is_noticed(seen: Observation, run: Run) -> None:
    head = run.add(run.plan(0), run.manifest(0))
    take(seen, head)
    list(seen.grow(run.range(0, 10, head), head))
    assert "REWRITTEN" in alarms(take(seen, LogHead(run=run.id, round=0, sequence=1, root=ZERO)))[0]
    other = Run(seen.spec)
    longer = other.add(run.plan(0, cursor=5), run.manifest(0), run.plan(1))
    take(seen, longer)
    with pytest.raises(InvalidDataError):
        list(seen.grow(other.range(2, 10, longer), longer))
    assert seen.verified == 2
    assert seen.rewritten(run.log, head) is None
    said = seen.rewritten(other.log, longer)
    assert said is not None
    assert "REWRITTEN" in said.text


def test_a_record_that_was_announced_and_another_one_in_the_log_are_an_alarm(seen: Observation, run: Run) -> None:
    head = run.add(run.plan(0))
    take(seen, run.plan(0, cursor=9), head)
    assert alarms(seen.grow(run.range(0, 10, head), head))


def test_the_end_of_a_run_ends_the_observation(seen: Observation, run: Run) -> None:
    said = take(seen, RunEnd(run=run.id, round=3, root=ZERO, reason="all rounds are done"))
    assert seen.ended
    assert "all rounds are done" in said[-1].text


@given(st.data())
def test_a_range_in_which_any_byte_was_changed_is_not_taken(run_spec: RunSpec, data: st.DataObject) -> None:
    run = Run(run_spec)
    head = run.add(run.plan(0), run.manifest(0), run.plan(1), run.manifest(1), run.plan(2))
    honest = run.range(0, 3, head)
    changed = bytearray(honest)
    changed[data.draw(st.integers(0, len(honest) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InvalidDataError):
        log_ranges.checked(bytes(changed), Log(), head)
    assert log_ranges.checked(honest, Log(), head)[0] == run.entries[:3]


@pytest.mark.parametrize("numbers", [(0, 0, 5), (5, 1, 5), (0, 1, 6), (3, 9, 2), (1 << 40, 1, 5)])
def test_ranges_that_are_not_there_are_refused(run: Run, numbers: tuple[int, int, int]) -> None:
    run.add(*(run.plan(round) for round in range(5)))
    first, count, size = numbers
    with pytest.raises(RefusedError):
        log_ranges.provide(run.entries, run.log, wire.Wanted("log", first=first, count=count, size=size))


@given(st.recursive(st.none() | st.integers(0, 5) | st.binary(max_size=40) | st.text(max_size=5), st.lists))
def test_requests_from_outside_are_wellformed_or_refused(value: object) -> None:
    with pytest.raises(EncodingError):
        wire.Wanted.decode(value)
    for field in ("what", "hash", "first", "count", "size"):
        request = wire.Wanted("newest").encode() | {field: value}
        try:
            found = wire.Wanted.decode(request)
        except EncodingError:
            continue
        assert encoding.decode(encoding.encode(found.encode())) == request
