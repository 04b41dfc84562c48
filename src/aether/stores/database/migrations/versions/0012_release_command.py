"""How a deployment's release command went."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    # not as a batch: one that copies the table would delete, by their references, every event and instance
    op.add_column("deployments", sa.Column("release_command", sa.Text(), nullable=True))
