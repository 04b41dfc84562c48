"""Process types: what a deployment has besides web, and which of them an instance is."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    # not as a batch: one that copies the table would delete, by their references, every event and instance
    op.add_column("deployments", sa.Column("processes", sa.Text(), server_default="{}", nullable=False))
    op.add_column(
        "instances", sa.Column("process", sa.String(length=40), server_default=sa.text("'web'"), nullable=False)
    )
