"""Whatever is deleted from the object store, every round's checkpoint can still be made, to the last bit."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm_coordinator import collecting, retention
from swarm_coordinator.collecting import Collector, Records
from swarm_coordinator.retention import Live, Sealed
from swarm_coordinator.store import Store
from swarm_protocol import chunks
from swarm_protocol.catching_up import CatchUp
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import StateManifest, content_hash
from swarm_protocol.data import DatasetManifest, Shard
from swarm_protocol.errors import RefusedError
from swarm_protocol.layout import layout, layout_hash
from swarm_protocol.records import Outcome, PartRecord

MakeChain = Callable[..., Any]
SHARDS = b"shard one", b"held out"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that checkpoints of a tiny model consist of several, some of which they share."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 12)


class Kept:
    """A chain whose bytes are in an object store, and what happens to it."""

    def __init__(self, chain: Any, folder: Path) -> None:
        self.chain = chain
        self.store = Store(folder)
        shards = [Shard(content_hash(one), 1 << 10) for one in SHARDS]
        dataset = DatasetManifest("bytes", 256, 1 << 10, (shards[0],), (shards[1],))
        data = chain.spec.data.model_copy(update={"root": dataset.root.hex()})
        chain.spec = chain.spec.model_copy(update={"data": data})
        for blob in (*SHARDS, dataset.encode(), layout(chain.spec)):
            self.store.put(content_hash(blob), blob)
        self.audited: set[int] = set()
        self.busy: set[bytes] = set()
        self.collector = Collector(chain.spec, self.store, self.live, grace_s=-60.0)
        self.put(0)

    def put(self, number: int) -> None:
        self.store.put_state(*self.chain.checkpoints[number].buffers)

    def seal(self, missing: set[int], seed: int) -> None:
        number = len(self.chain.rounds)
        self.chain.seal(missing, seed)
        for digest in self.chain.results(number):
            self.store.put(digest, self.chain.blobs[digest])
        self.store.put(content_hash(b"lost %d" % number), b"lost %d" % number)
        self.put(number + 1)

    def live(self) -> Live:
        rounds = [
            Sealed(sealed.manifest.root, frozenset(self.chain.results(number)))
            for number, (_, sealed) in enumerate(self.chain.rounds)
        ]
        return Live(self.chain.checkpoints[0].root, rounds, frozenset(self.audited))

    def rebuilt(self, number: int) -> Checkpoint:
        """A checkpoint from nothing but what is in the store."""
        self.chain.whole = set(self.store.states())
        catching_up = CatchUp(self.chain, whole=self._whole, find=self.store.get)
        return asyncio.run(catching_up.checkpoint(number, self.chain.checkpoints[number].root))

    async def _whole(self, number: int, root: bytes) -> Checkpoint:
        raw = self.store.get_checkpoint(root)
        pieces = [] if raw is None else map(self.store.get, StateManifest.decode(raw, max_size_bytes=1 << 20).hashes)
        found = [piece for piece in pieces if piece is not None]
        if raw is None or len(found) != len(StateManifest.decode(raw, max_size_bytes=1 << 20).hashes):
            raise RefusedError("not here")
        return Checkpoint.from_bytes(self.chain.spec, number, b"".join(found), root)

    def whole(self) -> set[int]:
        there = self.store.states()
        return {number for number, one in enumerate(self.chain.checkpoints) if one.root in there}


@pytest.fixture
def kept(make_chain: MakeChain, tmp_path: Path) -> Kept:
    return Kept(make_chain(keep_rounds=2, snapshot_every=4), tmp_path / "objects")


@pytest.fixture(scope="module")
def fast_folder() -> Iterator[Path]:
    """In memory where that is to be had: a thousand small files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


class Interrupted(Exception):  # noqa: N818
    """The process was killed."""


histories = st.lists(
    st.one_of(
        st.tuples(st.just("seal"), st.sets(st.integers(0, 2)), st.integers(0, 3)),
        st.tuples(st.just("audit"), st.integers(0, 10)),
        st.tuples(st.just("over"), st.integers(0, 10)),
        st.tuples(st.just("collect"), st.none() | st.integers(0, 6)),
        st.tuples(st.just("lose"), st.integers(0, 50)),
    ),
    min_size=6,
    max_size=16,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=histories, every=st.integers(1, 5), keep=st.integers(1, 3))
def test_after_any_history_every_checkpoint_can_still_be_made(
    make_chain: MakeChain, fast_folder: Path, history: list[Any], every: int, keep: int
) -> None:
    with tempfile.TemporaryDirectory(dir=fast_folder) as folder:
        kept = Kept(make_chain(keep_rounds=keep, snapshot_every=every), Path(folder))
        lost: set[int] = set()
        for what, *details in [*history, ("collect", None)]:
            if what == "seal":
                kept.seal(*details)
            elif what == "audit":
                kept.audited.add(details[0])
            elif what == "over":
                kept.audited.discard(details[0])
            elif what == "lose":  # a disk fault: what cannot be made now need not be made later
                blobs = sorted(kept.store.blobs())
                kept.store.delete_blobs([blobs[details[0] % len(blobs)]])
                lost = {number for number in range(len(kept.chain.checkpoints)) if not makes(kept, number)}
            else:
                collect(kept, interrupted_after=details[0])
        for number in range(len(kept.chain.checkpoints)):
            assert number in lost or makes(kept, number), number


def makes(kept: Kept, number: int) -> bool:
    try:
        return kept.rebuilt(number).root == kept.chain.checkpoints[number].root
    except RefusedError:
        return False


def collect(kept: Kept, interrupted_after: int | None) -> None:
    """Collect, and be killed after so many deletions."""
    if interrupted_after is None:
        kept.collector.collect()
        return
    left, delete = interrupted_after, kept.store._delete

    def counted(paths: list[str]) -> None:
        nonlocal left
        for path in paths:
            if left == 0:
                raise Interrupted
            left -= 1
            delete([path])

    kept.store._delete = counted  # type: ignore[method-assign,assignment]
    try:
        kept.collector.collect()
    except Interrupted:
        pass
    finally:
        kept.store._delete = delete  # type: ignore[method-assign]


def test_snapshots_and_the_newest_are_kept_whole(kept: Kept) -> None:
    for number in range(10):
        kept.seal({number % 3}, 0)
    kept.collector.collect()
    assert kept.whole() == {0, 4, 8, 9, 10}
    kept.audited = {3}
    kept.put(3)
    kept.seal(set(), 0)
    kept.collector.collect()
    assert kept.whole() == {0, 3, 4, 8, 9, 10, 11}
    needed = {digest for number in range(11) for digest in kept.chain.results(number)}
    needed |= {digest for number in kept.whole() for digest in kept.chain.checkpoints[number].manifest.hashes}
    needed |= {content_hash(one) for one in SHARDS} | {bytes.fromhex(kept.chain.spec.data.root)}
    assert set(kept.store.blobs()) == needed | {layout_hash(kept.chain.spec)}


def test_what_nothing_accounts_for_goes_when_it_is_old(kept: Kept) -> None:
    kept.collector = Collector(kept.chain.spec, kept.store, kept.live)
    work = b"somebody's work in progress"
    kept.store.put(content_hash(work), work)
    state = kept.store.put_state(b"a checkpoint that is not sealed yet" * 1000)
    for _ in range(9):
        kept.seal(set(), 0)
    kept.collector.collect()
    assert kept.store.exists(content_hash(work))
    assert all(map(kept.store.exists, state.hashes))
    assert kept.whole() == {0, 4, 7, 8, 9}  # these are accounted for, and go at once
    Collector(kept.chain.spec, kept.store, kept.live, grace_s=-60.0).collect()
    assert not kept.store.exists(content_hash(work))
    assert not any(map(kept.store.exists, state.hashes))
    assert not kept.store.whole([state.root])


def test_what_is_put_while_it_is_being_deleted_stays(kept: Kept) -> None:
    for number in range(9):
        kept.seal({number % 3}, 0)
    again = kept.chain.checkpoints[3]
    live = kept.live

    def put_meanwhile() -> Live:
        kept.store.put_state(*again.buffers)
        return live()

    Collector(kept.chain.spec, kept.store, put_meanwhile, grace_s=-60.0).collect()
    assert all(map(kept.store.exists, again.manifest.hashes))


def test_checkpoints_that_somebody_works_on_stay(kept: Kept) -> None:
    for number in range(9):
        kept.seal({number % 3}, 0)
    kept.collector.collect(busy=[kept.chain.checkpoints[5].root])
    assert kept.whole() == {0, 4, 5, 7, 8, 9}


def test_a_store_of_several_runs_is_left_alone(kept: Kept) -> None:
    for _ in range(9):
        kept.seal(set(), 0)
    assert kept.store.claim(kept.chain.spec.run_id)
    assert not kept.store.claim(b"x" * 32)
    assert kept.collector.collect() == collecting.Collected()
    assert kept.whole() == set(range(10))
    assert not kept.store.claim(kept.chain.spec.run_id)


def test_without_the_dataset_nothing_is_deleted(kept: Kept) -> None:
    for _ in range(9):
        kept.seal(set(), 0)
    kept.store.delete_states([])
    kept.store.blobs()
    kept.store.delete_blobs([bytes.fromhex(kept.chain.spec.data.root)])
    assert kept.collector.collect() == collecting.Collected()
    assert kept.whole() == set(range(10))


def test_a_checkpoint_that_nothing_could_make_again_is_kept() -> None:
    rounds = [Sealed(bytes([number]) * 32, frozenset({bytes([100 + number]) * 32})) for number in range(1, 8)]
    live = Live(bytes(32), rounds)
    roots = live.roots
    blobs = {*roots, *(average for one in rounds for average in one.averages)}
    states = {root: StateManifest(1, (root,)) for root in roots}
    spec = retention.RoundsSpec(keep_rounds=1, snapshot_every=10)
    assert retention.kept(spec, live, states, blobs) == {roots[0], roots[6], roots[7]}
    assert retention.kept(spec, live, states, blobs - rounds[2].averages) == {roots[0], roots[3], roots[6], roots[7]}
    assert retention.kept(spec, live, states, blobs - {roots[0]}) == {roots[0], roots[1], roots[6], roots[7]}


def test_the_records_say_what_is_live(stage: Any) -> None:
    stage.play(0)
    cast = stage.cast
    records = Records(cast.home)
    try:
        live = records.live()
        assert live.roots == [bytes.fromhex(cast.spec.checkpoint), bytes([50]) * 32]
        results = {one.open_as(PartRecord, run=cast.run).result for one in stage.averages}
        assert live.rounds[0].averages == results
        assert live.audited == {0}
        for slot in range(5):
            stage.judge(slot, Outcome.ACCEPTED, Outcome.ACCEPTED)
        for part in range(2):
            stage.judge_average(part, Outcome.ACCEPTED, Outcome.ACCEPTED)
        stage.play(1)
        live = records.live()
        assert len(live.rounds) == 2
        assert live.rounds[1].averages.isdisjoint(results)
        assert live.blobs >= results
    finally:
        records.close()
