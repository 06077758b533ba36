"""Where things are in a run's directory. `swarm-coordinator init` makes it; everything that serves the run reads it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from swarm_coordinator import config as configuration
from swarm_coordinator.config import CoordinatorConfig, Mode
from swarm_protocol import ancestry
from swarm_protocol.ancestry import Ancestor
from swarm_protocol.errors import ConfigurationError, InvalidDataError
from swarm_protocol.files import write_atomic
from swarm_protocol.identity import peer_id
from swarm_protocol.spec import RunSpec


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run. Keys, the beacon seed and the token are readable by their owner only."""

    root: Path

    @property
    def spec_file(self) -> Path:
        return self.root / "spec.cbor"

    @property
    def coordinator_key(self) -> Path:
        return self.root / "coordinator.key"

    @property
    def worker_key(self) -> Path:
        return self.root / "worker.key"

    @property
    def auditors(self) -> Path:
        return self.root / "auditors"

    @property
    def beacon_seed_file(self) -> Path:
        return self.root / "beacon.seed"

    @property
    def token_file(self) -> Path:
        return self.root / "token"

    @property
    def database(self) -> Path:
        return self.root / "coordinator.db"

    @property
    def gossip_file(self) -> Path:
        """Where the run is gossiped from here, as long as it is."""
        return self.root / "gossip.json"

    def gossip(self) -> list[str]:
        """The multiaddrs at which the run is gossiped from here; none while it is not."""
        try:
            return [str(address) for address in json.loads(self.gossip_file.read_text())]
        except (FileNotFoundError, ValueError):
            return []

    @property
    def ancestors_file(self) -> Path:
        return self.root / "ancestors.cbor"

    @property
    def config_file(self) -> Path:
        return self.root / "coordinator.toml"

    def config(self) -> CoordinatorConfig:
        """How the run is served: its file, under what the environment says.

        Raises:
            ConfigurationError: a value is wrong.
        """
        return configuration.load(self.config_file, os.environ)

    def database_url(self) -> str:
        """The database of the configuration, or the run's own."""
        return self.config().database.url or f"sqlite:///{self.database}"

    def shared(self) -> bool:
        """Whether several processes may serve the run."""
        return self.database_url().startswith("postgresql")

    def objects_url(self) -> str:
        """Where objects are, by the configuration, or in this folder."""
        return self.config().objects.url or self.objects.absolute().as_uri()

    def admission_mode(self) -> Mode:
        """Who may register: by the configuration, or by whether the run has a token."""
        return self.config().admission.mode or ("token" if self.token_file.exists() else "open")

    @property
    def objects(self) -> Path:
        return self.root / "objects"

    @property
    def lock_file(self) -> Path:
        return self.root / "lock"

    def auditor_key(self, number: int) -> Path:
        return self.auditors / f"{number}.key"

    def auditor_keys(self) -> list[Path]:
        """The auditors' key files, by number."""
        return sorted(self.auditors.glob("*.key"), key=lambda path: (len(path.name), path.name))

    def appoint(self, key: bytes) -> None:
        """Let a key that is kept elsewhere audit; a coordinator that is running takes note within seconds."""
        write_atomic(self.auditors / f"{peer_id(key)}.appointed", key.hex().encode())

    def appointed(self) -> list[bytes]:
        """The keys of auditors that are kept elsewhere.

        Raises:
            ConfigurationError: a file is damaged.
        """
        found = []
        for path in sorted(self.auditors.glob("*.appointed")):
            try:
                key = bytes.fromhex(path.read_text())
            except ValueError:
                key = b""
            if len(key) != 32 or path.stem != peer_id(key):
                raise ConfigurationError(f"{path} is damaged; delete it, and appoint the auditor again")
            found.append(key)
        return found

    def spec(self) -> RunSpec:
        """Raises `ConfigurationError` where there is no run."""
        return RunSpec.decode(self._read(self.spec_file))

    def ancestors(self) -> tuple[Ancestor, ...]:
        """The runs that this one comes from, nearest first, each checked by its id.

        Raises:
            ConfigurationError: there is no run, or the file is damaged.
        """
        spec = self.spec()
        if spec.parent is None:
            return ()
        try:
            return ancestry.of(spec, self._read(self.ancestors_file))
        except InvalidDataError as error:
            raise ConfigurationError(f"{self.ancestors_file} is damaged: {error}; restore it from a backup") from error

    def beacon_seed(self) -> bytes:
        """The 32 bytes that the beacon chain starts from. Secret until the last round."""
        seed = self._read(self.beacon_seed_file)
        if len(seed) != 32:
            raise ConfigurationError(f"{self.beacon_seed_file} is damaged; restore it from a backup")
        return seed

    def token(self) -> str | None:
        """What a volunteer has to know to register, if anything."""
        return self.token_file.read_text().strip() if self.token_file.exists() else None

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigurationError(
                f"{path} cannot be read: {error.strerror}. Make a run first: swarm-coordinator init {self.root}"
            ) from error
