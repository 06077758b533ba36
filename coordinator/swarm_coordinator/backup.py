"""A run's directory as one file, and back. A backup is consistent while the coordinator runs, and holds secrets: mode 0600.

It has the spec, the keys, the beacon's seed, the configuration, the database, what the run owner's own auditors and
checkpoint worker have signed, and, if asked for, the objects. Its last member, the manifest, names every other one with its
BLAKE3.

A restored run is marked as such: it signs nothing before its nodes were asked for what it signed last (see `recovery`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from blake3 import blake3
from sqlalchemy import select
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from swarm_coordinator import config as configuration
from swarm_coordinator import owner
from swarm_coordinator.db.archive import opened
from swarm_coordinator.db.engine import open_database, shown
from swarm_coordinator.db.tables import OrderRow, RecordRow, RunRow
from swarm_coordinator.recovery import RECOVER
from swarm_coordinator.run_directory import RunDirectory
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.identity import Identity
from swarm_protocol.log import Log, leaf_hash
from swarm_protocol.records import LogHead, RoundPlan

FORMAT = 1
MANIFEST = "MANIFEST.json"
MAX_MANIFEST_BYTES = 1 << 30
PIECE_BYTES = 1 << 20

_FILES = (
    "spec.cbor",
    "ancestors.cbor",
    "coordinator.toml",
    "coordinator.key",
    "worker.key",
    "beacon.seed",
    "token",
    "worker/peer-port",
)
_PATTERNS = ("auditors/*.key", "auditors/*.appointed")
_LEDGERS = ("worker/signed.db", "auditors/*/signed.db")


@dataclass(frozen=True)
class Summary:
    """What a backup holds: whose, until where, and how much. `has_database` is False where that is PostgreSQL's."""

    run: str
    name: str
    made_ms: int
    has_database: bool
    has_objects: bool
    log_size: int
    log_root: str


class _Hashed:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hash = blake3()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.hash.update(data)
        return data


def backup(home: RunDirectory, file: Path, *, objects: bool) -> Summary:
    """Write a backup of a run to a new file.

    Raises:
        ConfigurationError: there is no run, the file exists or cannot be written, or the objects are elsewhere.
    """
    spec = home.spec()
    source = local_objects(home) if objects else None
    if file.exists():
        raise ConfigurationError(f"{file} exists; choose another name")
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    sqlite = make_url(home.database_url()).get_backend_name() == "sqlite"
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".backup.", dir=home.root) as copies,
            os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as raw,
        ):
            with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
                log = Log()
                members: list[tuple[str, Path]] = []
                if sqlite:
                    database = Path(copies) / "coordinator.db"
                    _copy_sqlite(_sqlite_path(home.database_url()), database)
                    log = checked_log(f"sqlite:///{database}", spec.run_id)
                    members.append(("coordinator.db", database))
                for number, ledger in enumerate(_matching(home.root, _LEDGERS)):
                    copy = Path(copies) / f"{number}.db"
                    _copy_sqlite(ledger, copy)
                    members.append((ledger.relative_to(home.root).as_posix(), copy))
                plain = [home.root / name for name in _FILES if (home.root / name).is_file()]
                plain += _matching(home.root, _PATTERNS)
                members += [(path.relative_to(home.root).as_posix(), path) for path in plain]
                if source is not None:
                    members += [(f"objects/{path.relative_to(source).as_posix()}", path) for path in _blobs(source)]
                hashes = {}
                for name, path in members:
                    try:
                        hashes[name] = _add(tar, name, path)
                    except FileNotFoundError:  # the checkpoint worker deletes objects that nothing needs any more
                        if not name.startswith("objects/"):
                            raise
                summary = Summary(
                    spec.run_id.hex(), spec.name, owner.now_ms(), sqlite, objects, log.size, log.root().hex()
                )
                _add_manifest(tar, {"format": FORMAT, **asdict(summary), "files": hashes}, Path(copies))
            raw.flush()
            os.fsync(raw.fileno())
        temporary.replace(file)
    except (OSError, sqlite3.Error) as error:
        raise ConfigurationError(f"the backup {file} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return summary


def restore(file: Path, directory: Path) -> Summary:
    """Make a run's directory of a backup, checked, and marked as restored. It appears whole or not at all.

    Raises:
        ConfigurationError: the directory exists, the file is no backup or damaged, or its parts contradict each other.
    """
    target = directory.absolute()
    if target.exists():
        raise ConfigurationError(f"{directory} exists; restore into a new directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            summary = _unpack(file, building)
            _settle_in(RunDirectory(building), summary)
            os.sync()
            building.rename(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except (OSError, sqlite3.Error) as error:
        raise ConfigurationError(f"{file} cannot be restored to {directory}: {error}") from error
    except (tarfile.TarError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{file} is no backup of a run, or is damaged: {error}") from error
    return summary


def checked_log(database_url: str, run: bytes) -> Log:
    """The log in a database, checked against every head that the run has signed of it.

    Raises:
        ConfigurationError: a leaf is missing, or a head is that of another log.
    """
    engine = open_database(database_url)
    log, heads = Log(), []
    try:
        with Session(engine) as session:
            query = select(RecordRow).where(RecordRow.run == run, RecordRow.leaf.is_not(None)).order_by(RecordRow.leaf)
            for row in session.scalars(query.execution_options(yield_per=1000)):
                if log.append(leaf_hash(row.envelope)) != row.leaf:
                    raise ConfigurationError(f"the database lost leaf {log.size - 1} of the log; use another backup")
                if row.kind == RoundPlan.kind:
                    heads.append(opened(row))
            heads += [opened(row) for row in session.scalars(select(RecordRow).filter_by(run=run, kind=LogHead.kind))]
    finally:
        engine.dispose()
    for head in heads:
        size, root = (head.log_size, head.log_root) if isinstance(head, RoundPlan) else (head.sequence, None)
        root = head.root if isinstance(head, LogHead) else root
        if size > log.size or log.root(size) != root:
            raise ConfigurationError(
                f"the log is not the one that the run signed a head of, at size {size}; use another backup"
            )
    return log


def local_objects(home: RunDirectory) -> Path:
    """The folder with the run's objects.

    Raises:
        ConfigurationError: they are in a bucket.
    """
    url = home.objects_url()
    parts = urlsplit(url)
    if parts.scheme != "file":
        raise ConfigurationError(f"the objects are at {url}; back them up there, and leave --objects out")
    return Path(unquote(parts.path))


def _settle_in(home: RunDirectory, summary: Summary) -> None:
    """Check what was unpacked, let the configuration name what is here, and mark the run as restored."""
    spec = home.spec()
    if spec.run_id.hex() != summary.run:
        raise ValueError("the spec is that of another run")
    if Identity.load(home.coordinator_key).public_key.hex() != spec.coordinator:
        raise ValueError("the key is not the one that the run was made with")
    config = configuration.load(home.config_file, {})
    inside: dict[str, Any] = config.model_dump()
    if summary.has_database:
        inside["database"]["url"] = None
    if summary.has_objects:
        inside["objects"]["url"] = None
    moved = configuration.CoordinatorConfig.model_validate(inside)
    if moved != config:
        configuration.write(home.config_file, moved)
    url = home.database_url()
    log = checked_log(url, spec.run_id)
    if summary.has_database and (log.size, log.root().hex()) != (summary.log_size, summary.log_root):
        raise ValueError("the database holds another log than the manifest names")
    if not summary.has_database and not _knows(url, spec.run_id):
        raise ConfigurationError(f"restore the database first, with pg_restore: {shown(url)} does not have this run")
    with owner.transaction(home) as (session, run):
        session.add(OrderRow(run=run, kind=RECOVER, argument="{}", ordered_ms=owner.now_ms()))


def _knows(url: str, run: bytes) -> bool:
    engine = open_database(url)
    try:
        with Session(engine) as session:
            return session.get(RunRow, run) is not None
    finally:
        engine.dispose()


def _unpack(file: Path, target: Path) -> Summary:
    found: dict[str, str] = {}
    manifest: dict[str, Any] | None = None
    with tarfile.open(file, mode="r:") as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isreg() else None
            if stream is None or manifest is not None or member.name in found:
                raise ValueError(f"it has a member {member.name!r:.100} that no backup has")
            if member.name == MANIFEST:
                if member.size > MAX_MANIFEST_BYTES:
                    raise ValueError("its manifest is too long")
                manifest = json.loads(stream.read())
                continue
            found[member.name] = _write(stream, target / _safe(member.name))
    if not isinstance(manifest, dict) or manifest.pop("format", None) != FORMAT:
        raise ValueError("it has no manifest that this version knows; is it whole?")
    named = manifest.pop("files")
    wrong = sorted(name for name in named.keys() | found.keys() if named.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"{', '.join(wrong[:5])} differ from the manifest")
    return Summary(**manifest)


def _safe(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or str(path) != name:
        raise ValueError(f"it has a member with the name {name!r:.100}")
    return path


def _write(stream: IO[bytes], path: Path) -> str:
    """Write what comes, and return its hash."""
    digest = blake3()
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        while piece := stream.read(PIECE_BYTES):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def _add(tar: tarfile.TarFile, name: str, path: Path) -> str:
    """Add a file under a name, and return its hash."""
    with path.open("rb") as file:
        member = tarfile.TarInfo(name)
        member.size, member.mode = os.fstat(file.fileno()).st_size, 0o600
        member.mtime = int(os.fstat(file.fileno()).st_mtime)
        hashed = _Hashed(file)
        tar.addfile(member, hashed)  # it is only read
    return hashed.hash.hexdigest()


def _add_manifest(tar: tarfile.TarFile, manifest: dict[str, Any], folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True))
    _add(tar, MANIFEST, path)


def _matching(root: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in root.glob(pattern) if path.is_file())


def _blobs(folder: Path) -> Iterator[Path]:
    """Whole files: what is still being written has a name with a `#`, or a leading dot."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "#" not in path.name and not path.name.startswith("."):
            yield path


def _sqlite_path(url: str) -> Path:
    return Path(make_url(url).database or "")


def _copy_sqlite(source: Path, target: Path) -> None:
    """A consistent copy, while others write."""
    if not source.exists():
        engine = open_database(f"sqlite:///{target}")  # a run that was never served
        engine.dispose()
        return
    with (
        contextlib.closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=10)) as live,
        contextlib.closing(sqlite3.connect(target)) as copy,
    ):
        live.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")
