"""Table definitions, one schema for SQLite and PostgreSQL.

Ids are UUIDv7 text, times are integers in microseconds since the epoch (UTC), JSON is text. Rules that a
database can hold (uniqueness, references, legal states) are held by it.
"""

import sqlalchemy as sa

from aether.model.deployment import DeploymentStatus

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id(name: str = "id") -> sa.Column[str]:
    return sa.Column(name, sa.String(36), primary_key=True)


def _time(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=nullable)


def _one_of(column: str, values: list[str]) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=column)


tokens = sa.Table(
    "tokens",
    metadata,
    _id(),
    sa.Column("token_hash", sa.String(64), nullable=False, unique=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    _time("created_at"),
    _time("expires_at", nullable=True),
    _time("revoked_at", nullable=True),
    _one_of("role", ["admin", "deployer", "reader"]),
    _one_of("kind", ["bootstrap", "session"]),
)

applications = sa.Table(
    "applications",
    metadata,
    _id(),
    sa.Column("name", sa.String(40), nullable=False, unique=True),
    sa.Column("owner", sa.String(200), nullable=False),
    _time("created_at"),
    sa.Column("active_deployment_id", sa.String(36), nullable=True),
    sa.Column("last_release", sa.Integer, nullable=False, server_default="0"),
    _time("deleting_at", nullable=True),
)

formations = sa.Table(
    "formations",
    metadata,
    sa.Column("app_id", sa.String(36), sa.ForeignKey("applications.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("process", sa.String(40), primary_key=True),
    sa.Column("quantity", sa.Integer, nullable=False),
    sa.CheckConstraint("quantity BETWEEN 0 AND 50", name="quantity"),
)

uploads = sa.Table(
    "uploads",
    metadata,
    _id(),
    sa.Column("app_id", sa.String(36), sa.ForeignKey("applications.id", ondelete="CASCADE"), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("content_digest", sa.String(64), nullable=True),
    sa.Column("runtime", sa.String(64), nullable=True),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("created_by", sa.String(200), nullable=False),
    _time("created_at"),
    _time("expires_at"),
    _one_of("status", ["pending", "completing", "completed", "failed"]),
    sa.Index(None, "status", "expires_at"),
)

artifacts = sa.Table(
    "artifacts",
    metadata,
    _id(),
    sa.Column("app_id", sa.String(36), sa.ForeignKey("applications.id", ondelete="CASCADE"), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("content_digest", sa.String(64), nullable=True),
    sa.Column("runtime", sa.String(64), nullable=True),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("storage_key", sa.String(300), nullable=False),
    sa.Column("verified", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("idempotency_key", sa.String(200), nullable=True),
    sa.Column("upload_id", sa.String(36), nullable=True),
    _time("created_at"),
    sa.UniqueConstraint("app_id", "digest"),
    sa.UniqueConstraint("app_id", "idempotency_key"),
    sa.Index(None, "digest"),
    sa.Index(None, "created_at", "id"),
    _one_of("status", ["stored", "deleted"]),
)

configs = sa.Table(
    "configs",
    metadata,
    _id(),
    sa.Column("app_id", sa.String(36), sa.ForeignKey("applications.id", ondelete="CASCADE"), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("env", sa.Text, nullable=False),
    sa.Column("created_by", sa.String(200), nullable=False),
    _time("created_at"),
    sa.UniqueConstraint("app_id", "version"),
)

deployments = sa.Table(
    "deployments",
    metadata,
    _id(),
    sa.Column("app_id", sa.String(36), sa.ForeignKey("applications.id", ondelete="CASCADE"), nullable=False),
    sa.Column("artifact_id", sa.String(36), sa.ForeignKey("artifacts.id"), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("config_version", sa.Integer, nullable=False),
    sa.Column("release", sa.Integer, nullable=True),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("strategy", sa.String(16), nullable=False),
    sa.Column("runtime", sa.String(64), nullable=True),
    sa.Column("command", sa.Text, nullable=False),
    sa.Column("env", sa.Text, nullable=False, server_default="{}"),
    sa.Column("health", sa.Text, nullable=False, server_default="{}"),
    sa.Column("timeout_secs", sa.Float, nullable=False),
    sa.Column("rollout", sa.Text, nullable=False, server_default="{}"),
    sa.Column("rollout_step", sa.Integer, nullable=False, server_default="0"),
    sa.Column("description", sa.String(300), nullable=False, server_default=sa.text("''")),
    sa.Column("rollback_of", sa.String(36), nullable=True),
    sa.Column("idempotency_key", sa.String(200), nullable=True),
    sa.Column("created_by", sa.String(200), nullable=False),
    sa.Column("trace_id", sa.String(32), nullable=True),
    sa.Column("error", sa.Text, nullable=True),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("epoch", sa.Integer, nullable=False, server_default="0"),
    sa.Column("lease_owner", sa.String(64), nullable=True),
    _time("lease_expires_at", nullable=True),
    _time("created_at"),
    _time("rollout_started_at", nullable=True),
    _time("rollout_completed_at", nullable=True),
    sa.UniqueConstraint("app_id", "release"),
    sa.UniqueConstraint("app_id", "idempotency_key"),
    sa.Index(None, "app_id", "created_at"),
    sa.Index(None, "status"),
    _one_of("status", [status.value for status in DeploymentStatus]),
    _one_of("strategy", ["rolling", "recreate", "canary", "bluegreen"]),
)

deployment_events = sa.Table(
    "deployment_events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("deployment_id", sa.String(36), sa.ForeignKey("deployments.id", ondelete="CASCADE"), nullable=False),
    sa.Column("phase", sa.String(32), nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    _time("timestamp"),
    sa.Index(None, "deployment_id", "id"),
)

instances = sa.Table(
    "instances",
    metadata,
    _id(),
    sa.Column("app_id", sa.String(36), sa.ForeignKey("applications.id", ondelete="CASCADE"), nullable=False),
    sa.Column("deployment_id", sa.String(36), sa.ForeignKey("deployments.id", ondelete="CASCADE"), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("restarts", sa.Integer, nullable=False, server_default="0"),
    _time("created_at"),
    _time("stopped_at", nullable=True),
    sa.Index(None, "deployment_id"),
    sa.Index(None, "app_id", "status"),
    _one_of("status", ["starting", "ready", "draining", "stopped", "failed"]),
)
