"""A run that another process drives, as of the last commit that was looked at: its state, its log, its records.

The state follows from the events that the driver stored, by the same pure function; nothing is written here.
"""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from swarm_coordinator.db.machine_codec import decode_event
from swarm_coordinator.db.tables import EventRow, RecordRow
from swarm_coordinator.journal import Journal, restored_state
from swarm_coordinator.rounds import advance
from swarm_protocol.log import leaf_hash

BATCH = 1000


class Mirror(Journal):
    """Open it with `open`, and `refresh` it when the driver has committed. One thread's at a time."""

    def _load(self, now_ms: int) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Take note of what was committed since."""
        with Session(self._engine) as session:
            self._follow_events(session)
            self._follow_log(session)

    def _follow_events(self, session: Session) -> None:
        mine = EventRow.run == self.spec.run_id
        oldest, newest = session.execute(select(func.min(EventRow.seq), func.max(EventRow.seq)).where(mine)).one()
        if newest is None or newest == self._seq:
            return
        if oldest > self._seq + 1 or not self._seq:
            self.state = restored_state(session, self.spec)
        else:
            state = self.state
            query = select(EventRow).where(mine, EventRow.seq > self._seq).order_by(EventRow.seq)
            for row in session.scalars(query):
                state, _ = advance(state, decode_event(row.payload), row.at_ms)
            self.state = state
        self._seq = newest

    def _follow_log(self, session: Session) -> None:
        query = select(RecordRow.envelope).where(RecordRow.run == self.spec.run_id, RecordRow.leaf >= self.log.size)
        for envelope in session.scalars(query.order_by(RecordRow.leaf).execution_options(yield_per=BATCH)):
            self.log.append(leaf_hash(envelope))
        if self.log.size != self.log_head[0]:
            self.log_head = (self.log.size, self.log.root())
