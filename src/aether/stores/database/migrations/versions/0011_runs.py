"""One-off runs, and the volumes of each deployment."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("app_id", sa.String(length=36), nullable=False),
        sa.Column("deployment_id", sa.String(length=36), nullable=False),
        sa.Column("command", sa.Text(), nullable=False),
        sa.Column("console", sa.String(length=16), nullable=False),
        sa.Column("timeout_secs", sa.Float(), nullable=False),
        sa.Column("created_by", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("signal", sa.Integer(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["app_id"], ["applications.id"], name=op.f("fk_runs_app_id_applications"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["deployment_id"], ["deployments.id"], name=op.f("fk_runs_deployment_id_deployments"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
    )
    op.create_index(op.f("ix_runs_app_id_created_at"), "runs", ["app_id", "created_at"])
    op.create_index(op.f("ix_runs_deployment_id"), "runs", ["deployment_id"])
    # not as a batch: one that copies the table would delete, by their references, every event and instance
    op.add_column("deployments", sa.Column("volumes", sa.Text(), server_default="[]", nullable=False))
