"""The signing ledger of the run owner's workers where several processes share a run: in the run's database.

Whichever process has them next, on whichever machine, then knows what was signed. What they have left in a file, from when
they had one, is copied when the ledger is opened.
"""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from swarm_coordinator.db.engine import open_database
from swarm_coordinator.run_directory import RunDirectory
from swarm_protocol.errors import ConfigurationError
from swarm_protocol.identity import Identity
from swarm_protocol.signing import INSERT, SigningLedger


def open_ledger(home: RunDirectory, path: Path, identity: Identity) -> SigningLedger:
    """The ledger of one of the run's own keys: in the file, or in the database if several processes may serve the run.

    Raises:
        ConfigurationError: it cannot be opened.
    """
    return SharedLedger(home.database_url(), path, identity) if home.shared() else SigningLedger(path, identity)


class SharedLedger(SigningLedger):
    """In PostgreSQL. `path` is the file whose rows it begins with, if there is one."""

    def __init__(self, url: str, path: Path, identity: Identity) -> None:
        self._identity = identity
        self._numbering = threading.Lock()
        self._engine = open_database(url).execution_options(isolation_level="AUTOCOMMIT")
        if path.exists():
            with sqlite3.connect(path) as file:
                for row in file.execute("SELECT key, run, kind, round, sequence, envelope FROM signed"):
                    self._execute(INSERT, *row)

    def _execute(self, statement: str, *values: object) -> tuple[Any, ...] | None:
        try:
            with self._engine.connect() as connection:
                result = connection.exec_driver_sql(statement.replace("?", "%s"), values)
                row = result.fetchone() if result.returns_rows else None
                return None if row is None else tuple(row)
        except SQLAlchemyError as error:
            raise ConfigurationError(f"the signing ledger in the database cannot be used: {error}") from error

    def close(self) -> None:
        self._engine.dispose()
