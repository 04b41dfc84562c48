"""Uploads in parts, keys of repeats, signatures and documents of artifacts, public keys, provenance, events."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def _of_app(table: str) -> sa.ForeignKeyConstraint:
    name = op.f(f"fk_{table}_app_id_applications")
    return sa.ForeignKeyConstraint(["app_id"], ["applications.id"], name=name, ondelete="CASCADE")


def upgrade() -> None:
    # columns are not added as a batch: one that copies the table would delete, by their references, what hangs on it
    for column in (
        sa.Column("signature", sa.String(length=128), nullable=True),
        sa.Column("idempotency_key", sa.String(length=200), nullable=True),
        sa.Column("multipart_id", sa.String(length=1024), nullable=True),
        sa.Column("part_size_bytes", sa.BigInteger(), nullable=True),
        sa.Column("parts", sa.Text(), nullable=True),
    ):
        op.add_column("uploads", column)
    op.create_index(op.f("ix_uploads_app_id_digest_status"), "uploads", ["app_id", "digest", "status"])
    for column in (
        sa.Column("multipart_id", sa.String(length=1024), nullable=True),
        sa.Column("signature", sa.String(length=128), nullable=True),
        sa.Column("verified_by", sa.String(length=36), nullable=True),
        sa.Column("manifest_digest", sa.String(length=64), nullable=True),
        sa.Column("sbom_digest", sa.String(length=64), nullable=True),
        sa.Column("provenance_digest", sa.String(length=64), nullable=True),
        sa.Column("replacing", sa.String(length=100), nullable=True),
        sa.Column("pinned", sa.Boolean(), server_default=sa.false(), nullable=False),
    ):
        op.add_column("artifacts", column)
    op.drop_index(op.f("ix_artifacts_created_at_id"), table_name="artifacts")
    op.create_index(op.f("ix_artifacts_status_created_at_id"), "artifacts", ["status", "created_at", "id"])
    op.create_index(
        op.f("ix_artifacts_app_id_status_created_at_id"), "artifacts", ["app_id", "status", "created_at", "id"]
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("app_id", sa.String(length=36), nullable=False),
        _of_app("idempotency_keys"),
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app_id", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(op.f("ix_idempotency_keys_created_at"), "idempotency_keys", ["created_at"])
    op.execute(
        "INSERT INTO idempotency_keys (app_id, key, digest, created_at) SELECT app_id, idempotency_key, digest, "
        "created_at FROM artifacts WHERE idempotency_key IS NOT NULL"
    )
    op.create_table(
        "attestations",
        sa.Column("artifact_id", sa.String(length=36), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("builder", sa.String(length=300), nullable=False),
        sa.Column("verified_by", sa.Text(), nullable=False),
        sa.Column("countersignatures", sa.Text(), nullable=False),
        sa.Column("created_by", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["artifact_id"], ["artifacts.id"], name=op.f("fk_attestations_artifact_id_artifacts"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("artifact_id", "sha256", name=op.f("pk_attestations")),
    )
    op.create_index(op.f("ix_attestations_created_at_artifact_id"), "attestations", ["created_at", "artifact_id"])
    op.create_table(
        "attestation_keys",
        sa.Column("id", sa.String(length=16), nullable=False),
        sa.Column("public_key_hex", sa.String(length=64), nullable=False),
        sa.Column("sealed", sa.Text(), nullable=False),
        sa.Column("place", sa.Integer(), nullable=True),
        sa.Column("created_by", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("retired_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("place IN (1, 2)", name=op.f("ck_attestation_keys_place")),
        sa.UniqueConstraint("place", name=op.f("uq_attestation_keys_place")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attestation_keys")),
    )
    op.create_table(
        "public_keys",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("app_id", sa.String(length=36), nullable=False),
        _of_app("public_keys"),
        sa.Column("public_key_hex", sa.String(length=64), nullable=False),
        sa.Column("active", sa.Boolean(), server_default=sa.true(), nullable=False),
        sa.Column("authorized_by", sa.String(length=36), nullable=True),
        sa.Column("created_by", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("deactivated_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_public_keys")),
        sa.UniqueConstraint("app_id", "public_key_hex", name=op.f("uq_public_keys_app_id_public_key_hex")),
    )
    op.create_table(
        "artifact_events",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("app_id", sa.String(length=36), nullable=False),
        _of_app("artifact_events"),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("artifact_id", sa.String(length=36), nullable=True),
        sa.Column("upload_id", sa.String(length=36), nullable=True),
        sa.Column("event", sa.String(length=32), nullable=False),
        sa.Column("actor", sa.String(length=200), nullable=False),
        sa.Column("detail", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("timestamp", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_artifact_events")),
    )
    op.create_index(op.f("ix_artifact_events_digest_id"), "artifact_events", ["digest", "id"])
    op.create_index(op.f("ix_artifact_events_app_id"), "artifact_events", ["app_id"])
    op.create_index(op.f("ix_artifact_events_timestamp"), "artifact_events", ["timestamp"])
