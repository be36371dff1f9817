"""What alembic runs: the migrations, on the connection and in the transaction that `storage.engine.migrate` opened."""

from alembic import context

from fp8scope_collector.storage.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,  # SQLite too: a migration that fails leaves nothing behind
)
context.run_migrations()
