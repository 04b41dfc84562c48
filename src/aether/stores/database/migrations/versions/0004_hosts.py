"""Custom hosts of apps."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "hosts",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("app_id", sa.String(length=36), nullable=False),
        sa.Column("host", sa.String(length=253), nullable=False),
        sa.Column("token", sa.String(length=64), nullable=False),
        sa.Column("redirect_to", sa.String(length=253), nullable=True),
        sa.Column("allow_http", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("hsts_secs", sa.Integer(), server_default="0", nullable=False),
        sa.Column("verified_by", sa.String(length=220), nullable=True),
        sa.Column("verified_at", sa.BigInteger(), nullable=True),
        sa.Column("checked_at", sa.BigInteger(), nullable=True),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column("created_by", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["app_id"], ["applications.id"], name=op.f("fk_hosts_app_id_applications"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hosts")),
        sa.UniqueConstraint("app_id", "host", name=op.f("uq_hosts_app_id_host")),
    )
    # whoever proves a host first has it; claims that are not proven yet may meet
    op.create_index(
        "ix_hosts_verified",
        "hosts",
        ["host"],
        unique=True,
        sqlite_where=sa.text("verified_at IS NOT NULL"),
        postgresql_where=sa.text("verified_at IS NOT NULL"),
    )
