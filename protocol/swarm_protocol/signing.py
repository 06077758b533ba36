"""Durable signing: a signature is on disk before its first byte leaves, and is never remade.

The ledger holds, per (run, kind, round, sequence), the one envelope that this key ever signed. Asked again for the same
record it returns the stored envelope; asked for another one it refuses. That holds across crashes and restarts.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from swarm_protocol.errors import ConfigurationError, EquivocationError
from swarm_protocol.identity import Identity
from swarm_protocol.records import Envelope, Record

_SCHEMA = """
CREATE TABLE IF NOT EXISTS signed (
    key BLOB NOT NULL, run BLOB NOT NULL, kind TEXT NOT NULL, round INTEGER NOT NULL, sequence INTEGER NOT NULL,
    envelope BLOB NOT NULL,
    PRIMARY KEY (key, run, kind, round, sequence)
) WITHOUT ROWID
"""

INSERT = "INSERT INTO signed VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"


class SigningLedger:
    """Signs records for one identity, from several threads if need be: in a file of SQLite's, or where a subclass says."""

    def __init__(self, path: Path, identity: Identity) -> None:
        self._identity = identity
        self._lock = threading.Lock()
        self._numbering = threading.Lock()
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=10, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(_SCHEMA)
        except (OSError, sqlite3.DatabaseError) as error:
            raise ConfigurationError(f"the signing ledger {path} cannot be opened: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def identity(self) -> Identity:
        return self._identity

    def sign(self, record: Record) -> Envelope:
        """Sign a record once, for ever.

        Raises:
            EquivocationError: another record was signed under the same (run, kind, round, sequence).
            ConfigurationError: the ledger cannot be used; no signature leaves.
        """
        envelope = Envelope.sign(self._identity, record)
        name = (self._identity.public_key, record.run, record.kind, record.round, record.sequence)
        self._execute(INSERT, *name, envelope.encode())
        stored = self.find(record.run, record.kind, record.round, record.sequence)
        if stored is None or stored.body != record.body:
            raise EquivocationError(
                f"a different {record.kind} of round {record.round}, sequence {record.sequence}, was signed before"
            )
        return stored

    def sign_next(self, make: Callable[[int], Record]) -> Envelope:
        """Sign what `make` returns for the next free sequence of its kind and round (`make` is called for both)."""
        with self._numbering:
            draft = make(0)
            return self.sign(make(self.next_sequence(draft.run, draft.kind, draft.round)))

    def find(self, run: bytes, kind: str, round_number: int, sequence: int) -> Envelope | None:
        """What was signed under this name, if anything."""
        row = self._execute(
            "SELECT envelope FROM signed WHERE key = ? AND run = ? AND kind = ? AND round = ? AND sequence = ?",
            self._identity.public_key, run, kind, round_number, sequence,
        )  # fmt: skip
        return None if row is None else Envelope.decode(row[0])

    def next_sequence(self, run: bytes, kind: str, round_number: int) -> int:
        """One more than the largest sequence signed so far for (run, kind, round)."""
        row = self._execute(
            "SELECT max(sequence) FROM signed WHERE key = ? AND run = ? AND kind = ? AND round = ?",
            self._identity.public_key, run, kind, round_number,
        )  # fmt: skip
        return 0 if row is None or row[0] is None else int(row[0]) + 1

    def _execute(self, statement: str, *values: object) -> tuple[Any, ...] | None:
        """The first row of the result, if there is one."""
        try:
            with self._lock:
                row: tuple[Any, ...] | None = self._db.execute(statement, values).fetchone()
                return row
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(f"the signing ledger {self._path} cannot be used: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()
