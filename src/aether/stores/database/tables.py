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


owners = sa.Table(
    "owners",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(8), nullable=False),
    _one_of("kind", ["user", "team"]),
)
"""Names of users and teams: one space, so that an app's owner is one of them without doubt."""

users = sa.Table(
    "users",
    metadata,
    _id(),
    sa.Column("name", sa.String(64), sa.ForeignKey("owners.name"), nullable=False, unique=True),
    sa.Column("email", sa.String(254), nullable=True, unique=True),
    sa.Column("auth_provider", sa.String(32), nullable=False),
    sa.Column("password_hash", sa.String(200), nullable=True),
    sa.Column("role", sa.String(16), nullable=False),
    _time("created_at"),
    _time("disabled_at", nullable=True),
    _one_of("role", ["admin", "deployer", "reader"]),
)

teams = sa.Table(
    "teams",
    metadata,
    _id(),
    sa.Column("name", sa.String(64), sa.ForeignKey("owners.name"), nullable=False, unique=True),
    _time("created_at"),
)

memberships = sa.Table(
    "memberships",
    metadata,
    sa.Column("team_id", sa.String(36), sa.ForeignKey("teams.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("user_id", sa.String(36), sa.ForeignKey("users.id", ondelete="CASCADE"), primary_key=True),
    _time("created_at"),
    sa.Index(None, "user_id"),
)

sessions = sa.Table(
    "sessions",
    metadata,
    _id(),
    sa.Column("user_id", sa.String(36), sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("apps", sa.Text, nullable=True),
    sa.Column("credential_hash", sa.String(64), nullable=True),
    _time("created_at"),
    _time("expires_at"),
    _time("revoked_at", nullable=True),
    sa.Column("revoked_why", sa.String(16), nullable=True),
    _one_of("role", ["admin", "deployer", "reader"]),
    sa.Index(None, "user_id"),
    sa.Index(None, "credential_hash"),
    sa.Index(None, "expires_at"),
)
"""Logins: a family of access and refresh tokens that ends as one."""

refresh_tokens = sa.Table(
    "refresh_tokens",
    metadata,
    sa.Column("token_hash", sa.String(64), primary_key=True),
    sa.Column("session_id", sa.String(36), sa.ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),
    sa.Column("successor_hash", sa.String(64), nullable=True),
    _time("created_at"),
    _time("expires_at"),
    sa.Index(None, "session_id"),
)
"""`successor_hash` is set when the token is used; a second use is a replay."""

tokens = sa.Table(
    "tokens",
    metadata,
    _id(),
    sa.Column("token_hash", sa.String(64), nullable=False, unique=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("user_id", sa.String(36), sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=True),
    sa.Column("session_id", sa.String(36), sa.ForeignKey("sessions.id", ondelete="CASCADE"), nullable=True),
    sa.Column("apps", sa.Text, nullable=True),
    sa.Column("created_by", sa.String(200), nullable=True),
    _time("created_at"),
    _time("expires_at", nullable=True),
    _time("revoked_at", nullable=True),
    _one_of("role", ["admin", "deployer", "reader"]),
    _one_of("kind", ["bootstrap", "session", "access", "ci"]),
    sa.Index(None, "user_id"),
    sa.Index(None, "session_id"),
    sa.Index(None, "kind", "expires_at"),
)
"""`session` is the kind of logins made before there were refresh tokens; they end by their own time."""

device_logins = sa.Table(
    "device_logins",
    metadata,
    _id(),
    sa.Column("device_hash", sa.String(64), nullable=False, unique=True),
    sa.Column("user_code", sa.String(8), nullable=False, unique=True),
    sa.Column("client", sa.String(100), nullable=False),
    sa.Column("address", sa.String(64), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("grant", sa.Text, nullable=True),
    _time("created_at"),
    _time("expires_at"),
    _one_of("status", ["pending", "approved", "denied", "used"]),
    sa.Index(None, "expires_at"),
)
"""Machines that wait to be let in; `grant` names whose login they get, as JSON."""

audit = sa.Table(
    "audit",
    metadata,
    _id(),
    _time("time"),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("actor_kind", sa.String(16), nullable=False),
    sa.Column("action", sa.String(200), nullable=False),
    sa.Column("target", sa.String(400), nullable=False),
    sa.Column("outcome", sa.String(64), nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("address", sa.String(64), nullable=False),
    sa.Column("request_id", sa.String(128), nullable=False),
    sa.Column("trace_id", sa.String(32), nullable=False),
    sa.Index(None, "time", "id"),
    sa.Index(None, "actor", "time"),
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

hosts = sa.Table(
    "hosts",
    metadata,
    _id(),
    sa.Column("app_id", sa.String(36), sa.ForeignKey("applications.id", ondelete="CASCADE"), nullable=False),
    sa.Column("host", sa.String(253), nullable=False),
    sa.Column("token", sa.String(64), nullable=False),
    sa.Column("redirect_to", sa.String(253), nullable=True),
    sa.Column("allow_http", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("hsts_secs", sa.Integer, nullable=False, server_default="0"),
    sa.Column("verified_by", sa.String(220), nullable=True),
    _time("verified_at", nullable=True),
    _time("checked_at", nullable=True),
    sa.Column("problem", sa.Text, nullable=True),
    sa.Column("created_by", sa.String(200), nullable=False),
    _time("created_at"),
    sa.UniqueConstraint("app_id", "host"),
)
"""Claims of apps to hosts; of a host at most one is verified."""
sa.Index(
    "ix_hosts_verified",
    hosts.c.host,
    unique=True,
    sqlite_where=hosts.c.verified_at.is_not(None),
    postgresql_where=hosts.c.verified_at.is_not(None),
)

certificates = sa.Table(
    "certificates",
    metadata,
    sa.Column("host_id", sa.String(36), sa.ForeignKey("hosts.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("host", sa.String(253), nullable=False),
    sa.Column("source", sa.String(16), nullable=False),
    sa.Column("issuer", sa.String(200), nullable=True),
    sa.Column("fingerprint", sa.String(64), nullable=True),
    _time("not_before", nullable=True),
    _time("not_after", nullable=True),
    sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
    _time("next_attempt_at", nullable=True),
    sa.Column("problem", sa.Text, nullable=True),
    _one_of("source", ["given", "acme"]),
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
    sa.Column("signature", sa.String(128), nullable=True),
    sa.Column("idempotency_key", sa.String(200), nullable=True),
    sa.Column("multipart_id", sa.String(1024), nullable=True),
    sa.Column("part_size_bytes", sa.BigInteger, nullable=True),
    sa.Column("parts", sa.Text, nullable=True),
    _one_of("status", ["pending", "completing", "completed", "failed"]),
    sa.Index(None, "status", "expires_at"),
    sa.Index(None, "app_id", "digest", "status"),
)
"""`multipart_id` is the store's own name of an upload in parts; `parts` is what it was completed with, as JSON."""

idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("app_id", sa.String(36), sa.ForeignKey("applications.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("key", sa.String(200), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),
    _time("created_at"),
    sa.Index(None, "created_at"),
)
"""What a key of a completed upload was first used for, taken before anything is done under it."""

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
    _time("deleted_at", nullable=True),
    _time("purged_at", nullable=True),
    sa.Column("multipart_id", sa.String(1024), nullable=True),
    sa.Column("signature", sa.String(128), nullable=True),
    sa.Column("verified_by", sa.String(36), nullable=True),
    sa.Column("manifest_digest", sa.String(64), nullable=True),
    sa.Column("sbom_digest", sa.String(64), nullable=True),
    sa.Column("provenance_digest", sa.String(64), nullable=True),
    sa.Column("replacing", sa.String(100), nullable=True),
    sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.UniqueConstraint("app_id", "digest"),
    sa.UniqueConstraint("app_id", "idempotency_key"),
    sa.Index(None, "digest"),
    sa.Index(None, "status", "created_at", "id"),
    sa.Index(None, "app_id", "status", "created_at", "id"),
    _one_of("status", ["stored", "deleted"]),
)
"""`verified_by` is the public key that `verified` rests on. `replacing` is `<kind>:<SHA-256>` of a document that is
being written over the one that its digest names."""

attestations = sa.Table(
    "attestations",
    metadata,
    sa.Column("artifact_id", sa.String(36), sa.ForeignKey("artifacts.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("builder", sa.String(300), nullable=False),
    sa.Column("verified_by", sa.Text, nullable=False),
    sa.Column("countersignatures", sa.Text, nullable=False),
    sa.Column("created_by", sa.String(200), nullable=False),
    _time("created_at"),
    sa.Index(None, "created_at", "artifact_id"),
)
"""What is known of the provenance `sha256` of an artifact: ids of the public keys whose signatures held when it came,
and the servers' own signatures, both as JSON. The one that counts is the artifact's `provenance_digest`."""

attestation_keys = sa.Table(
    "attestation_keys",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("public_key_hex", sa.String(64), nullable=False),
    sa.Column("sealed", sa.Text, nullable=False),
    sa.Column("place", sa.Integer, nullable=True, unique=True),
    sa.Column("created_by", sa.String(200), nullable=False),
    _time("created_at"),
    _time("retired_at", nullable=True),
    sa.CheckConstraint("place IN (1, 2)", name="place"),
)
"""The servers' own keys, with which they sign provenance that they have verified; the private halves are sealed. Two
may sign at once, each in its place; a retired one has none."""

public_keys = sa.Table(
    "public_keys",
    metadata,
    _id(),
    sa.Column("app_id", sa.String(36), sa.ForeignKey("applications.id", ondelete="CASCADE"), nullable=False),
    sa.Column("public_key_hex", sa.String(64), nullable=False),
    sa.Column("active", sa.Boolean, nullable=False, server_default=sa.true()),
    sa.Column("authorized_by", sa.String(36), nullable=True),
    sa.Column("created_by", sa.String(200), nullable=False),
    _time("created_at"),
    _time("deactivated_at", nullable=True),
    sa.UniqueConstraint("app_id", "public_key_hex"),
)
"""Whose signatures count for an app; `authorized_by` is the key that vouched for this one, None for an admin's."""

artifact_events = sa.Table(
    "artifact_events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("app_id", sa.String(36), sa.ForeignKey("applications.id", ondelete="CASCADE"), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("artifact_id", sa.String(36), nullable=True),
    sa.Column("upload_id", sa.String(36), nullable=True),
    sa.Column("event", sa.String(32), nullable=False),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("detail", sa.Text, nullable=False, server_default=sa.text("''")),
    _time("timestamp"),
    sa.Index(None, "digest", "id"),
    sa.Index(None, "app_id"),
    sa.Index(None, "timestamp"),
)
"""What happened to an artifact, from the first URL that was signed for it."""

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

secret_keys = sa.Table(
    "secret_keys",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    _time("created_at"),
)
"""Ids of the keys that may have sealed `configs.env`, `deployments.env` or `function_versions.env`; the keys are not
in the database."""

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
    sa.Column("processes", sa.Text, nullable=False, server_default="{}"),
    sa.Column("release_command", sa.Text, nullable=True),
    sa.Column("timeout_secs", sa.Float, nullable=False),
    sa.Column("rollout", sa.Text, nullable=False, server_default="{}"),
    sa.Column("rollout_step", sa.Integer, nullable=False, server_default="0"),
    sa.Column("volumes", sa.Text, nullable=False, server_default="[]"),
    sa.Column("description", sa.String(300), nullable=False, server_default=sa.text("''")),
    sa.Column("rollback_of", sa.String(36), nullable=True),
    sa.Column("idempotency_key", sa.String(200), nullable=True),
    sa.Column("created_by", sa.String(200), nullable=False),
    sa.Column("trace_id", sa.String(32), nullable=True),
    sa.Column("error", sa.Text, nullable=True),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("epoch", sa.Integer, nullable=False, server_default="0"),
    sa.Column("lease_owner", sa.String(64), nullable=True),
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

cron_runs = sa.Table(
    "cron_runs",
    metadata,
    _id(),
    sa.Column("app_id", sa.String(36), sa.ForeignKey("applications.id", ondelete="CASCADE"), nullable=False),
    sa.Column("deployment_id", sa.String(36), sa.ForeignKey("deployments.id", ondelete="CASCADE"), nullable=False),
    sa.Column("process", sa.String(40), nullable=False),
    _time("scheduled_at"),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("message", sa.Text, nullable=False, server_default=sa.text("''")),
    sa.Column("exit_code", sa.Integer, nullable=True),
    _time("started_at", nullable=True),
    _time("ended_at", nullable=True),
    sa.UniqueConstraint("app_id", "process", "scheduled_at"),
    sa.Index(None, "status"),
    _one_of("status", ["running", "succeeded", "failed", "timed_out", "skipped"]),
)

instances = sa.Table(
    "instances",
    metadata,
    _id(),
    sa.Column("app_id", sa.String(36), sa.ForeignKey("applications.id", ondelete="CASCADE"), nullable=False),
    sa.Column("deployment_id", sa.String(36), sa.ForeignKey("deployments.id", ondelete="CASCADE"), nullable=False),
    sa.Column("process", sa.String(40), nullable=False, server_default=sa.text("'web'")),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("restarts", sa.Integer, nullable=False, server_default="0"),
    _time("created_at"),
    _time("stopped_at", nullable=True),
    sa.Index(None, "deployment_id"),
    sa.Index(None, "app_id", "status"),
    _one_of("status", ["starting", "ready", "draining", "stopped", "failed"]),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("owner", sa.String(64), nullable=True),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("renewals", sa.Integer, nullable=False),
    sa.Column("ttl_secs", sa.Float, nullable=False),
    _time("expires_at"),
    sa.Index(None, "owner"),
)
"""Work that one server at a time does. `expires_at` is told to people; see `aether.leases.rules` for what counts."""

runs = sa.Table(
    "runs",
    metadata,
    _id(),
    sa.Column("app_id", sa.String(36), sa.ForeignKey("applications.id", ondelete="CASCADE"), nullable=False),
    sa.Column("deployment_id", sa.String(36), sa.ForeignKey("deployments.id", ondelete="CASCADE"), nullable=False),
    sa.Column("command", sa.Text, nullable=False),
    sa.Column("console", sa.String(16), nullable=False),
    sa.Column("timeout_secs", sa.Float, nullable=False),
    sa.Column("created_by", sa.String(200), nullable=False),
    _time("created_at"),
    _time("ended_at", nullable=True),
    sa.Column("exit_code", sa.Integer, nullable=True),
    sa.Column("signal", sa.Integer, nullable=True),
    sa.Column("reason", sa.Text, nullable=True),
    sa.Index(None, "app_id", "created_at"),
    sa.Index(None, "deployment_id"),
)
"""One-off runs, under way until `ended_at` is set."""

functions = sa.Table(
    "functions",
    metadata,
    _id(),
    sa.Column("name", sa.String(40), nullable=False, unique=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    _time("created_at"),
    _time("updated_at"),
    _time("deleting_at", nullable=True),
)
"""`version` is the one of `function_versions` that counts now."""

function_versions = sa.Table(
    "function_versions",
    metadata,
    _id(),
    sa.Column("function_id", sa.String(36), sa.ForeignKey("functions.id", ondelete="CASCADE"), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("definition", sa.Text, nullable=False),
    sa.Column("env", sa.Text, nullable=False),
    sa.Column("code_digest", sa.String(64), nullable=True),
    sa.Column("code_form", sa.String(8), nullable=True),
    sa.Column("code_bytes", sa.BigInteger, nullable=True),
    sa.Column("artifact_id", sa.String(36), nullable=True),
    sa.Column("rollback_of", sa.Integer, nullable=True),
    sa.Column("created_by", sa.String(200), nullable=False),
    _time("created_at"),
    sa.UniqueConstraint("function_id", "version"),
    sa.Index(None, "code_digest"),
    _one_of("code_form", ["zip", "tar.gz", "artifact"]),
)
"""What a function was from one change to the next. `env` is sealed; `artifact_id` is the artifact that the code is a
copy of, which may be gone."""

function_runtimes = sa.Table(
    "function_runtimes",
    metadata,
    sa.Column("name", sa.String(40), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("init", sa.Text, nullable=False),
    sa.Column("created_by", sa.String(200), nullable=False),
    _time("created_at"),
    sa.Index(None, "digest"),
)
"""Those that are registered; `init` is a JSON list of words."""

function_invocations = sa.Table(
    "function_invocations",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("function_id", sa.String(36), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("instance_id", sa.String(64), nullable=False),
    _time("started_at"),
    sa.Column("duration_ms", sa.Float, nullable=False),
    sa.Column("method", sa.String(32), nullable=False),
    sa.Column("path", sa.String(200), nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("start", sa.String(16), nullable=False),
    sa.Index(None, "function_id", "started_at", "id"),
    sa.Index(None, "started_at"),
    _one_of("start", ["warm", "cold", "restored"]),
)
"""Finished calls; they come late and in batches, maybe of a function that is gone by then, so nothing refers."""
