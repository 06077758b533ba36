"""The evidence of rejections is archived; workers that move from machine to machine have their signing ledger here."""

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
    op.create_table(
        "signed",
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("round", INTEGER, nullable=False),
        sa.Column("sequence", INTEGER, nullable=False),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("key", "run", "kind", "round", "sequence"),
    )
    op.add_column("verdicts", sa.Column("evidence", sa.LargeBinary(), nullable=True))
