"""The tables before there were migrations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.LargeBinary(), nullable=False),
        sa.Column("spec", sa.LargeBinary(), nullable=False),
        sa.Column("created_ms", INTEGER, nullable=False),
        sa.Column("alive_ms", INTEGER, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "audits",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("round", INTEGER, nullable=False),
        sa.Column("slot", INTEGER, nullable=False),
        sa.Column("part", INTEGER, nullable=False),
        sa.Column("peer", sa.LargeBinary(), nullable=False),
        sa.Column("audited", sa.LargeBinary(), nullable=False),
        sa.Column("segments", sa.LargeBinary(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "round", "slot", "part"),
    )
    op.create_table(
        "credit",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("round", INTEGER, nullable=False),
        sa.Column("slot", INTEGER, nullable=False),
        sa.Column("peer", sa.LargeBinary(), nullable=False),
        sa.Column("tokens", INTEGER, nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "round", "slot"),
    )
    op.create_table(
        "equivocations",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("report", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "key"),
    )
    op.create_table(
        "events",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("seq", INTEGER, nullable=False),
        sa.Column("round", INTEGER, nullable=False),
        sa.Column("at_ms", INTEGER, nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "seq"),
    )
    op.create_table(
        "nodes",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("agent", sa.String(), nullable=False),
        sa.Column("device", sa.String(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("registered_ms", INTEGER, nullable=False),
        sa.Column("last_seen_ms", INTEGER, nullable=False),
        sa.Column("ended_reason", sa.String(), nullable=True),
        sa.Column("contributions", INTEGER, nullable=False),
        sa.Column("accepted", INTEGER, nullable=False),
        sa.Column("rejected", INTEGER, nullable=False),
        sa.Column("unavailable", INTEGER, nullable=False),
        sa.Column("vouched_tokens", INTEGER, nullable=False),
        sa.Column("unavailable_rounds", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "key"),
    )
    op.create_table(
        "offices",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "key", "role"),
    )
    op.create_table(
        "records",
        sa.Column("id", INTEGER, nullable=False),
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("round", INTEGER, nullable=False),
        sa.Column("sequence", INTEGER, nullable=False),
        sa.Column("signer", sa.LargeBinary(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.Column("leaf", INTEGER, nullable=True),
        sa.Column("received_ms", INTEGER, nullable=False),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("run", "kind", "round", "sequence", "signer"),
        sa.UniqueConstraint("run", "leaf"),
    )
    op.create_index("records_by_hash", "records", ["run", "hash"], unique=False)
    op.create_table(
        "rounds",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("round", INTEGER, nullable=False),
        sa.Column("slots", INTEGER, nullable=False),
        sa.Column("plan", sa.LargeBinary(), nullable=False),
        sa.Column("vouched", sa.LargeBinary(), nullable=False),
        sa.Column("committed", INTEGER, nullable=False),
        sa.Column("commitment_set", sa.LargeBinary(), nullable=True),
        sa.Column("parts", sa.LargeBinary(), nullable=True),
        sa.Column("missing_parts", INTEGER, nullable=False),
        sa.Column("manifest", sa.LargeBinary(), nullable=True),
        sa.Column("root", sa.LargeBinary(), nullable=True),
        sa.Column("beacon", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "round"),
    )
    op.create_table(
        "snapshots",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("round", INTEGER, nullable=False),
        sa.Column("seq", INTEGER, nullable=False),
        sa.Column("state", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "round"),
    )
    op.create_table(
        "verdicts",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("round", INTEGER, nullable=False),
        sa.Column("slot", INTEGER, nullable=False),
        sa.Column("part", INTEGER, nullable=False),
        sa.Column("auditor", sa.LargeBinary(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("comparison", sa.String(), nullable=True),
        sa.Column("statistic", sa.Double(), nullable=True),
        sa.Column("reason", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "round", "slot", "part", "auditor"),
    )
