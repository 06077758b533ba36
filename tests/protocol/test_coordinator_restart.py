"""A coordinator that is stopped at any point goes on where it was: nothing acknowledged is lost, nothing signed anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.tables import RoundRow
from swarm_coordinator.entry import Entry
from swarm_coordinator.journal import Journal
from swarm_coordinator.rounds import Phase
from swarm_protocol.errors import ConfigurationError, RefusedError
from swarm_protocol.identity import Identity
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.records import CommitmentSet, Envelope, Outcome, Role, RoundPlan

pytestmark = pytest.mark.usefixtures("database_url")


class Coordinator:
    """A journal that is closed and opened again after every record, and compared with what it was."""

    def __init__(self, cast: Any, *, restarting: bool = True) -> None:
        self.cast = cast
        self.restarting = restarting
        self.journal = self._open()
        self.journal.appoint(Role.CHECKPOINT_WORKER, cast.worker.public_key, cast.now_ms)
        for auditor in cast.auditors:
            self.journal.appoint(Role.AUDITOR, auditor.public_key, cast.now_ms)
        self.restart()

    def _open(self) -> Journal:
        return Journal.open(self.cast.home, self.cast.now_ms)

    def restart(self) -> None:
        state, head, entries = self.journal.state, self.journal.log_head, self.entries()
        self.journal.close()
        self.journal = self._open()
        assert self.journal.state == state
        assert self.journal.log_head == head
        assert self.entries() == entries

    def submit(self, *envelopes: Envelope) -> None:
        for envelope in envelopes:
            receipt, _ = self.journal.submit(envelope, envelope.open(), None, self.cast.now_ms)
            assert receipt.new
            if self.restarting:
                before = self.entries()
                self.restart()
                assert self.entries()[: len(before)] == before

    def tick(self, after_ms: int) -> None:
        self.cast.now_ms += after_ms
        self.journal.tick(self.cast.now_ms)
        if self.restarting:
            self.restart()

    def entries(self) -> list[bytes]:
        return [row.envelope for row in self.journal.read(lambda archive: archive.leaves(0, 10_000))]

    def plan(self) -> RoundPlan:
        return self.journal.read(lambda archive: archive.stored(RoundPlan, self.round_row(archive).plan))

    def closing(self) -> CommitmentSet:
        return self.journal.read(
            lambda archive: archive.stored(CommitmentSet, self.round_row(archive).commitment_set or b"")
        )

    def round_row(self, archive: Archive) -> RoundRow:
        row = archive.round(self.journal.state.round)
        assert row is not None
        return row


def play_round(coordinator: Coordinator, number: int) -> list[Envelope]:
    """One round, all of it; returns the commitments."""
    cast, base = coordinator.cast, coordinator.journal.state.base
    coordinator.submit(*(cast.ready(node, number, base) for node in cast.nodes))
    plan = coordinator.plan()
    commitments = [cast.commitment(plan, slot) for slot in range(len(plan.roster))]
    coordinator.submit(*commitments)
    closing = coordinator.closing()
    for part in range(2):
        record = cast.part_record(plan, closing, part, slot=part)
        coordinator.submit(record)
        coordinator.submit(cast.part_held(record))
    coordinator.submit(cast.report(plan, coordinator.journal.state.parts, bytes([50 + number]) * 32))
    coordinator.submit(*(cast.opening(plan, slot) for slot in range(len(plan.roster))))
    coordinator.submit(*(cast.verdict(auditor, one) for one in commitments for auditor in cast.auditors))
    return commitments


def test_a_restart_after_every_record_changes_nothing(make_cast: Callable[..., Any]) -> None:
    coordinator = Coordinator(make_cast())
    coordinator.submit(*(coordinator.cast.registration(node) for node in coordinator.cast.nodes))
    for number in range(2):
        assert coordinator.journal.state.round == number
        play_round(coordinator, number)
    assert coordinator.journal.state.phase is Phase.FINISHED
    assert coordinator.journal.read(lambda archive: archive.count_audits()) == {"accepted": 4}
    coordinator.journal.close()


def test_the_log_head_is_that_of_its_entries(make_cast: Callable[..., Any]) -> None:
    coordinator = Coordinator(make_cast(rounds=1), restarting=False)
    coordinator.submit(*(coordinator.cast.registration(node) for node in coordinator.cast.nodes))
    play_round(coordinator, 0)
    log = Log(leaf_hash(entry) for entry in coordinator.entries())
    assert coordinator.journal.log_head == (log.size, log.root())
    coordinator.journal.close()


def test_a_plan_names_the_log_before_it(make_cast: Callable[..., Any]) -> None:
    coordinator = Coordinator(make_cast(), restarting=False)
    cast = coordinator.cast
    coordinator.submit(*(cast.registration(node) for node in cast.nodes))
    head = coordinator.journal.log_head
    coordinator.submit(*(cast.ready(node, 0, coordinator.journal.state.base) for node in cast.nodes))
    plan = coordinator.plan()
    assert (plan.log_size, plan.log_root) == head
    assert plan.previous_beacon.hex() == cast.spec.beacon
    coordinator.journal.close()


def test_a_crash_inside_a_transaction_leaves_no_trace(
    make_cast: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = Coordinator(make_cast(), restarting=False)
    cast = coordinator.cast
    coordinator.submit(*(cast.registration(node) for node in cast.nodes))
    first, second = (cast.ready(node, 0, coordinator.journal.state.base) for node in cast.nodes)
    coordinator.submit(first)
    state, head = coordinator.journal.state, coordinator.journal.log_head

    def crash(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Entry, "_snapshot", crash)
        patched.setattr(Entry, "_publish_plan", crash)
        with pytest.raises(OSError, match="disk is full"):
            coordinator.submit(second)
    assert (coordinator.journal.state, coordinator.journal.log_head) == (state, head)
    coordinator.restart()
    coordinator.submit(second)
    assert coordinator.journal.state.phase is Phase.TRAINING
    coordinator.restart()
    coordinator.journal.close()


def test_time_that_the_coordinator_was_down_for_is_given_back_to_the_phase(make_cast: Callable[..., Any]) -> None:
    coordinator = Coordinator(make_cast(), restarting=False)
    cast = coordinator.cast
    coordinator.submit(*(cast.registration(node) for node in cast.nodes))
    coordinator.submit(*(cast.ready(node, 0, coordinator.journal.state.base) for node in cast.nodes))
    ends_ms = coordinator.journal.state.phase_ends_ms
    assert ends_ms is not None
    coordinator.journal.close()
    cast.now_ms += 3_600_000
    reopened = Journal.open(cast.home, cast.now_ms)
    assert reopened.state.phase_ends_ms == ends_ms + 3_600_000
    reopened.tick(cast.now_ms)
    assert reopened.state.phase is Phase.TRAINING
    reopened.close()


def test_deadlines_pass_by_the_clock(make_cast: Callable[..., Any]) -> None:
    coordinator = Coordinator(make_cast())
    cast = coordinator.cast
    coordinator.submit(*(cast.registration(node) for node in cast.nodes))
    coordinator.submit(*(cast.ready(node, 0, coordinator.journal.state.base) for node in cast.nodes))
    plan = coordinator.plan()
    coordinator.tick(120_000)
    assert coordinator.journal.state.phase is Phase.SEALING
    coordinator.submit(cast.report(plan, (None, None), b"r" * 32))
    assert (coordinator.journal.state.round, coordinator.journal.state.base) == (1, b"r" * 32)
    coordinator.journal.close()


def test_two_rejections_end_a_standing_for_good(make_cast: Callable[..., Any]) -> None:
    coordinator = Coordinator(make_cast())
    cast = coordinator.cast
    coordinator.submit(*(cast.registration(node) for node in cast.nodes))
    base = coordinator.journal.state.base
    coordinator.submit(*(cast.ready(node, 0, base) for node in cast.nodes))
    plan = coordinator.plan()
    commitments = [cast.commitment(plan, slot) for slot in range(2)]
    coordinator.submit(*commitments)
    coordinator.tick(60_000)
    coordinator.submit(cast.report(plan, (None, None), b"r" * 32))
    coordinator.submit(*(cast.opening(plan, slot) for slot in range(2)))
    cheater: Identity = cast.holder(plan, 0)
    coordinator.submit(cast.verdict(cast.auditors[0], commitments[0], Outcome.REJECTED))
    assert cheater.public_key not in coordinator.journal.state.ended
    coordinator.submit(cast.verdict(cast.auditors[1], commitments[0], Outcome.REJECTED))
    assert cheater.public_key in coordinator.journal.state.ended
    with pytest.raises(RefusedError, match="no further part") as refused:
        coordinator.submit(cast.ready(cheater, 1, b"r" * 32))
    assert refused.value.code == "standing-ended"
    with pytest.raises(RefusedError):
        coordinator.submit(cast.registration(cheater, sequence=1))
    coordinator.journal.close()


def test_events_of_rounds_long_over_are_not_kept(make_cast: Callable[..., Any]) -> None:
    coordinator = Coordinator(make_cast(rounds=4), restarting=False)
    cast = coordinator.cast
    coordinator.submit(*(cast.registration(node) for node in cast.nodes))
    for number in range(4):
        play_round(coordinator, number)
    ready = coordinator.journal.read(lambda archive: [archive.of_round("ready", number) for number in range(4)])
    assert not any(ready)
    coordinator.restart()
    coordinator.journal.close()


def test_a_key_that_is_not_the_runs_is_refused(make_cast: Callable[..., Any]) -> None:
    cast = make_cast()
    cast.home.coordinator_key.unlink()
    Identity.generate().save(cast.home.coordinator_key)
    with pytest.raises(ConfigurationError, match="not the key"):
        Journal.open(cast.home, cast.now_ms)
