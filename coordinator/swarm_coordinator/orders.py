"""What the run owner ordered by a command, carried out by the coordinator: once, in the transaction that says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from swarm_coordinator.db.tables import OrderRow
from swarm_coordinator.entry import Entry
from swarm_coordinator.recovery import RECOVER
from swarm_coordinator.round_events import Pause, Stop
from swarm_coordinator.rounds import Phase
from swarm_protocol.identity import peer_id
from swarm_protocol.records import Role

log = logging.getLogger(__name__)

STOPPED = "stopped by the run owner"


def open_orders(session: Session, run: bytes) -> Sequence[int]:
    """The numbers of those that are not done, oldest first."""
    query = select(OrderRow.id).where(OrderRow.run == run, OrderRow.done_ms.is_(None), OrderRow.kind != RECOVER)
    return session.scalars(query.order_by(OrderRow.id)).all()


def carry_out(entry: Entry, number: int) -> None:
    """Do what was ordered, and write down what came of it."""
    order = entry.archive.session.get_one(OrderRow, number)
    try:
        order.answer = _done(entry, order.kind, json.loads(order.argument))
    except (ValueError, KeyError, TypeError) as error:
        order.answer = f"the order {order.kind} {order.argument!r:.200} is damaged, and was not carried out: {error}"
    order.done_ms = entry.now_ms
    log.info("the run owner's order %s: %s", order.kind, order.answer)


def _done(entry: Entry, kind: str, argument: dict[str, str]) -> str:
    over = entry.state.phase is Phase.FINISHED
    where = f"round {entry.state.round}"
    between = entry.state.phase is Phase.ASSEMBLING
    match kind:
        case "pause" | "resume" | "stop" if over:
            return "the run has finished; nothing was changed"
        case "pause":
            entry.apply(Pause(True))
            return (
                f"paused; {where} has not begun"
                if between
                else f"{where} ends, and no other begins until it is resumed"
            )
        case "resume" if not entry.state.paused:
            return "the run was not paused; nothing was changed"
        case "resume":
            entry.apply(Pause(False))
            return "rounds begin again"
        case "stop":
            entry.apply(Stop(STOPPED))
            return "the run has ended" if between else f"{where} ends, and the run with it"
        case "ban":
            key = bytes.fromhex(argument["key"])
            if entry.ban(key, argument["reason"]):
                return f"{peer_id(key)} is banned: its slot is free, and its pending credit forfeited"
            node = entry.archive.node(key)
            reason = (
                "it has not registered in this run" if node is None else f"its standing had ended: {node.ended_reason}"
            )
            return f"nothing was changed for {peer_id(key)}: {reason}"
        case "dismiss":
            key = bytes.fromhex(argument["key"])
            auditors = set(entry.archive.offices(Role.AUDITOR))
            needed = entry.spec.audit.rejecting_auditors
            if key in auditors and len(auditors) <= needed:
                return f"nothing was changed: a rejection takes {needed} auditors, so appoint another one first"
            if entry.dismiss(key, argument["reason"]):
                return f"{peer_id(key)} audits no more; {len(auditors) - 1} auditors are left"
            return f"nothing was changed: {peer_id(key)} is no auditor of this run"
        case _:
            raise ValueError("this version does not know it")
