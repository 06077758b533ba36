"""The checkpoint that a node holds: loaded from its disk, or fetched, every chunk verified, and kept for the next start.

A node that missed rounds takes their averages, or a checkpoint whole, whichever is fewer bytes. Others may ask for ours.
Nothing here waits for a coordinator that is away: whoever calls repeats what raised `UnreachableError`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from swarm_node.evidence import Evidence
from swarm_node.folder import RunFolder
from swarm_protocol import fetch
from swarm_protocol.catching_up import CatchUp
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.peers import PeerPlane


class CheckpointKeeper:
    """One node's checkpoint in one run. `current` is the newest one held, None until there is one."""

    def __init__(
        self,
        client: CoordinatorClient,
        plane: PeerPlane,
        folder: RunFolder,
        evidence: Evidence,
        *,
        say: Callable[[str], None],
        fetching: Callable[[int], None],
    ) -> None:
        self._client = client
        self._plane = plane
        self._folder = folder
        self._evidence = evidence
        self._catching_up = CatchUp(client, plane, whole=self.fetch, find=evidence.find)
        self._say = say
        self._fetching = fetching
        self.current: Checkpoint | None = None

    async def restore(self) -> None:
        """Hold what an earlier process left on disk, if it is whole."""
        self.current = await asyncio.to_thread(self._folder.load_checkpoint)
        self._serve()

    async def catch_up(self) -> Checkpoint:
        """Hold the newest sealed checkpoint.

        Raises:
            UnreachableError, RefusedError, InvalidDataError
        """
        round_number, root = await self._client.latest_checkpoint()
        held = self.current
        if held is None or held.round < round_number or (held.round == round_number and held.root != root):
            self._fetching(round_number)
            held = await self._catching_up.checkpoint(round_number, root, held)
            await self.hold(held)
            how = self._catching_up.how
            self._say(f"Fetched checkpoint {round_number} ({root.hex()[:12]}), every chunk verified: {how}.")
        return held

    async def fetch(self, round_number: int, root: bytes) -> Checkpoint:
        """Download a checkpoint by its root.

        Raises:
            UnreachableError, RefusedError, InvalidDataError
        """
        return await fetch.checkpoint(self._client, round_number, root)

    async def hold(self, checkpoint: Checkpoint) -> None:
        """Keep this one from now on, on disk as well."""
        await asyncio.to_thread(self._folder.save_checkpoint, checkpoint)
        self.current = checkpoint
        self._serve()

    def _serve(self) -> None:
        if self.current is not None:
            self._evidence.hold(self.current.manifest, self._folder.checkpoint_path(self.current.root))
