"""When an artifact was deleted, and when its bytes went."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("artifacts", sa.Column("deleted_at", sa.BigInteger(), nullable=True))
    op.add_column("artifacts", sa.Column("purged_at", sa.BigInteger(), nullable=True))
