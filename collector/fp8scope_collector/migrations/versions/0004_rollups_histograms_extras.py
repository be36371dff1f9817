"""Rollups and which steps they hold, histograms, and extra numbers of a slot.

Rows that are there already are rolled up by the first collector that starts afterwards.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Creates the tables; `coverage` starts with the steps that there are, none of them rolled up."""
    op.create_table(
        "coverage",
        sa.Column("source_id", _ID, nullable=False),
        sa.Column("first_step", sa.BigInteger, nullable=False, comment="smallest step committed, kept or pruned"),
        sa.Column("rolled_step", sa.BigInteger, nullable=False, comment="rollups hold exactly the rows of steps below"),
        sa.Column("pruned_step", sa.BigInteger, nullable=False, comment="rows of steps below were pruned"),
        sa.PrimaryKeyConstraint("source_id", name="pk_coverage"),
        sa.ForeignKeyConstraint(["source_id"], ["source.id"], name="fk_coverage_source_id_source", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.execute(
        "INSERT INTO coverage (source_id, first_step, rolled_step, pruned_step)"
        " SELECT source.id, (SELECT min(step) FROM stats WHERE stats.source_id = source.id), 0, 0 FROM source"
        " WHERE EXISTS (SELECT 1 FROM stats WHERE stats.source_id = source.id)"
    )
    op.create_table(
        "rollup",
        sa.Column("run_id", _ID, nullable=False),
        sa.Column("level", sa.Integer, nullable=False, comment="steps of a bucket: 16, 256 or 4096"),
        sa.Column("name", sa.Text, nullable=False, comment="which array"),
        sa.Column("incarnation", sa.Integer, nullable=False),
        sa.Column("bucket", sa.BigInteger, nullable=False, comment="step // level"),
        sa.Column("part", sa.BigInteger, nullable=False, comment="who wrote it; parts are merged on read"),
        sa.Column("data", sa.LargeBinary, nullable=False, comment="little-endian values by slot"),
        sa.PrimaryKeyConstraint("run_id", "level", "name", "incarnation", "bucket", "part", name="pk_rollup"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_rollup_run_id_run", ondelete="CASCADE"),
    )
    op.create_table(
        "histogram",
        sa.Column("source_id", _ID, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("slot", sa.Integer, nullable=False),
        sa.Column("first_bin", sa.Integer, nullable=False, comment="bin of the first count"),
        sa.Column(
            "counts", sa.LargeBinary, nullable=False, comment="little-endian uint64, one for each bin from there"
        ),
        sa.PrimaryKeyConstraint("source_id", "step", "slot", name="pk_histogram"),
        sa.ForeignKeyConstraint(["source_id"], ["source.id"], name="fk_histogram_source_id_source", ondelete="CASCADE"),
    )
    op.create_table(
        "extra",
        sa.Column("source_id", _ID, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("slot", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False, comment="as its library calls it"),
        sa.Column("value", sa.Double, nullable=True, comment="null: NaN"),
        sa.PrimaryKeyConstraint("source_id", "step", "slot", "name", name="pk_extra"),
        sa.ForeignKeyConstraint(["source_id"], ["source.id"], name="fk_extra_source_id_source", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE rollup ALTER COLUMN data SET STORAGE EXTERNAL")  # a slot is a slice of it
