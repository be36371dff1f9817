"""Upkeep: an audit log, how old steps are, limits of a token, and the catalogue that a source opened with."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Creates two empty tables; the new columns of old rows are null, which means not limited and not known."""
    op.create_table(
        "audit",
        sa.Column("id", _ID, nullable=False),
        sa.Column("at_unix_ns", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.Text, nullable=False, comment="token NAME | peer ADDRESS | USER@HOST | collector"),
        sa.Column("action", sa.Text, nullable=False, comment="open | prune | delete | token create | token revoke"),
        sa.Column("subject", sa.Text, nullable=False, comment="project/name of the run, or the token's name"),
        sa.Column("detail_json", sa.Text, nullable=False, server_default="{}", comment="JSON object, by action"),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_table(
        "milestone",
        sa.Column("run_id", _ID, nullable=False),
        sa.Column("incarnation", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("reached_unix_ns", sa.BigInteger, autoincrement=False, nullable=False, comment="collector's clock"),
        sa.Column("step", sa.BigInteger, nullable=False, comment="every rank had committed up to here by then"),
        sa.PrimaryKeyConstraint("run_id", "incarnation", "reached_unix_ns", name="pk_milestone"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_milestone_run_id_run", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    columns: list[tuple[str, sa.Column[Any]]] = [
        ("run", sa.Column("token_id", sa.BigInteger, comment="the token that made it; null: none was asked for")),
        ("source", sa.Column("catalogue_slots", sa.Integer, comment="slots that it opened with; may grow, at the end")),
        ("source", sa.Column("catalogue_sha256", sa.Text, comment="of those slots in their order")),
        ("token", sa.Column("max_rows_per_s", sa.BigInteger, comment="of all its streams together; null: no limit")),
        ("token", sa.Column("max_streams", sa.Integer, comment="open at once, on each collector; null: no limit")),
        ("token", sa.Column("max_runs", sa.Integer, comment="that it may make; null: no limit")),
    ]
    for table, column in columns:
        op.add_column(table, column)
