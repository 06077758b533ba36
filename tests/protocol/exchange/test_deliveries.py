"""What a reducer takes, and what it refuses: only what was committed to gets in, in time and from its holder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_node import exchange as exchanges
from swarm_node import reducing
from swarm_protocol import encoding
from swarm_protocol.calls import Call
from swarm_protocol.errors import RefusedError, SwarmError
from swarm_protocol.records import PartRecord

# hivemind's ways; see test_peers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

Begin = Callable[..., Any]

PARTS = 3
ROUND = 2


class Delivery:
    """A delivery from slot 1 to the reducer at slot 0, as it should be; every test spoils one thing."""

    def __init__(self, round: Any) -> None:
        self.round = round
        sender = round.nodes[1]
        self.header: dict[str, Any] = {
            "op": "deliver",
            "round": ROUND,
            "part": 1,
            "slot": 1,
            "proof": list(sender.mine.proof(1)),
        }
        self.body = sender.mine.part(1)

    def send(self, sender: int = 1) -> None:
        reducer = self.round.nodes[0]

        async def main() -> None:
            exchange = reducer.exchange()
            await reducer.desk.open(exchange)
            try:
                await self.round.nodes[sender].plane.call(
                    reducer.plane.identity.public_key, self.header, self.body, max_answer_bytes=0, timeout_s=10
                )
            finally:
                self.taken = list(exchange.reducer.tasks)
                await exchange.stop()
                await reducer.desk.open(None)

        self.round.swarm.run(main())


def test_a_delivery_as_it_should_be_is_taken(begin: Begin) -> None:
    delivery = Delivery(begin())
    delivery.send()
    assert delivery.taken == [1]


SPOILED: dict[str, tuple[str, Callable[[Delivery], object]]] = {
    "a byte changed": ("committed to", lambda d: setattr(d, "body", bytes([d.body[0] ^ 1]) + d.body[1:])),
    "another part's bytes": ("committed to|bytes was expected", lambda d: setattr(d, "body", d.round.nodes[1].mine.part(0))),
    "another slot's bytes": ("committed to", lambda d: setattr(d, "body", d.round.nodes[2].mine.part(1))),
    "another part's number": ("committed to|bytes was expected", lambda d: d.header.update(part=0)),
    "too short": ("bytes was expected", lambda d: setattr(d, "body", d.body[:-1])),
    "too long": ("bytes was expected", lambda d: setattr(d, "body", d.body + b"\0")),
    "empty": ("bytes was expected", lambda d: setattr(d, "body", b"")),
    "far too long": ("bytes was expected", lambda d: setattr(d, "body", bytes(1 << 24))),
    "another slot": ("somebody else", lambda d: d.header.update(slot=2)),
    "a slot without a commitment": ("no commitment", lambda d: d.header.update(slot=7)),
    "a negative slot": ("no commitment", lambda d: d.header.update(slot=-1)),
    "a part that is not there": ("no such part", lambda d: d.header.update(part=PARTS)),
    "a negative part": ("no such part", lambda d: d.header.update(part=-1)),
    "a proof of another part": ("committed to|Merkle", lambda d: d.header.update(proof=[*d.round.nodes[1].mine.proof(2)])),
    "a proof too short": ("Merkle proof", lambda d: d.header.update(proof=d.header["proof"][:-1])),
    "a proof too long": ("Merkle proof", lambda d: d.header.update(proof=[*d.header["proof"], bytes(32)])),
    "a proof of short digests": ("Merkle proof", lambda d: d.header.update(proof=[b"x"] * len(d.header["proof"]))),
    "a proof of numbers": ("list of digests", lambda d: d.header.update(proof=[1 << 40] * 2)),
    "a proof of text": ("list of digests", lambda d: d.header.update(proof=["x" * 32] * 2)),
    "a proof that is one digest": ("list of digests", lambda d: d.header.update(proof=bytes(64))),
    "no proof": ("proof", lambda d: d.header.pop("proof")),
    "no slot": ("slot", lambda d: d.header.pop("slot")),
    "a slot that is text": ("invalid literal", lambda d: d.header.update(slot="one")),
    "a slot that is a list": ("int", lambda d: d.header.update(slot=[1])),
    "a round that is over": ("is over", lambda d: d.header.update(round=ROUND - 1)),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILED)
def test_a_delivery_with_a_fault_is_refused(begin: Begin, fault: str) -> None:
    reason, spoil = SPOILED[fault]
    delivery = Delivery(begin())
    spoil(delivery)
    with pytest.raises(RefusedError, match=reason):
        delivery.send()
    assert delivery.taken == []


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def test_whatever_a_header_says_it_is_refused_or_it_is_right(begin: Begin) -> None:
    round = begin()
    reducer, sender = round.nodes[0], round.nodes[1]
    right = Delivery(round).header

    fields = st.sampled_from(["part", "slot", "proof", "round", "hash"])

    @given(header=st.dictionaries(fields, anything), body=st.binary(max_size=50))
    def deliver(header: dict[str, Any], body: bytes) -> None:
        async def receive(use: Callable[[bytes], object]) -> object:
            return use(body)

        async def main() -> None:
            exchange = reducer.exchange()
            call = Call(sender.plane.identity.public_key, {**right, **header}, len(body), receive)
            # What a call's dispatch turns into a refusal; anything else would be a fault of ours.
            with pytest.raises((SwarmError, KeyError, TypeError, ValueError)):
                await exchange.reducer.receive(call)
            assert not exchange.reducer.tasks

        round.swarm.run(main())

    deliver()


def test_a_part_is_taken_only_from_the_holder_of_its_slot(begin: Begin) -> None:
    delivery = Delivery(begin())
    with pytest.raises(RefusedError, match="somebody else"):
        delivery.send(sender=2)


def test_a_part_is_taken_only_by_its_reducers(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reducing, "PARTIAL_SHARES", (0.5,))
    round = begin()
    here = round.nodes[0].plane.identity.public_key
    elsewhere = [part for part in range(PARTS) if round.nodes[0].exchange().orders[part][0] != here]
    assert elsewhere
    delivery = Delivery(round)
    delivery.header.update(part=elsewhere[0], proof=list(round.nodes[1].mine.proof(elsewhere[0])))
    delivery.body = round.nodes[1].mine.part(elsewhere[0])
    with pytest.raises(RefusedError, match="reduced elsewhere"):
        delivery.send()


def test_an_early_delivery_waits_for_its_round_a_little(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "EARLY_S", 0.2)
    delivery = Delivery(begin())
    delivery.header.update(round=ROUND + 1)
    with pytest.raises(RefusedError, match="not open here"):
        delivery.send()

    round = begin()
    reducer, sender = round.nodes[0], round.nodes[1]
    monkeypatch.setattr(exchanges, "EARLY_S", 10.0)
    on_time = Delivery(round)

    async def early() -> None:
        calling = asyncio.create_task(
            sender.plane.call(
                reducer.plane.identity.public_key, on_time.header, on_time.body, max_answer_bytes=0, timeout_s=10
            )
        )
        await asyncio.wait([calling], timeout=0.05)
        assert not calling.done()
        exchange = reducer.exchange()
        await reducer.desk.open(exchange)
        await calling
        await exchange.stop()
        await reducer.desk.open(None)

    round.swarm.run(early())


def test_a_part_whose_record_is_signed_is_closed_from_the_start(begin: Begin) -> None:
    round = begin()
    reducer = round.nodes[0]
    reducer.ledger.sign(
        PartRecord(
            run=round.spec.run_id,
            round=ROUND,
            sequence=1,
            part=1,
            commitment_set=round.commitments.closing.hash,
            result=bytes(32),
            size_bytes=1,
            slots=(0,),
        )
    )
    delivery = Delivery(round)
    with pytest.raises(RefusedError, match="closed"):
        delivery.send()


def test_a_part_that_comes_after_its_average_is_refused(begin: Begin) -> None:
    round = begin(exchange_s=1.0)

    async def late() -> None:
        await round.published(PARTS)
        for node in round.nodes:
            record = next(
                envelope.open() for envelope in round.posted if envelope.key == node.plane.identity.public_key
            )
            assert isinstance(record, PartRecord)
            sender = round.nodes[1] if node is not round.nodes[1] else round.nodes[2]
            header: dict[str, encoding.Value] = {
                "op": "deliver",
                "round": ROUND,
                "part": record.part,
                "slot": sender.slot,
                "proof": list(sender.mine.proof(record.part)),
            }
            with pytest.raises(RefusedError, match="closed"):
                await sender.plane.call(
                    node.plane.identity.public_key,
                    header,
                    sender.mine.part(record.part),
                    max_answer_bytes=0,
                    timeout_s=5,
                )
            return

    round.go(0, until=late)


# Evidence


def test_parts_are_served_by_their_hash_and_nothing_else_is(begin: Begin) -> None:
    round = begin()
    node, asker = round.nodes[0], round.nodes[1]
    node.evidence.add(ROUND, node.mine)

    def get(digest: object) -> bytes:
        header: dict[str, Any] = {"op": "get", "hash": digest}
        key = node.plane.identity.public_key
        return round.swarm.run(asker.plane.call(key, header, max_answer_bytes=1 << 20, timeout_s=10))[1]

    assert get(node.mine.part_hashes[2]) == node.mine.part(2)
    for unknown in (bytes(32), b"", "text", 1, None, [bytes(32)]):
        with pytest.raises(RefusedError, match="nothing of that hash"):
            get(unknown)
    node.mine.part_path(2).unlink()
    with pytest.raises(RefusedError, match="no longer kept"):
        get(node.mine.part_hashes[2])
    node.evidence.forget([ROUND])
    with pytest.raises(RefusedError, match="nothing of that hash"):
        get(node.mine.part_hashes[1])
