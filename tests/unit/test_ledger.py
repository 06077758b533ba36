"""Amounts and balances of credit: exact, encoded in one way, under one root."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from swarm_protocol.errors import EncodingError
from swarm_protocol.identity import Identity
from swarm_protocol.ledger import Balance, fits, tree
from swarm_protocol.log import leaf_hash, verify_inclusion
from swarm_protocol.records import (
    MAX_MOVES,
    MAX_RECORD_BYTES,
    CreditEntry,
    CreditMove,
    CreditStatement,
    Envelope,
    Move,
)

BALANCES = [Balance(bytes([number]) * 32, pending=number, settled=1 << number, forfeited=3) for number in range(5)]


def test_balances_are_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    golden(
        "hashing",
        {
            "balance": BALANCES[3].encode().hex(),
            "balances root": tree(BALANCES).root().hex(),
        },
    )


def test_a_balance_is_read_as_it_was_written() -> None:
    for one in BALANCES:
        assert Balance.decode(one.encode()) == one


@pytest.mark.parametrize("data", [b"", b"\xa0", BALANCES[1].encode()[:-1], BALANCES[1].encode() + b"\0"])
def test_what_is_no_balance_is_refused(data: bytes) -> None:
    with pytest.raises(EncodingError):
        Balance.decode(data)


def test_the_order_in_which_balances_come_changes_no_root() -> None:
    assert tree(reversed(BALANCES)).root() == tree(BALANCES).root()
    proof = tree(BALANCES).inclusion_proof(3)
    verify_inclusion(leaf_hash(BALANCES[3].encode()), 3, 5, proof, tree(BALANCES).root())


def test_the_longest_statement_that_fits_is_a_record_that_may_be_sent() -> None:
    def statement(entries: list[int]) -> CreditStatement:
        entry = CreditEntry(round=(1 << 31) - 1, slot=9_999, megaflops=(1 << 62) - 1)
        return CreditStatement(
            run=b"r" * 32,
            round=3,
            sequence=1,
            checkpoint=b"c" * 32,
            moves=tuple(
                CreditMove(move=Move.FORFEITED, cause=b"x" * 32, entries=(entry,) * count) for count in entries
            ),
            balances=b"b" * 32,
            accounts=1 << 40,
        )

    few, many = [MAX_MOVES] * 3, [1] * 3855
    for entries in (few, many):
        assert fits(len(entries), sum(entries))
        assert len(entries) <= MAX_MOVES
        data = Envelope.sign(Identity.from_seed(b"s" * 32), statement(entries)).encode()
        assert len(data) < MAX_RECORD_BYTES
    assert not fits(4, 4 * MAX_MOVES)
    assert not fits(3856, 3856)
