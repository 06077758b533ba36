"""The checkpoint that a node holds: loaded from its disk, or fetched from everybody who has it, kept, served, announced.

A checkpoint is a file of its own, mapped into memory, under its root; the newest two are served, and of one that is
being downloaded what is there already. A node that missed rounds takes their averages, or a checkpoint whole, whichever is
fewer bytes. The trunk, where the run has one, is fetched and served alike. Nothing here waits for others who are away:
whoever calls repeats what raised `UnreachableError`, and a download goes on where it was, after a crash as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from swarm_node.evidence import Evidence
from swarm_node.faults import NONE, Faults, Point
from swarm_node.folder import RunFolder
from swarm_protocol import checkpoint as checkpoints
from swarm_protocol import fetch as fetches
from swarm_protocol.calls import Answer, Call, Handler
from swarm_protocol.catching_up import CatchUp
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import StateManifest
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.dht import HOLDING_TTL_S
from swarm_protocol.download import ChunkDesk, CoordinatorSource, Download, Held, Partial, PeerSource, StateFile
from swarm_protocol.errors import InvalidDataError, RefusedError, UnreachableError
from swarm_protocol.identity import public_key_of
from swarm_protocol.peers import PeerPlane
from swarm_protocol.records import Holding
from swarm_protocol.signing import SigningLedger
from swarm_protocol.throttle import TokenBucket

log = logging.getLogger(__name__)

PEERS_ASKED = 8
KEPT = 2
SLOWEST_BYTES_PER_S = 1e5


class CheckpointKeeper:
    """One node's checkpoint in one run. `current` is the newest one held, None until there is one."""

    def __init__(
        self,
        client: CoordinatorClient,
        plane: PeerPlane,
        ledger: SigningLedger,
        folder: RunFolder,
        evidence: Evidence,
        *,
        say: Callable[[str], None],
        fetching: Callable[[int], None],
        limit: TokenBucket | None = None,
        faults: Faults = NONE,
    ) -> None:
        self._client = client
        self._spec = client.spec
        self._plane = plane
        self._ledger = ledger
        self._folder = folder
        self._evidence = evidence
        self._catching_up = CatchUp(client, plane, whole=self.fetch, find=evidence.find)
        self._say = say
        self._fetching = fetching
        self._limit = limit
        self._faults = faults
        self._states: dict[bytes, StateFile] = {}
        self._trunk: StateFile | None = None
        self._download: tuple[int, bytes, Download[Partial]] | None = None
        self._banned: set[bytes] = set()
        self._changed = asyncio.Event()
        self._desk = ChunkDesk(self._find, self._backlog_s)
        self.current: Checkpoint | None = None

    @property
    def handlers(self) -> dict[str, Handler]:
        return {**self._desk.handlers, "chunks": self._chunks}

    async def restore(self) -> None:
        """Hold what an earlier process left on disk, if it is whole."""
        found = await asyncio.to_thread(self._folder.load_checkpoint)
        if found is not None:
            self.current, self._states[found[0].root] = found
            self._evidence.hold(found[1].manifest, self._folder.checkpoint_path(found[0].root))

    async def catch_up(self) -> Checkpoint:
        """Hold the newest sealed checkpoint.

        Raises:
            UnreachableError, RefusedError, InvalidDataError
            ConfigurationError: there is no room for it on this disk.
        """
        round_number, root = await self._client.latest_checkpoint()
        held = self.current
        if held is None or held.round < round_number or (held.round == round_number and held.root != root):
            self._fetching(round_number)
            try:
                held = await self._catching_up.checkpoint(round_number, root, held)
            except RefusedError as error:
                if error.status != 404:
                    raise
                raise UnreachableError(f"checkpoint {round_number} is not to be had now: {error}") from error
            await self.hold(held)
            how = self._catching_up.how
            self._say(f"Fetched checkpoint {round_number} ({root.hex()[:12]}), every chunk verified: {how}.")
        return held

    async def fetch(self, round_number: int, root: bytes) -> Checkpoint:
        """Download a checkpoint by its root, from peers who have it and from the coordinator. Raises as `catch_up` does."""
        size, path = checkpoints.size_bytes(self._spec), self._folder.checkpoint_path(root)
        whole = await self._whole(root, size, path, round_number)
        self._states[root] = StateFile(whole.data, whole.manifest)
        return Checkpoint.from_verified(self._spec, round_number, whole.data, whole.manifest)

    async def trunk(self) -> fetches.Float32 | None:
        """The run's trunk, if it has one, from our disk or as `fetch` does; served from now on. Raises as `catch_up` does."""
        found = await fetches.trunk(self._client, self._folder.root, self._whole)
        if found is not None:
            path = fetches.trunk_path(self._spec, self._folder.root)
            self._trunk = await asyncio.to_thread(StateFile.open, path)
            self._changed.set()
        return found

    async def _whole(self, root: bytes, size: int, path: Path, round_number: int = 0) -> Partial:
        """A state, downloaded into a file from peers who have it and from the coordinator."""
        unfinished = self._folder.download_path(root)

        def begin(manifest: StateManifest) -> Partial:
            return Partial(manifest, unfinished)

        download = Download(
            root, size, [*await self._peers(root), CoordinatorSource(self._client)], begin,
            banned=self._banned, more=lambda: self._peers(root), limit=self._limit,
        )  # fmt: skip
        self._download = round_number, root, download
        self._changed.set()
        try:
            whole = await download.run()
            await asyncio.to_thread(whole.finish, path)
        finally:
            self._download = None
            if download.sink is not None:
                download.sink.close()
        log.info("state %s came from %s", root.hex()[:12], download.bytes_by_source)
        return whole

    async def hold(self, checkpoint: Checkpoint) -> None:
        """Keep this one from now on, on disk as well."""
        await asyncio.to_thread(self._keep, checkpoint)
        self._evidence.hold(checkpoint.manifest, self._folder.checkpoint_path(checkpoint.root))
        self.current = checkpoint
        self._changed.set()

    async def announce(self) -> None:
        """Say in the DHT what others can fetch here, whenever it changes and before it is forgotten; until cancelled.

        Not where nobody can reach us, or where a chunk would take others too long.
        """
        upload = self._plane.upload
        if not self._plane.reachable or (upload is not None and upload.rate_bytes_per_s < SLOWEST_BYTES_PER_S):
            return
        while True:
            self._changed.clear()
            announced = [] if self.current is None else [(self.current.round, self.current.root)]
            if self._download is not None:
                announced.append(self._download[:2])
            if self._trunk is not None:
                announced.append((0, self._trunk.manifest.root))
            for round_number, root in announced:
                try:
                    await self._announce(round_number, root)
                except UnreachableError as error:
                    log.info("nobody hears which checkpoint is here: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HOLDING_TTL_S / 3):
                    await self._changed.wait()

    async def _announce(self, round_number: int, root: bytes) -> None:
        def record(sequence: int) -> Holding:
            return Holding(run=self._spec.run_id, round=round_number, sequence=sequence, root=root)

        envelope = await asyncio.to_thread(self._ledger.sign_next, record)
        await self._plane.directory.hold(root, envelope)

    async def _peers(self, root: bytes) -> list[PeerSource]:
        """A few peers who say that they have this checkpoint; the run owner's own are a reserve."""
        owners = await self._owners()
        keys = await self._plane.directory.holders(root, PEERS_ASKED)
        return [PeerSource(self._plane, key, reserve=key in owners) for key in keys]

    async def _owners(self) -> set[bytes]:
        """The keys of the peers that the coordinator names as the way in."""
        try:
            addresses, _ = await self._client.peers()
            return {public_key_of(address.rpartition("/p2p/")[2]) for address in addresses}
        except (UnreachableError, RefusedError, InvalidDataError) as error:
            log.info("the coordinator does not say which peers are its own: %s", error)
            return set()

    def _keep(self, checkpoint: Checkpoint) -> None:
        state = self._states.pop(checkpoint.root, None)
        if state is None:
            self._folder.write_checkpoint(checkpoint)
            state = StateFile.open(self._folder.checkpoint_path(checkpoint.root), checkpoint.manifest)
        others = list(self._states.items())[1 - KEPT :]
        self._states = {**dict(others), checkpoint.root: state}
        self._folder.point_at(checkpoint, list(self._states))

    # Serving

    def _find(self, root: bytes) -> Held | None:
        if self._download is not None and self._download[1] == root:
            return self._download[2].sink
        if self._trunk is not None and self._trunk.manifest.root == root:
            return self._trunk
        return self._states.get(root)

    def _backlog_s(self) -> float:
        return 0.0 if self._plane.upload is None else self._plane.upload.backlog_s()

    async def _chunks(self, call: Call) -> Answer:
        answer = await self._desk.handlers["chunks"](call)
        if not self._faults.planned or self.current is None or call.header["root"] != self.current.root:
            return answer
        await self._faults.at(Point.SEEDING, self.current.round)
        return dataclasses.replace(
            answer, body=self._faults.tamper(Point.SEEDING, self.current.round, bytes(answer.body))
        )
