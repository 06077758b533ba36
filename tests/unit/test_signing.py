"""A signature is on disk before it leaves, and no second one is ever made for the same name."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swarm_protocol.errors import ConfigurationError, EquivocationError
from swarm_protocol.identity import Identity
from swarm_protocol.records import Envelope, NonceOpening, PartHeld
from swarm_protocol.signing import SigningLedger

RUN = bytes([1]) * 32
OTHER_RUN = bytes([2]) * 32
ALICE = Identity.from_seed(bytes([3]) * 32)
BOB = Identity.from_seed(bytes([4]) * 32)


def held(sequence: int, what: int = 0, *, run: bytes = RUN, round_number: int = 0) -> PartHeld:
    return PartHeld(run=run, round=round_number, sequence=sequence, part_record=what.to_bytes(32, "big"))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[SigningLedger]:
    with SigningLedger(tmp_path / "signed.db", ALICE) as opened:
        yield opened


def test_a_signed_record_opens(ledger: SigningLedger) -> None:
    assert ledger.sign(held(0)).open_as(PartHeld, run=RUN, key=ALICE.public_key) == held(0)


def test_the_same_record_gets_the_same_bytes(ledger: SigningLedger) -> None:
    assert ledger.sign(held(0)).encode() == ledger.sign(held(0)).encode()


def test_another_record_under_the_same_name_is_never_signed(ledger: SigningLedger) -> None:
    first = ledger.sign(held(7, 1))
    with pytest.raises(EquivocationError, match="part-held of round 0, sequence 7"):
        ledger.sign(held(7, 2))
    assert ledger.find(RUN, "part-held", 0, 7) == first


def test_another_run_kind_round_sequence_or_key_is_another_name(ledger: SigningLedger, tmp_path: Path) -> None:
    signed = [
        ledger.sign(held(0, 1)),
        ledger.sign(held(0, 2, run=OTHER_RUN)),
        ledger.sign(held(0, 3, round_number=1)),
        ledger.sign(held(1, 4)),
        ledger.sign(NonceOpening(run=RUN, round=0, slot=0, nonce=bytes(32))),
    ]
    with SigningLedger(tmp_path / "signed.db", BOB) as of_bob:
        signed.append(of_bob.sign(held(0, 5)))
        assert of_bob.find(RUN, "part-held", 0, 1) is None
    assert len({envelope.encode() for envelope in signed}) == 6


def test_what_was_signed_outlives_the_process_and_is_not_signed_anew(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "signed.db"
    with SigningLedger(path, ALICE) as before:
        first = before.sign(held(0, 1))
    with SigningLedger(path, ALICE) as after:
        assert after.find(RUN, "part-held", 0, 0) == first
        assert after.sign(held(0, 1)) == first
        with pytest.raises(EquivocationError):
            after.sign(held(0, 2))


def test_nothing_is_found_where_nothing_was_signed(ledger: SigningLedger) -> None:
    assert ledger.find(RUN, "part-held", 0, 0) is None


def test_the_next_sequence_follows_the_largest_of_its_kind_and_round(ledger: SigningLedger) -> None:
    assert ledger.next_sequence(RUN, "part-held", 0) == 0
    for sequence in (0, 5, 3):
        ledger.sign(held(sequence))
    assert ledger.next_sequence(RUN, "part-held", 0) == 6
    assert ledger.next_sequence(RUN, "part-held", 1) == 0
    assert ledger.next_sequence(RUN, "nonce-opening", 0) == 0
    assert ledger.next_sequence(OTHER_RUN, "part-held", 0) == 0


def test_records_are_numbered_as_they_are_signed(ledger: SigningLedger) -> None:
    ledger.sign(held(4))
    numbers = [ledger.sign_next(lambda sequence: held(sequence, 9)).open().sequence for _ in range(3)]
    assert numbers == [5, 6, 7]


def test_threads_share_a_ledger_without_signing_twice(ledger: SigningLedger) -> None:
    def sign_everything(_: int) -> list[Envelope]:
        return [ledger.sign(held(sequence)) for sequence in range(20)]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(sign_everything, range(2))
        numbered = pool.map(lambda _: ledger.sign_next(held).open().sequence, range(20))
        assert first == second
        assert sorted(numbered) == list(range(20, 40))


def test_of_two_threads_with_different_records_one_signs(tmp_path: Path) -> None:
    path = tmp_path / "signed.db"
    with SigningLedger(path, ALICE) as one, SigningLedger(path, ALICE) as two:

        def attempt(ledger: SigningLedger, sequence: int, what: int) -> Envelope | None:
            try:
                return ledger.sign(held(sequence, what))
            except EquivocationError:
                return None

        with ThreadPoolExecutor(2) as pool:
            for sequence in range(10):
                signed = list(pool.map(attempt, (one, two), (sequence, sequence), (1, 2)))
                assert signed.count(None) == 1
                assert one.find(RUN, "part-held", 0, sequence) in signed


SIGN_FOR_EVER = """
import sys
from pathlib import Path
from swarm_protocol.identity import Identity
from swarm_protocol.records import PartHeld
from swarm_protocol.signing import SigningLedger
ledger = SigningLedger(Path(sys.argv[1]), Identity.from_seed(bytes([3]) * 32))
while True:
    made = ledger.sign_next(lambda n: PartHeld(run=bytes([1]) * 32, round=0, sequence=n, part_record=bytes(32)))
    print(made.encode().hex(), flush=True)
"""


def test_whatever_left_a_process_that_was_killed_is_in_its_ledger(tmp_path: Path) -> None:
    path = tmp_path / "signed.db"
    left: list[Envelope] = []
    for lines in (1, 8, 27):
        with subprocess.Popen([sys.executable, "-c", SIGN_FOR_EVER, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            raw = b"".join(process.stdout.readline() for _ in range(lines))
            process.send_signal(signal.SIGKILL)
            raw += process.stdout.read()
        left += [Envelope.decode(bytes.fromhex(line)) for line in raw.decode().split("\n")[:-1]]
    with SigningLedger(path, ALICE) as ledger:
        for envelope in left:
            assert ledger.find(RUN, "part-held", 0, envelope.open().sequence) == envelope
        # A number once used is not used again: a kill can leave a signature that never left, but no gap and no repeat.
        numbers = [envelope.open().sequence for envelope in left]
        assert numbers == sorted(set(numbers))
        assert ledger.next_sequence(RUN, "part-held", 0) - len(left) in range(4)


def test_a_ledger_that_cannot_be_opened_or_written_says_which(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"this is no database, and long enough to be recognised as none" * 100)
    (tmp_path / "file").touch()
    for path in (damaged, tmp_path, tmp_path / "file" / "signed.db"):
        with pytest.raises(ConfigurationError, match=f"{path} cannot be opened"):
            SigningLedger(path, ALICE)
    path = tmp_path / "signed.db"
    with SigningLedger(path, ALICE) as ledger:
        other = sqlite3.connect(path)
        other.execute("DROP TABLE signed")
        other.close()
        with pytest.raises(ConfigurationError, match=f"{path} cannot be used"):
            ledger.sign(held(0))
