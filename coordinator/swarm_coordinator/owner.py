"""What the run owner does to a run from another process: rows in its database, which a running coordinator finds there.

An order is carried out by the coordinator, once, in a transaction of its own; nobody else signs. What only decides who may
register (invitations, the allow-list) is simply written.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from swarm_coordinator.db.engine import open_database
from swarm_coordinator.db.leadership import Leadership
from swarm_coordinator.db.tables import OrderRow, RunRow
from swarm_coordinator.run_directory import RunDirectory
from swarm_protocol.errors import ConfigurationError, InvalidDataError
from swarm_protocol.identity import public_key_of

ANSWER_S = 5.0
LOOK_S = 0.1

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@contextmanager
def transaction(home: RunDirectory) -> Iterator[tuple[Session, bytes]]:
    """A session on the run's database, committed at the end, and the run's id.

    Raises:
        ConfigurationError: there is no run, or its database cannot be opened or written.
    """
    spec = home.spec()
    engine = open_database(home.database_url())
    try:
        with Session(engine) as session, session.begin():
            if engine.dialect.name == "sqlite":
                # Whoever reads first may not write any more once the coordinator has written: the lock comes first.
                session.execute(update(RunRow).where(RunRow.id == spec.run_id).values(spec=RunRow.spec))
            if session.get(RunRow, spec.run_id) is None:
                now = now_ms()
                session.add(RunRow(id=spec.run_id, spec=spec.encode(), created_ms=now, alive_ms=now))
                session.flush()
            yield session, spec.run_id
    except DBAPIError as error:
        raise ConfigurationError(f"the run's database cannot be used: {error.orig}") from error
    finally:
        engine.dispose()


def order(home: RunDirectory, kind: str, argument: dict[str, Any], wait_s: float = ANSWER_S) -> str | None:
    """Ask the coordinator for something. Returns its answer, or None if none serves the run: it will once one does."""
    with transaction(home) as (session, run):
        row = OrderRow(run=run, kind=kind, argument=json.dumps(argument), ordered_ms=now_ms())
        session.add(row)
        session.flush()
        number = row.id
    engine = open_database(home.database_url())
    try:
        end = time.monotonic() + wait_s
        while is_served(home) and time.monotonic() < end:
            answer = _answer(engine, number)
            if answer is not None:
                return answer
            time.sleep(LOOK_S)
        return _answer(engine, number)
    finally:
        engine.dispose()


def _answer(engine: Engine, number: int) -> str | None:
    with Session(engine) as session:
        return session.scalar(select(OrderRow.answer).where(OrderRow.id == number, OrderRow.done_ms.is_not(None)))


def is_served(home: RunDirectory) -> bool:
    """Whether a coordinator serves the run: from this directory, or anywhere if several may share its database."""
    if home.shared():
        engine = open_database(home.database_url())
        try:
            office = Leadership(engine, home.spec().run_id)
            vacant = office.acquire()
            office.release()
            return not vacant
        finally:
            engine.dispose()
    try:
        descriptor = os.open(home.lock_file, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def key_of(text: str) -> bytes:
    """A public key from a PeerID or from hex.

    Raises:
        ConfigurationError: it is neither.
    """
    try:
        raw = bytes.fromhex(text) if len(text) == 64 else public_key_of(text)
    except (ValueError, InvalidDataError) as error:
        raise ConfigurationError(f"{text} is no key: {error}. Give the PeerID, or the key in hex") from error
    return raw


def duration_ms(text: str) -> int:
    """Milliseconds in a text such as `30m`, `12h`, `7d` or `2w`.

    Raises:
        ConfigurationError: it is none.
    """
    found = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    if found is None or int(found[1]) == 0:
        raise ConfigurationError(f"{text} is no duration; write a number and s, m, h, d or w, such as 7d")
    return int(found[1]) * _UNITS[found[2]] * 1000


def now_ms() -> int:
    return time.time_ns() // 1_000_000
