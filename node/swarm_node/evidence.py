"""What a node serves to others: evidence of its contributions, encoded parts and averages, each by its hash.

trace {round}    the state roots behind the trace root of our commitment
state {root}     the chunk hashes behind a state root, the newest two checkpoints' as well
get   {hash}     a chunk of a state, an encoded part (ours, or one that we reduced), an average or sketches of a round, a
              shard of the data; an average that we made comes with our part record, in the answer's header as `record`
"""

from __future__ import annotations

import asyncio
import mmap
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm_node.contribution import Contribution, load
from swarm_node.faults import NONE, Faults, Point
from swarm_node.folder import RunFolder
from swarm_protocol.calls import Answer, Bytes, Call, Handler
from swarm_protocol.chunks import CHUNK_BYTES, StateManifest, content_hash
from swarm_protocol.errors import RefusedError
from swarm_protocol.files import write_atomic
from swarm_protocol.merkle import DIGEST_BYTES
from swarm_protocol.records import Envelope, PartRecord
from swarm_protocol.spec import RunSpec

HELD_BYTES = 128 << 20
CHECKPOINTS = -1, -2
"""Under what the newest checkpoint and the one before are indexed, which belong to no round's evidence."""


def is_wanted(detail: dict[str, Any], peer: str) -> bool:
    """Whether auditors may still ask a node for what it keeps of a round.

    That is: for the states of its own contribution, or for inputs and receipts of any average, which all nodes of the round
    have, so that no reducer can hide by serving nothing.

    Args:
        detail: the API's `RoundDetail`.
        peer: the node's PeerID.
    """
    mine = [seat["audit"] for seat in detail["roster"] if seat["peer"] == peer]
    return "pending" in mine or any(record["audit"] == "pending" for record in detail["part_records"])


@dataclass(frozen=True)
class _Piece:
    """Where the bytes of a hash lie: in a file, or, until they are written there, in memory, ours or borrowed."""

    path: Path
    offset: int
    size_bytes: int
    held: Bytes | None = None
    borrowed: memoryview | None = None

    def read(self, digest: bytes) -> Bytes | None:
        """The bytes; None where whoever lent them has changed them."""
        if self.held is not None:
            return self.held
        if self.borrowed is not None:
            copy = bytes(self.borrowed)
            return copy if content_hash(copy) == digest else None
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size_bytes)

    def view(self, digest: bytes) -> memoryview | None:
        """As `read`, but where they lie in a file of their own, that is mapped instead of read."""
        if self.held is not None or self.borrowed is not None or self.offset or not self.size_bytes:
            found = self.read(digest)
            return None if found is None else memoryview(found)
        with self.path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), self.size_bytes, access=mmap.ACCESS_READ))


class Evidence:
    """An index of everything on disk that others may ask for.

    What is passed on in an exchange is held in memory, up to `held_bytes` in all, and written when there is time for it,
    as is what was borrowed: call `write` before its lender changes it. The folder `shards` holds files named by their hash.
    """

    def __init__(self, faults: Faults = NONE, *, held_bytes: int = HELD_BYTES, shards: Path | None = None) -> None:
        self._faults = faults
        self._shards = shards
        self._room_bytes = held_bytes
        self._lock = threading.Lock()
        self._pieces: dict[int, dict[bytes, _Piece]] = {}
        self._states: dict[int, dict[bytes, StateManifest]] = {}
        self._traces: dict[int, tuple[bytes, ...]] = {}
        self._vouched: dict[int, dict[bytes, bytes]] = {}

    @property
    def handlers(self) -> dict[str, Handler]:
        return {"trace": self._trace, "state": self._state, "get": self._get}

    def restore(self, spec: RunSpec, folder: RunFolder) -> None:
        """Index what an earlier process left on disk."""
        for round_number in folder.rounds():
            work = folder.work(round_number)
            contribution = load(spec, work)
            if contribution is not None:
                self.add(round_number, contribution)
            for path in [*work.glob("average-*"), *work.glob("input-*"), *work.glob("sketches-*")]:
                self.add_piece(round_number, bytes.fromhex(path.name.rsplit("-", 1)[1]), path)

    def add(self, round_number: int, contribution: Contribution) -> None:
        pieces = self._pieces.setdefault(round_number, {})
        states = self._states.setdefault(round_number, {})
        for segment, manifest in enumerate(contribution.states):
            path = contribution.state_path(segment)
            if path.exists():
                for index, digest in enumerate(manifest.hashes):
                    pieces[digest] = _Piece(path, index * CHUNK_BYTES, manifest.chunk_size(index))
                states[manifest.root] = manifest
        for part, digest in enumerate(contribution.part_hashes):
            path = contribution.part_path(part)
            pieces[digest] = _Piece(path, 0, path.stat().st_size)
        self._traces[round_number] = contribution.state_roots

    def hold(self, checkpoint: StateManifest, path: Path) -> None:
        """Serve a checkpoint that lies in this file, and the one before for as long as its file is there."""
        newest, before = CHECKPOINTS
        if checkpoint.root not in self._states.get(newest, {}):
            self._pieces[before] = self._pieces.get(newest, {})
            self._states[before] = self._states.get(newest, {})
        self._pieces[newest] = {
            digest: _Piece(path, index * CHUNK_BYTES, checkpoint.chunk_size(index))
            for index, digest in enumerate(checkpoint.hashes)
        }
        self._states[newest] = {checkpoint.root: checkpoint}

    def add_piece(self, round_number: int, digest: bytes, path: Path) -> None:
        """Serve a file by its hash for as long as that round is kept."""
        self._pieces.setdefault(round_number, {})[digest] = _Piece(path, 0, path.stat().st_size)

    def keep(self, round_number: int, digest: bytes, data: Bytes, path: Path) -> None:
        """Have these bytes: in memory while there is room, and in the file `path` sooner or later. Blocking."""
        with self._lock:
            room = len(data) <= self._room_bytes
            self._room_bytes -= len(data) if room else 0
        if not room:
            write_atomic(path, data, durable=False)
        piece = _Piece(path, 0, len(data), data if room else None)
        self._pieces.setdefault(round_number, {})[digest] = piece

    def borrow(self, round_number: int, digest: bytes, data: memoryview, path: Path) -> None:
        """Serve bytes that somebody else keeps in memory, as long as they are those of the hash."""
        self._pieces.setdefault(round_number, {})[digest] = _Piece(path, 0, len(data), borrowed=data)

    def vouch(self, record: PartRecord, envelope: Envelope) -> None:
        """Serve the average that our record names together with the record."""
        self._vouched.setdefault(record.round, {})[record.result] = envelope.encode()

    def write(self) -> None:
        """Write to disk whatever is in memory only. Blocking."""
        for pieces in list(self._pieces.values()):
            for digest, piece in list(pieces.items()):
                if piece.held is None and piece.borrowed is None:
                    continue
                data = piece.read(digest)
                if data is None:
                    del pieces[digest]
                    continue
                write_atomic(piece.path, data, durable=False)
                pieces[digest] = _Piece(piece.path, 0, piece.size_bytes)
                if piece.held is not None:
                    with self._lock:
                        self._room_bytes += piece.size_bytes

    def has(self, digest: bytes) -> bool:
        """Whether the bytes of a hash are to be had here."""
        return self._piece(digest) is not None

    def find(self, digest: bytes) -> Bytes | None:
        """The bytes of a hash, if they are here."""
        piece = self._piece(digest)
        return None if piece is None else piece.read(digest)

    def view(self, digest: bytes) -> memoryview | None:
        """As `find`, without reading a file into memory."""
        piece = self._piece(digest)
        return None if piece is None else piece.view(digest)

    def _piece(self, digest: bytes) -> _Piece | None:
        return next((pieces[digest] for pieces in list(self._pieces.values()) if digest in pieces), None)

    def narrow(self, round_number: int, contribution: Contribution, segments: Collection[int]) -> None:
        """Once it is known what an audit will ask for: delete the states at the ends of all other segments. Blocking."""
        for segment, manifest in enumerate(contribution.states):
            if segment not in segments:
                self._states.get(round_number, {}).pop(manifest.root, None)
                contribution.state_path(segment).unlink(missing_ok=True)

    def forget(self, rounds: Iterable[int]) -> None:
        """Serve nothing of these rounds any more."""
        self.write()
        for round_number in rounds:
            for index in (self._pieces, self._states, self._traces, self._vouched):
                index.pop(round_number, None)

    async def _trace(self, call: Call) -> Answer:
        roots = self._traces.get(int(call.header["round"]))
        if roots is None:
            raise RefusedError("no contribution of that round is kept here")
        return Answer(body=b"".join(roots))

    async def _state(self, call: Call) -> Answer:
        root = call.header["root"]
        for manifests in self._states.values():
            if root in manifests:
                return Answer(body=manifests[root].encode())
        raise RefusedError("no such state is kept here")

    async def _get(self, call: Call) -> Answer:
        digest = call.header["hash"]
        try:
            data = await asyncio.to_thread(self._anything, digest) if isinstance(digest, bytes) else None
        except OSError as error:
            raise RefusedError("it is no longer kept here") from error
        if data is None:
            raise RefusedError("nothing of that hash is kept here")
        records = [vouched[digest] for vouched in self._vouched.values() if digest in vouched]
        header = {"record": records[-1]} if records else {}
        if self._is_average(digest):
            data = self._faults.tamper(Point.SERVING, max(self._pieces), data)
        return Answer(header, data)

    def _anything(self, digest: bytes) -> Bytes | None:
        found = self.find(digest)
        if found is not None or self._shards is None or len(digest) != DIGEST_BYTES:
            return found
        paths = (self._shards / digest.hex(), self._shards / f"manifest-{digest.hex()}")
        return next((path.read_bytes() for path in paths if path.exists()), None)

    def _is_average(self, digest: bytes) -> bool:
        found = [pieces[digest] for pieces in self._pieces.values() if digest in pieces]
        return any(piece.path.name.startswith("average-") for piece in found)
