"""The first tables: runs, sources, slots, raw statistics, scalars and what agents dropped."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Creates them."""
    op.create_table(
        "run",
        sa.Column("id", _ID, nullable=False),
        sa.Column("project", sa.Text, nullable=False, server_default=""),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("created_unix_ns", sa.BigInteger, nullable=False, comment="when its first source connected"),
        sa.Column("config_json", sa.Text, nullable=False, server_default="", comment="newest source's configuration"),
        sa.Column("tags_json", sa.Text, nullable=False, server_default="[]", comment="JSON array of strings"),
        sa.Column("notes", sa.Text, nullable=False, server_default=""),
        sa.PrimaryKeyConstraint("id", name="pk_run"),
        sa.UniqueConstraint("project", "name", name="uq_run_project_name"),
    )
    op.create_table(
        "source",
        sa.Column("id", _ID, nullable=False),
        sa.Column("run_id", _ID, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("incarnation", sa.Integer, nullable=False, comment="process lives of this rank, from 1"),
        sa.Column("source_uuid", sa.Text, nullable=False, comment="recognises a source that reconnects"),
        sa.Column("world_size", sa.Integer, nullable=False),
        sa.Column("started_unix_ns", sa.BigInteger, nullable=False, comment="agent's clock"),
        sa.Column("first_seen_unix_ns", sa.BigInteger, nullable=False, comment="collector's clock"),
        sa.Column("last_seen_unix_ns", sa.BigInteger, nullable=False, comment="collector's clock, newest message"),
        sa.Column(
            "clock_skew_ns", sa.BigInteger, nullable=False, comment="agent's clock minus collector's, at connect"
        ),
        sa.Column("agent_version", sa.Text, nullable=False),
        sa.Column("environment_json", sa.Text, nullable=False, comment="JSON object: host, device, versions, commit"),
        sa.Column("up_to_seq", sa.BigInteger, nullable=False, server_default="0", comment="committed; resume above it"),
        sa.Column("rows", sa.BigInteger, nullable=False, server_default="0", comment="rows of stats committed"),
        sa.Column("last_step", sa.BigInteger, nullable=True, comment="largest step committed"),
        sa.Column("finished_unix_ns", sa.BigInteger, nullable=True, comment="agent's clock; null: not finished"),
        sa.Column("outcome", sa.Text, nullable=True, comment="finished | failed"),
        sa.Column("outcome_message", sa.Text, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_source"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_source_run_id_run", ondelete="CASCADE"),
        sa.UniqueConstraint("source_uuid", name="uq_source_source_uuid"),
        sa.UniqueConstraint("run_id", "rank", "incarnation", name="uq_source_run_id_rank_incarnation"),
    )
    op.create_table(
        "slot",
        sa.Column("run_id", _ID, nullable=False),
        sa.Column("slot", sa.Integer, nullable=False, comment="from 0, in model order"),
        sa.Column("layer", sa.Text, nullable=False, comment="torch FQN"),
        sa.Column("role", sa.Text, nullable=False, comment="input | weight | grad_output"),
        sa.Column("module_class", sa.Text, nullable=False),
        sa.Column("in_features", sa.Integer, nullable=False),
        sa.Column("out_features", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "slot", name="pk_slot"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_slot_run_id_run", ondelete="CASCADE"),
        sa.UniqueConstraint("run_id", "layer", "role", name="uq_slot_run_id_layer_role"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "slot_recipe",
        sa.Column("run_id", _ID, nullable=False),
        sa.Column("incarnation", sa.Integer, nullable=False),
        sa.Column("slot", sa.Integer, nullable=False),
        sa.Column("format", sa.Text, nullable=False, comment="E4M3FN | E5M2 | E4M3FNUZ | E5M2FNUZ"),
        sa.Column("recipe", sa.Text, nullable=False, comment="as the recipe prints itself"),
        sa.Column("margin", sa.Integer, nullable=False, comment="bits of headroom that the recipe leaves"),
        sa.PrimaryKeyConstraint("run_id", "incarnation", "slot", name="pk_slot_recipe"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_slot_recipe_run_id_run", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "stats",
        sa.Column("source_id", _ID, nullable=False, comment="source.id"),
        sa.Column("step", sa.BigInteger, nullable=False, comment="optimizer step"),
        sa.Column("slot", sa.Integer, nullable=False),
        sa.Column("amax", sa.REAL, nullable=True, comment="largest finite |x| (as the tensor)"),
        sa.Column(
            "scale_min",
            sa.REAL,
            nullable=True,
            comment="smallest scale of the step's micro-batches; scale multiplies into FP8 (1)",
        ),
        sa.Column(
            "scale_max",
            sa.REAL,
            nullable=True,
            comment="largest scale of the step's micro-batches (1)",
        ),
        sa.Column("numel", sa.BigInteger, nullable=True, comment="elements quantised (elements)"),
        sa.Column("zeros", sa.BigInteger, nullable=True, comment="x == 0 (elements)"),
        sa.Column(
            "overflow",
            sa.BigInteger,
            nullable=True,
            comment="finite x whose |x * scale| rounds beyond the largest finite value (elements)",
        ),
        sa.Column("underflow", sa.BigInteger, nullable=True, comment="x != 0 and q == 0 (elements)"),
        sa.Column("subnormal", sa.BigInteger, nullable=True, comment="q in the format's subnormal range (elements)"),
        sa.Column("nonfinite", sa.BigInteger, nullable=True, comment="x is NaN or infinite (elements)"),
        sa.Column(
            "sum_sq",
            sa.Double,
            nullable=True,
            comment="sum of x^2 over finite elements (square of the tensor's)",
        ),
        sa.Column(
            "err_sq",
            sa.Double,
            nullable=True,
            comment="sum of (x - q * inv_scale)^2 over finite elements (square of the tensor's)",
        ),
        sa.PrimaryKeyConstraint("source_id", "step", "slot", name="pk_stats"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "scalar",
        sa.Column("source_id", _ID, nullable=False),
        sa.Column("name", sa.Text, nullable=False, comment="loss, grad_norm, learning_rate ..."),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("value", sa.Double, nullable=True, comment="null: NaN"),
        sa.PrimaryKeyConstraint("source_id", "name", "step", name="pk_scalar"),
        sa.ForeignKeyConstraint(["source_id"], ["source.id"], name="fk_scalar_source_id_source", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "drop_total",
        sa.Column("source_id", _ID, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column(
            "rows", sa.BigInteger, nullable=False, comment="rows that the agent dropped since the source started"
        ),
        sa.PrimaryKeyConstraint("source_id", "reason", name="pk_drop_total"),
        sa.ForeignKeyConstraint(
            ["source_id"], ["source.id"], name="fk_drop_total_source_id_source", ondelete="CASCADE"
        ),
        sqlite_with_rowid=False,
    )
