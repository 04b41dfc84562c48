"""How many instances of each process type an app wants; how far and by which rules traffic moves in a rollout."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "formations",
        sa.Column("app_id", sa.String(length=36), nullable=False),
        sa.Column("process", sa.String(length=40), nullable=False),
        sa.Column("quantity", sa.Integer(), nullable=False),
        sa.CheckConstraint("quantity BETWEEN 0 AND 50", name=op.f("ck_formations_quantity")),
        sa.ForeignKeyConstraint(
            ["app_id"], ["applications.id"], name=op.f("fk_formations_app_id_applications"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("app_id", "process", name=op.f("pk_formations")),
    )
    # not as a batch: one that copies the table would delete, by their references, every event and instance
    op.add_column("deployments", sa.Column("rollout", sa.Text(), server_default="{}", nullable=False))
    op.add_column("deployments", sa.Column("rollout_step", sa.Integer(), server_default="0", nullable=False))
