"""What a node serves by its hash: from memory while there is room, borrowed while it lasts, and from disk in the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm_node.evidence import Evidence
from swarm_protocol.chunks import content_hash

ONE, TWO = b"one" * 400, b"two" * 400


def test_what_fits_is_held_and_written_when_there_is_time(tmp_path: Path) -> None:
    evidence = Evidence(held_bytes=2000)
    for name, data in (("one", ONE), ("two", TWO)):
        evidence.keep(0, content_hash(data), data, tmp_path / name)
    assert [(tmp_path / name).exists() for name in ("one", "two")] == [False, True]
    evidence.write()
    assert (tmp_path / "one").read_bytes() == ONE
    evidence.keep(0, content_hash(b"three"), b"three", tmp_path / "three")
    assert not (tmp_path / "three").exists(), "what was written leaves room"
    assert [evidence.find(content_hash(data)) for data in (ONE, TWO, b"three", b"four")] == [ONE, TWO, b"three", None]


@pytest.mark.parametrize("written", [False, True])
def test_a_view_is_of_the_same_bytes_wherever_they_lie(tmp_path: Path, written: bool) -> None:
    evidence = Evidence()
    evidence.keep(0, content_hash(ONE), ONE, tmp_path / "one")
    evidence.borrow(0, content_hash(TWO), memoryview(TWO), tmp_path / "two")
    if written:
        evidence.write()
    for data in (ONE, TWO):
        found = evidence.view(content_hash(data))
        assert found is not None
        assert found == data
    evidence.forget([0])
    assert evidence.view(content_hash(ONE)) is None
    assert not evidence.has(content_hash(ONE))


def test_what_was_borrowed_is_served_as_long_as_it_is_unchanged(tmp_path: Path) -> None:
    evidence, lent, changed = Evidence(), bytearray(ONE), bytearray(TWO)
    evidence.borrow(0, content_hash(ONE), memoryview(lent), tmp_path / "lent")
    evidence.borrow(0, content_hash(TWO), memoryview(changed), tmp_path / "changed")
    changed[0] ^= 1
    assert evidence.find(content_hash(ONE)) == ONE
    assert evidence.find(content_hash(TWO)) is None
    evidence.write()
    lent[0] ^= 1
    assert evidence.find(content_hash(ONE)) == ONE, "the copy on disk stays"
    assert not evidence.has(content_hash(TWO))
    assert not (tmp_path / "changed").exists()
