"""Deleting from the object store what nothing needs any more, by what the run's records say (`retention` decides).

The checkpoint worker does it after each round. It reads the database and writes nothing there. Manifests of checkpoints go
before their chunks, so that who reads one that is going is told so; whatever breaks off is done the next time. What nothing
accounts for may be somebody's work in progress, and goes when it is old.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from sqlalchemy import select
from sqlalchemy.orm import Session

from swarm_coordinator import kept_evidence
from swarm_coordinator.db.archive import Archive
from swarm_coordinator.db.engine import open_database
from swarm_coordinator.db.tables import AuditRow, RoundRow
from swarm_coordinator.retention import Live, Sealed, garbage
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.store import Store
from swarm_protocol import encoding
from swarm_protocol.chunks import MAX_STATE_BYTES, StateManifest, content_hash
from swarm_protocol.data import DatasetManifest
from swarm_protocol.layout import layout_hash
from swarm_protocol.records import Envelope, PartRecord, Record, Sketches, parse
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

GRACE_S = 900.0
"""How old something has to be that nothing accounts for, before it goes."""

SHARE = 0.05
"""Of the time at most, that is spent on looking for garbage."""


@dataclass(frozen=True)
class Collected:
    """What went: checkpoints that are not kept whole any more, and blobs."""

    states: int = 0
    blobs: int = 0


class Collector:
    """One run's garbage collection. All of it blocks.

    Args:
        live: what the records say now; see `Records.live`.
    """

    def __init__(self, spec: RunSpec, store: Store, live: Callable[[], Live], *, grace_s: float = GRACE_S) -> None:
        self._spec = spec
        self._store = store
        self._live = live
        self._grace_s = grace_s
        self._manifests: dict[bytes, StateManifest] = {}
        self._due_s = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time to look again: a large store takes long to list."""
        return time.monotonic() >= self._due_s

    def collect(self, busy: Collection[bytes] = ()) -> Collected:
        """Delete what may go, but for the checkpoints whose roots are in `busy`."""
        started_s = time.monotonic()
        try:
            return self._collect(frozenset(busy))
        finally:
            now_s = time.monotonic()
            self._due_s = now_s + (now_s - started_s) / SHARE

    def _collect(self, busy: frozenset[bytes]) -> Collected:
        if not self._store.claim(self._spec.run_id):
            log.warning("the object store is that of several runs: nothing in it is deleted")
            return Collected()
        blobs, listed = self._store.blobs(), self._store.states()
        fixed = fixed_blobs(self._spec, self._store)
        if fixed is None:
            log.warning("the dataset's manifest is not in the object store: nothing is deleted")
            return Collected()
        live = self._live()
        old_s = time.time() - self._grace_s
        states = {root: manifest for root in listed if (manifest := self._manifest(root)) is not None}
        young = {root for root, found in listed.items() if found.written_s > old_s and root not in set(live.roots)}
        live = replace(live, states=live.states | busy | young, blobs=live.blobs | fixed)
        go = garbage(self._spec.rounds, live, states, blobs.keys())
        self._store.delete_states(go.states)
        for root in go.states:
            self._manifests.pop(root, None)
        leftovers = [digest for digest in go.others if blobs[digest].written_s <= old_s]
        deleted = self._store.delete_blobs([*go.chunks, *leftovers])
        if go.states or deleted:
            log.info("%d checkpoints are no longer kept whole, %d blobs were deleted", len(go.states), deleted)
        return Collected(len(go.states), deleted)

    def _manifest(self, root: bytes) -> StateManifest | None:
        if root not in self._manifests:
            raw = self._store.get_checkpoint(root)
            if raw is None:
                return None
            self._manifests[root] = StateManifest.decode(raw, max_size_bytes=MAX_STATE_BYTES)
        return self._manifests[root]


def fixed_blobs(spec: RunSpec, store: Store) -> frozenset[bytes] | None:
    """What the run needs from its beginning to its end; None if it cannot be said, because the dataset is not there."""
    raw = store.get(bytes.fromhex(spec.data.root))
    if raw is None:
        return None
    dataset = DatasetManifest.decode(raw)
    names = [spec.data.root, spec.audit.tolerance_file, None if spec.data.tokenizer == "bytes" else spec.data.tokenizer]
    found = {bytes.fromhex(name) for name in names if name is not None}
    return frozenset({*found, layout_hash(spec), *(digest for digest, _ in (*dataset.train, *dataset.held_out))})


class Records:
    """What a run's database says of its objects. Sealed rounds do not change, and are looked up once."""

    def __init__(self, home: RunDirectory) -> None:
        self._spec = home.spec()
        self._ancestors = frozenset(content_hash(ancestor.spec) for ancestor in home.ancestors())
        self._engine = open_database(home.database_url())
        self._sealed: list[Sealed] = []

    def close(self) -> None:
        self._engine.dispose()

    def live(self) -> Live:
        """What is needed now."""
        with Session(self._engine) as session:
            archive = Archive(session, self._spec.run_id)
            planned = session.scalars(select(RoundRow).filter_by(run=archive.run).order_by(RoundRow.round)).all()
            sealed = [row for row in planned if row.root is not None]
            self._sealed += [_sealed(archive, row) for row in sealed[len(self._sealed) :]]
            audited = frozenset(
                session.scalars(select(AuditRow.round).filter_by(run=archive.run, outcome=None).distinct())
            )
            recent = range(max(0, len(sealed) - self._spec.rounds.keep_rounds), len(planned))
            states, blobs = pinned(session, self._spec)
            blobs = blobs.union(self._ancestors, *(_of_round(archive, number) for number in {*recent, *audited}))
            return Live(bytes.fromhex(self._spec.checkpoint), tuple(self._sealed), audited, states, blobs)


def pinned(session: Session, spec: RunSpec) -> tuple[frozenset[bytes], frozenset[bytes]]:
    """Roots of checkpoints and hashes of blobs that are kept whatever the rounds say: the trunk, archived evidence."""
    states = kept_evidence.checkpoints(session, spec.run_id)
    if spec.trunk is not None:
        states.add(bytes.fromhex(spec.trunk))
    return frozenset(states), frozenset(kept_evidence.objects(session, spec.run_id))


def _sealed(archive: Archive, row: RoundRow) -> Sealed:
    assert row.root is not None
    assert row.parts is not None
    parts = encoding.decode(row.parts, max_bytes=len(row.parts))
    assert isinstance(parts, list)
    named = archive.envelopes({name for name in parts if isinstance(name, bytes)})
    return Sealed(row.root, frozenset(_results(map(_opened, named.values()))))


def _of_round(archive: Archive, number: int) -> set[bytes]:
    """All that was published in a round: averages, and sketches."""
    return set(
        _results(map(_opened, (row.envelope for row in archive.of_round((PartRecord.kind, Sketches.kind), number))))
    )


def _opened(envelope: bytes) -> Record:
    return parse(Envelope.decode(envelope).body)


def _results(records: Iterable[Record]) -> Iterable[bytes]:
    for record in records:
        if isinstance(record, PartRecord):
            yield record.result
        elif isinstance(record, Sketches):
            yield record.blob
