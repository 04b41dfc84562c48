"""Alembic's entry: run the migrations on the connection that `schema.config` was given."""

from alembic import context

from aether.stores.database.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    compare_type=True,
    compare_server_default=True,
)
context.run_migrations()
