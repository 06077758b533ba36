"""What Alembic runs: every migration in the transaction of the connection that `engine` hands over."""

from __future__ import annotations

from alembic import context

from swarm_coordinator.db.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
context.run_migrations()
