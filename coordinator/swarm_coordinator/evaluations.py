"""What the checkpoint worker measured of each checkpoint, as rows that are quick to look up. Within one transaction."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from swarm_coordinator.db.tables import EvaluationRow
from swarm_protocol.records import Evaluation


def note(session: Session, run: bytes, record: Evaluation) -> None:
    """Keep an accepted evaluation; of two for one checkpoint, by workers that followed each other, the newer one."""
    session.merge(
        EvaluationRow(
            run=run, round=record.round, root=record.root, loss=record.loss, tokens=record.tokens, sample=record.sample
        )
    )


def newest(session: Session, run: bytes, limit: int) -> Sequence[EvaluationRow]:
    """The evaluations of the last `limit` checkpoints, by round."""
    query = select(EvaluationRow).filter_by(run=run).order_by(EvaluationRow.round.desc()).limit(limit)
    return session.scalars(query).all()[::-1]


def of_round(session: Session, run: bytes, number: int) -> EvaluationRow | None:
    """The evaluation of the checkpoint that a round starts from, if it is there yet."""
    return session.get(EvaluationRow, (run, number))
