"""The evidence of rejections is archived."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "evidence",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("round", INTEGER, nullable=False),
        sa.Column("slot", INTEGER, nullable=False),
        sa.Column("part", INTEGER, nullable=False),
        sa.Column("auditor", sa.LargeBinary(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("size_bytes", INTEGER, nullable=False),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "round", "slot", "part", "auditor", "hash"),
    )
    op.create_index("evidence_by_hash", "evidence", ["run", "hash"])
    op.add_column("verdicts", sa.Column("evidence", sa.LargeBinary(), nullable=True))
