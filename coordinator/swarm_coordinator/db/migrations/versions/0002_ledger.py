"""The ledger in double entry, receipts, invitations, orders, evaluations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "allowed",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "key"),
    )
    op.create_table(
        "evaluations",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("round", INTEGER, nullable=False),
        sa.Column("root", sa.LargeBinary(), nullable=False),
        sa.Column("loss", sa.Double(), nullable=False),
        sa.Column("tokens", INTEGER, nullable=False),
        sa.Column("sample", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "round"),
    )
    op.create_table(
        "invites",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("token_hash", sa.LargeBinary(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
        sa.Column("uses", INTEGER, nullable=False),
        sa.Column("used", INTEGER, nullable=False),
        sa.Column("created_ms", INTEGER, nullable=False),
        sa.Column("expires_ms", INTEGER, nullable=True),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "token_hash"),
    )
    op.create_table(
        "ledger",
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("seq", INTEGER, nullable=False),
        sa.Column("round", INTEGER, nullable=False),
        sa.Column("slot", INTEGER, nullable=False),
        sa.Column("peer", sa.LargeBinary(), nullable=False),
        sa.Column("debit", sa.String(), nullable=False),
        sa.Column("credit", sa.String(), nullable=False),
        sa.Column("megaflops", INTEGER, nullable=False),
        sa.Column("commitment", sa.LargeBinary(), nullable=False),
        sa.Column("cause", sa.LargeBinary(), nullable=False),
        sa.Column("leaf", INTEGER, nullable=False),
        sa.Column("position", INTEGER, nullable=False),
        sa.Column("statement", INTEGER, nullable=True),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("run", "seq"),
    )
    op.create_index("ledger_by_peer", "ledger", ["run", "peer", "seq"], unique=False)
    op.create_index("ledger_unstated", "ledger", ["run", "statement"], unique=False)
    op.create_table(
        "orders",
        sa.Column("id", INTEGER, nullable=False),
        sa.Column("run", sa.LargeBinary(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("argument", sa.String(), nullable=False),
        sa.Column("ordered_ms", INTEGER, nullable=False),
        sa.Column("done_ms", INTEGER, nullable=True),
        sa.Column("answer", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run"],
            ["runs.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.add_column("credit", sa.Column("megaflops", INTEGER, nullable=False, server_default="0"))
    op.add_column("credit", sa.Column("team", sa.String(), nullable=False, server_default=""))
    op.add_column("credit", sa.Column("commitment", sa.LargeBinary(), nullable=False, server_default=""))
    op.create_index("audits_by_outcome", "audits", ["run", "outcome", "peer"], unique=False)
    op.create_index("credit_by_peer", "credit", ["run", "peer"], unique=False)
    op.create_index("credit_by_status", "credit", ["run", "status", "round"], unique=False)
    op.add_column("nodes", sa.Column("team", sa.String(), nullable=False, server_default=""))
    op.add_column("nodes", sa.Column("invited", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("nodes", sa.Column("leaf", INTEGER, nullable=False, server_default="0"))
    op.add_column("nodes", sa.Column("pending", INTEGER, nullable=False, server_default="0"))
    op.add_column("nodes", sa.Column("settled", INTEGER, nullable=False, server_default="0"))
    op.add_column("nodes", sa.Column("forfeited", INTEGER, nullable=False, server_default="0"))
    op.add_column("records", sa.Column("receipt", sa.LargeBinary(), nullable=True))
    op.add_column("rounds", sa.Column("planned_ms", INTEGER, nullable=True))
    op.add_column("rounds", sa.Column("sealed_ms", INTEGER, nullable=True))
