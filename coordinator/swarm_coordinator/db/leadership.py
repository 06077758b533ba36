"""One round driver among several processes that serve a run from one PostgreSQL, and how it and the others hear each other.

Who holds the advisory lock drives: it alone has the state machine, the clock and the coordinator's signature. The others
answer from what is committed, and hand records in through the table `inbox`. A driver that lost the lock without noticing
cannot commit: every transaction checks that the run still names it (see `Journal`).
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

log = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 7000
LISTEN_S = 0.5
PAUSE_S = 1.0
KEEP_ALIVE = {"tcp_keepalives_idle": 10, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 3}


class Leadership:
    """The office of a run's driver, or of who has its `workers`, for one process. With SQLite the run directory's lock stands
    for both."""

    def __init__(self, engine: Engine, run: bytes, *, workers: bool = False) -> None:
        self._engine = engine
        self._key = int.from_bytes(run[8:16] if workers else run[:8], "big", signed=True)
        self._connection: Connection | None = None

    @property
    def shared(self) -> bool:
        """Whether several processes may serve the run."""
        return self._engine.dialect.name == "postgresql"

    def acquire(self) -> bool:
        """Take the office if nobody has it. It is held until `release`, or until the connection breaks."""
        if not self.shared or self._connection is not None:
            return True
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        if connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": self._key}):
            for setting, value in KEEP_ALIVE.items():  # so that the server notices within half a minute if we vanish
                connection.execute(text(f"SET {setting} = {value}"))
            self._connection = connection
            return True
        connection.close()
        return False

    def holds(self) -> bool:
        """Whether we have the office still: it goes with the connection."""
        if not self.shared:
            return True
        if self._connection is None:
            return False
        try:
            self._connection.execute(text("SELECT 1"))
        except DBAPIError as error:
            log.warning("the database does not answer: %s", error.orig)
            self.release()
            return False
        return True

    def release(self) -> None:
        """Give the office back, if we have it."""
        if self._connection is not None:
            self._connection.invalidate()  # closes the session, and with it the lock
            self._connection.close()
            self._connection = None


def channel(run: bytes) -> str:
    """The name under which a run's processes talk."""
    return f"swarm_{run.hex()[:24]}"


def notify(connection: Connection, run: bytes, messages: Iterable[str]) -> None:
    """Tell the run's processes these words once the transaction is committed; nobody else listens to SQLite."""
    if connection.dialect.name != "postgresql":
        return
    group: list[str] = []
    size = 0
    for message in [*sorted(messages), None]:
        if group and (message is None or size + len(message) > MAX_PAYLOAD_BYTES):
            payload = {"channel": channel(run), "payload": json.dumps(group)}
            connection.execute(text("SELECT pg_notify(:channel, :payload)"), payload)
            group, size = [], 0
        if message is not None:
            group.append(message)
            size += len(message) + 4


class Listener:
    """A thread that hears what is said about a run; `hear` is called in it. It connects again when the server was away."""

    def __init__(self, engine: Engine, run: bytes, hear: Callable[[list[str]], None]) -> None:
        self._engine = engine
        self._run = run
        self._hear = hear
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=5.0)

    def _listen(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                    raw: Any = connection.connection.driver_connection
                    raw.execute(f'LISTEN "{channel(self._run)}"')
                    self._hear([])  # what was said while nobody listened
                    while not self._stopping.is_set():
                        for notice in raw.notifies(timeout=LISTEN_S):
                            self._hear(json.loads(notice.payload))
            except DBAPIError as error:
                log.warning("the database does not answer: %s", error.orig)
            except Exception as error:  # noqa: BLE001  # the driver's own, outside SQLAlchemy
                log.warning("the database's notices ended: %s", error)
            self._stopping.wait(PAUSE_S)
