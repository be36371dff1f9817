"""Tokens: who may send to a collector, and who may read its metrics."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Creates their table, empty."""
    op.create_table(
        "token",
        sa.Column("id", _ID, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("secret_sha256", sa.Text, nullable=False, comment="hexadecimal; the secret itself is stored nowhere"),
        sa.Column("scope", sa.Text, nullable=False, comment="ingest | read | admin"),
        sa.Column("project", sa.Text, nullable=True, comment="null: every project"),
        sa.Column("run", sa.Text, nullable=True, comment="null: every run"),
        sa.Column("created_unix_ns", sa.BigInteger, nullable=False),
        sa.Column("expires_unix_ns", sa.BigInteger, nullable=True, comment="null: never"),
        sa.Column("revoked_unix_ns", sa.BigInteger, nullable=True, comment="null: not revoked"),
        sa.Column("last_used_unix_ns", sa.BigInteger, nullable=True, comment="to a minute; null: never"),
        sa.PrimaryKeyConstraint("id", name="pk_token"),
        sa.UniqueConstraint("name", name="uq_token_name"),
        sa.UniqueConstraint("secret_sha256", name="uq_token_secret_sha256"),
    )
