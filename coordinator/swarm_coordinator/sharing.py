"""One run served by several processes from one PostgreSQL: who drives it, and how the others hand records in.

A process that does not drive puts a record, whose signature it has checked, into the table `inbox` and waits for the driver's
answer, which is written in the transaction that carries the record out. What a transaction changes is told to all processes.
If the driver is gone the next one takes over within seconds, and answers what was asked of the last one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import delete, insert, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from swarm_coordinator.api.problems import LimitedError
from swarm_coordinator.db.leadership import Leadership, Listener, notify
from swarm_coordinator.db.tables import InboxRow
from swarm_coordinator.entry import Entry
from swarm_coordinator.journal import Change, Journal, Receipt
from swarm_protocol.errors import RefusedError
from swarm_protocol.records import Envelope, parse

log = logging.getLogger(__name__)

INBOX = "inbox"
ANSWER_S = 15.0
CAMPAIGN_S = 1.0
AWAY_S = 2.0
MAX_GROUP = 256


@dataclass(frozen=True)
class Question:
    """A record that another process was given."""

    id: int
    envelope: Envelope
    token: str | None


class Inbox:
    """The table, for both sides. Synchronous."""

    def __init__(self, engine: Engine, run: bytes) -> None:
        self._engine = engine
        self._run = run

    def put(self, envelope: Envelope, token: str | None, now_ms: int) -> int:
        """Leave a record for the driver; its number."""
        with Session(self._engine) as session, session.begin():
            values = {"run": self._run, "envelope": envelope.encode(), "token": token, "asked_ms": now_ms}
            number = session.scalar(insert(InboxRow).values(**values).returning(InboxRow.id))
            assert isinstance(number, int)
            notify(session.connection(), self._run, [INBOX])
            return number

    def pending(self) -> list[Question]:
        """What the driver has not answered, oldest first."""
        query = select(InboxRow).where(InboxRow.run == self._run, InboxRow.answer.is_(None)).order_by(InboxRow.id)
        with Session(self._engine) as session:
            rows = session.scalars(query.limit(MAX_GROUP)).all()
            return [Question(row.id, Envelope.decode(row.envelope), row.token) for row in rows]

    def forget(self, number: int) -> None:
        """The answer was read, or nobody waits for it any more."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(InboxRow).where(InboxRow.id == number))


def reply(journal: Journal, question: Question) -> Change:
    """The change by which a driver carries out what another process was given, and answers it."""
    accept = journal.offer(question.envelope, parse(question.envelope.body), question.token).carry_out

    def carry_out(entry: Entry) -> None:
        try:
            answer = accept(entry)
        except RefusedError as error:
            answer = error
        assert isinstance(answer, Receipt | RefusedError)
        query = update(InboxRow).where(InboxRow.id == question.id).values(answer=_encoded(answer))
        entry.archive.session.execute(query, execution_options={"synchronize_session": False})
        entry.topics.add(topic(question.id))

    return Change(carry_out, question.envelope.key)


def answered(session: Session, number: int) -> Receipt | RefusedError | None:
    """The driver's answer, if it is there."""
    found = session.scalar(select(InboxRow.answer).where(InboxRow.id == number))
    return None if found is None else _answer(found)


def away() -> LimitedError:
    """What is said when no driver answers."""
    reason = "the coordinator is changing hands; send it again"
    return LimitedError(reason, status=503, code="changing-hands", retry_after_s=AWAY_S)


def topic(number: int) -> str:
    """What wakes whoever waits for an answer."""
    return f"answer:{number}"


def _encoded(answer: Receipt | RefusedError) -> str:
    if isinstance(answer, RefusedError):
        return json.dumps({"reason": answer.reason, "status": answer.status, "code": answer.code})
    signed = None if answer.signed is None else answer.signed.hex()
    return json.dumps({**asdict(answer), "hash": answer.hash.hex(), "signed": signed})


def _answer(text: str) -> Receipt | RefusedError:
    value = json.loads(text)
    if "reason" in value:
        return RefusedError(value["reason"], status=value["status"], code=value["code"])
    signed = None if value["signed"] is None else bytes.fromhex(value["signed"])
    return Receipt(bytes.fromhex(value["hash"]), value["kind"], value["leaf"], value["new"], signed)


class Sharing:
    """A process's part in a shared run, with connections of its own."""

    def __init__(self, engine: Engine, run: bytes) -> None:
        self.inbox = Inbox(engine, run)
        self._engine = engine
        self._run = run
        self._leadership = Leadership(engine, run)
        self._listener: Listener | None = None

    def listen(self, hear: Callable[[Sequence[str]], None]) -> None:
        """Have `hear` called, in a thread of ours, with the topics that were told; with none where some were missed."""
        self._listener = Listener(self._engine, self._run, hear)

    def campaign(self) -> bool:
        """Take the driver's office if nobody has it."""
        try:
            return self._leadership.acquire()
        except SQLAlchemyError as error:
            log.warning("the database does not answer: %s", error)
            return False

    def resign(self) -> None:
        """Give the office back."""
        self._leadership.release()

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._leadership.release()
        self._engine.dispose()
