"""A node's data directory: one identity, what it has signed, and per run its shards, its checkpoint and its work.

    DIR/identity                    the key file, mode 0600
    DIR/signed.db                   every record this identity ever signed
    DIR/trusted.json                coordinator keys by URL, pinned on first use
    DIR/status.json                 what the node is doing, for people and for `swarm-node demo`
    DIR/runs/RUN/shards/HASH        pieces of the corpus
    DIR/runs/RUN/checkpoint-ROOT    the newest checkpoint, with its round and root in checkpoint.json, and the one before
    DIR/runs/RUN/download-ROOT      a checkpoint that is being downloaded
    DIR/runs/RUN/round-N/           a contribution and its evidence; results of parts that this node reduced

Everything is written atomically, so that a crash at any point leaves a state that the next start understands.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from swarm_protocol import checkpoint as checkpoints
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.download import StateFile
from swarm_protocol.errors import ConfigurationError, HashMismatchError
from swarm_protocol.files import newest, remove_leftovers, write_atomic
from swarm_protocol.spec import RunSpec


class DataFolder:
    """The directory of one node; locked, so that no two processes use one identity."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigurationError(f"the data directory {root} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(
                f"another swarm-node uses {root}; stop it, or choose another place with --data-dir"
            ) from error
        remove_leftovers(root)

    @property
    def identity(self) -> Path:
        return self.root / "identity"

    @property
    def ledger(self) -> Path:
        return self.root / "signed.db"

    def run(self, spec: RunSpec) -> RunFolder:
        folder = RunFolder(self.root / "runs" / spec.run_id.hex()[:16], spec)
        remove_leftovers(folder.root)
        return folder

    def write_status(self, status: dict[str, Any]) -> None:
        write_atomic(self.root / "status.json", json.dumps(status).encode(), durable=False)

    def pinned_key(self, url: str) -> str | None:
        """The coordinator key (hex) that was trusted for this URL before."""
        key = self._trusted().get(url)
        return key if isinstance(key, str) else None

    def pin(self, url: str, key: str) -> None:
        write_atomic(self.root / "trusted.json", json.dumps({**self._trusted(), url: key}, indent=1).encode())

    def _trusted(self) -> dict[str, Any]:
        path = self.root / "trusted.json"
        if not path.exists():
            return {}
        try:
            value = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigurationError(f"{path} is not JSON; correct it, or delete it to trust anew") from error
        return value if isinstance(value, dict) else {}


class RunFolder:
    """What a node keeps of one run."""

    def __init__(self, root: Path, spec: RunSpec) -> None:
        self.root = root
        self._spec = spec
        self.shards.mkdir(parents=True, exist_ok=True)

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    def work(self, round_number: int) -> Path:
        folder = self.root / f"round-{round_number}"
        folder.mkdir(exist_ok=True)
        return folder

    def require_room(self, state_bytes: int) -> None:
        """Check that what a run asks a node to keep fits on this disk.

        That is: the states of two rounds at every segment end, of `state_bytes` each; our parts and those that we reduce for
        `keep_rounds`; three checkpoints; the trunk, if there is one.

        Raises:
            ConfigurationError: it does not, and how much it is.
        """
        spec = self._spec
        states = 2 * len(spec.segments(spec.training.steps)) * state_bytes
        parts = 2 * (spec.rounds.keep_rounds + 1) * 4 * spec.num_trainable
        trunk = 4 * spec.model.num_parameters if spec.trunk else 0
        needed = states + parts + 3 * checkpoints.size_bytes(spec) + trunk
        held = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.root).free
        if needed > held + free:
            raise ConfigurationError(
                f"this run keeps up to {needed / 1e9:.1f} GB of evidence in {self.root}, where {free / 1e9:.1f} GB are free;"
                " make room, or choose another disk with --data-dir"
            )

    def rounds(self) -> list[int]:
        """Rounds of which something is kept, newest first."""
        return newest((path.name for path in self.root.iterdir()), "round-")

    def forget(self, rounds: Iterable[int]) -> None:
        """Delete everything of these rounds."""
        for number in rounds:
            shutil.rmtree(self.root / f"round-{number}", ignore_errors=True)

    def checkpoint_path(self, root: bytes) -> Path:
        """Where a whole checkpoint lies."""
        return self.root / f"checkpoint-{root.hex()}"

    def download_path(self, root: bytes) -> Path:
        """Where a checkpoint lies that is being downloaded; any other that was begun is deleted."""
        found = self.root / f"download-{root.hex()}"
        for path in self.root.glob("download-*"):
            if path != found:
                path.unlink()
        return found

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Have a checkpoint on disk, under its own name: until `point_at`, the older one is still what is loaded."""
        write_atomic(self.checkpoint_path(checkpoint.root), *checkpoint.buffers)

    def point_at(self, checkpoint: Checkpoint, keep: Collection[bytes]) -> None:
        """From now on load this one, which is on disk; delete all others but those of the roots `keep`."""
        pointer = {"round": checkpoint.round, "root": checkpoint.root.hex()}
        write_atomic(self.root / "checkpoint.json", json.dumps(pointer).encode())
        kept = {self.checkpoint_path(root) for root in (checkpoint.root, *keep)}
        for path in [*self.root.glob("checkpoint-*"), *self.root.glob("download-*")]:
            if path not in kept:
                path.unlink()

    def load_checkpoint(self) -> tuple[Checkpoint, StateFile] | None:
        """The newest checkpoint on disk, verified, mapped into memory; None if there is none or it is damaged.

        A damaged one becomes a download that has begun: what is right in it need not be fetched again.
        """
        try:
            pointer = json.loads((self.root / "checkpoint.json").read_text())
            round_number, root = int(pointer["round"]), bytes.fromhex(pointer["root"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        path = self.checkpoint_path(root)
        try:
            state = StateFile.open(path)
            if state.manifest.root == root:
                return Checkpoint.from_verified(self._spec, round_number, state.data, state.manifest), state
        except (OSError, HashMismatchError):
            pass
        with contextlib.suppress(OSError):
            path.replace(self.download_path(root))
        return None
