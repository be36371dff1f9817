"""The tables, for every SQL engine; docs/storage.md explains them to people who query the database themselves.

Raw rows live in `stats`, one row for one slot at one step of one source, keyed in the order of arrival. A *source*
is one process life of one rank, (run, rank, incarnation). Slots are numbered once per run, so that the same layer
and role has the same number on all ranks and incarnations.

Exactly once: `source.up_to_seq` is advanced in the transaction that inserts a batch's rows, and a batch at or below
it is a resend. Times are Unix nanoseconds. A NaN scalar is stored as null, since SQLite has no NaN.
"""

from __future__ import annotations

import sqlalchemy as sa

from fp8core.records import FIELDS

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite: only INTEGER is a rowid alias
_FIELD_TYPES: dict[str, type[sa.types.TypeEngine[float]] | sa.types.TypeEngine[float] | sa.types.TypeEngine[int]] = {
    "float32": sa.REAL(),
    "float64": sa.Double(),
    "uint64": sa.BigInteger(),
}

run = sa.Table(
    "run",
    metadata,
    sa.Column("id", _BIG, primary_key=True),
    sa.Column("project", sa.Text, nullable=False, server_default=""),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("created_unix_ns", sa.BigInteger, nullable=False, comment="when its first source connected"),
    sa.Column("config_json", sa.Text, nullable=False, server_default="", comment="newest source's configuration"),
    sa.Column("tags_json", sa.Text, nullable=False, server_default="[]", comment="JSON array of strings"),
    sa.Column("notes", sa.Text, nullable=False, server_default=""),
    sa.Column("token_id", sa.BigInteger, nullable=True, comment="the token that made it; null: none was asked for"),
    sa.UniqueConstraint("project", "name"),
)

source = sa.Table(
    "source",
    metadata,
    sa.Column("id", _BIG, primary_key=True),
    sa.Column("run_id", sa.ForeignKey("run.id", ondelete="CASCADE"), nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("incarnation", sa.Integer, nullable=False, comment="process lives of this rank, from 1"),
    sa.Column("source_uuid", sa.Text, nullable=False, unique=True, comment="recognises a source that reconnects"),
    sa.Column("world_size", sa.Integer, nullable=False),
    sa.Column("started_unix_ns", sa.BigInteger, nullable=False, comment="agent's clock"),
    sa.Column("first_seen_unix_ns", sa.BigInteger, nullable=False, comment="collector's clock"),
    sa.Column("last_seen_unix_ns", sa.BigInteger, nullable=False, comment="collector's clock, newest message"),
    sa.Column("clock_skew_ns", sa.BigInteger, nullable=False, comment="agent's clock minus collector's, at connect"),
    sa.Column("agent_version", sa.Text, nullable=False),
    sa.Column("environment_json", sa.Text, nullable=False, comment="JSON object: host, device, versions, commit"),
    sa.Column("up_to_seq", sa.BigInteger, nullable=False, server_default="0", comment="committed; resume above it"),
    sa.Column("rows", sa.BigInteger, nullable=False, server_default="0", comment="rows of stats committed"),
    sa.Column("last_step", sa.BigInteger, nullable=True, comment="largest step committed"),
    sa.Column("finished_unix_ns", sa.BigInteger, nullable=True, comment="agent's clock; null: not finished"),
    sa.Column("outcome", sa.Text, nullable=True, comment="finished | failed"),
    sa.Column("outcome_message", sa.Text, nullable=True),
    sa.Column("catalogue_slots", sa.Integer, nullable=True, comment="slots that it opened with; may grow, at the end"),
    sa.Column("catalogue_sha256", sa.Text, nullable=True, comment="of those slots in their order"),
    sa.UniqueConstraint("run_id", "rank", "incarnation"),
)

slot = sa.Table(
    "slot",
    metadata,
    sa.Column("run_id", sa.ForeignKey("run.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False, comment="from 0, in model order"),
    sa.Column("layer", sa.Text, nullable=False, comment="torch FQN"),
    sa.Column("role", sa.Text, nullable=False, comment="input | weight | grad_output"),
    sa.Column("module_class", sa.Text, nullable=False),
    sa.Column("in_features", sa.Integer, nullable=False),
    sa.Column("out_features", sa.Integer, nullable=False),
    sa.UniqueConstraint("run_id", "layer", "role"),
    sqlite_with_rowid=False,
)

# How a slot was quantised: may change when a run is resumed.
slot_recipe = sa.Table(
    "slot_recipe",
    metadata,
    sa.Column("run_id", sa.ForeignKey("run.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("incarnation", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("format", sa.Text, nullable=False, comment="E4M3FN | E5M2 | E4M3FNUZ | E5M2FNUZ"),
    sa.Column("recipe", sa.Text, nullable=False, comment="as the recipe prints itself"),
    sa.Column("margin", sa.Integer, nullable=False, comment="bits of headroom that the recipe leaves"),
    sqlite_with_rowid=False,
)

# No foreign key: checking one for each row costs PostgreSQL two thirds of its ingest rate. The writer locks the
# source's row in the transaction that inserts its statistics, which is the same promise.
stats = sa.Table(
    "stats",
    metadata,
    sa.Column("source_id", _BIG, primary_key=True, autoincrement=False, comment="source.id"),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False, comment="optimizer step"),
    sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False),
    *(
        sa.Column(field.name, _FIELD_TYPES[field.dtype], nullable=True, comment=f"{field.definition} ({field.unit})")
        for field in FIELDS
    ),
    sqlite_with_rowid=False,
)

# Which steps of a source there were ever, and which of them the rollups hold.
coverage = sa.Table(
    "coverage",
    metadata,
    sa.Column("source_id", sa.ForeignKey("source.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("first_step", sa.BigInteger, nullable=False, comment="smallest step committed, kept or pruned"),
    sa.Column("rolled_step", sa.BigInteger, nullable=False, comment="rollups hold exactly the rows of steps below"),
    sa.Column("pruned_step", sa.BigInteger, nullable=False, comment="rows of steps below were pruned"),
    sqlite_with_rowid=False,
)

# Packed arrays over slots, merged over ranks and the steps of a bucket: storage/rollups.py.
rollup = sa.Table(
    "rollup",
    metadata,
    sa.Column("run_id", sa.ForeignKey("run.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("level", sa.Integer, primary_key=True, autoincrement=False, comment="steps of a bucket: 16, 256 or 4096"),
    sa.Column("name", sa.Text, primary_key=True, comment="which array"),
    sa.Column("incarnation", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("bucket", sa.BigInteger, primary_key=True, autoincrement=False, comment="step // level"),
    sa.Column(
        "part", sa.BigInteger, primary_key=True, autoincrement=False, comment="who wrote it; parts are merged on read"
    ),
    sa.Column("data", sa.LargeBinary, nullable=False, comment="little-endian values by slot"),
)

histogram = sa.Table(
    "histogram",
    metadata,
    sa.Column("source_id", sa.ForeignKey("source.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("first_bin", sa.Integer, nullable=False, comment="bin of the first count"),
    sa.Column("counts", sa.LargeBinary, nullable=False, comment="little-endian uint64, one for each bin from there"),
)

extra = sa.Table(
    "extra",
    metadata,
    sa.Column("source_id", sa.ForeignKey("source.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.Text, primary_key=True, comment="as its library calls it"),
    sa.Column("value", sa.Double, nullable=True, comment="null: NaN"),
    sqlite_with_rowid=False,
)

scalar = sa.Table(
    "scalar",
    metadata,
    sa.Column("source_id", sa.ForeignKey("source.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.Text, primary_key=True, comment="loss, grad_norm, learning_rate ..."),
    sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("value", sa.Double, nullable=True, comment="null: NaN"),
    sqlite_with_rowid=False,
)

drop = sa.Table(
    "drop_total",
    metadata,
    sa.Column("source_id", sa.ForeignKey("source.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("reason", sa.Text, primary_key=True),
    sa.Column("rows", sa.BigInteger, nullable=False, comment="rows that the agent dropped since the source started"),
    sqlite_with_rowid=False,
)

# Who may send, and who may read /metrics: storage/tokens.py.
token = sa.Table(
    "token",
    metadata,
    sa.Column("id", _BIG, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column(
        "secret_sha256",
        sa.Text,
        nullable=False,
        unique=True,
        comment="hexadecimal; the secret itself is stored nowhere",
    ),
    sa.Column("scope", sa.Text, nullable=False, comment="ingest | read | admin"),
    sa.Column("project", sa.Text, nullable=True, comment="null: every project"),
    sa.Column("run", sa.Text, nullable=True, comment="null: every run"),
    sa.Column("created_unix_ns", sa.BigInteger, nullable=False),
    sa.Column("expires_unix_ns", sa.BigInteger, nullable=True, comment="null: never"),
    sa.Column("revoked_unix_ns", sa.BigInteger, nullable=True, comment="null: not revoked"),
    sa.Column("last_used_unix_ns", sa.BigInteger, nullable=True, comment="to a minute; null: never"),
    sa.Column("max_rows_per_s", sa.BigInteger, nullable=True, comment="of all its streams together; null: no limit"),
    sa.Column("max_streams", sa.Integer, nullable=True, comment="open at once, on each collector; null: no limit"),
    sa.Column("max_runs", sa.Integer, nullable=True, comment="that it may make; null: no limit"),
)

# How old a step is: storage/retention.py. Statistics have no time of their own.
milestone = sa.Table(
    "milestone",
    metadata,
    sa.Column("run_id", sa.ForeignKey("run.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("incarnation", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("reached_unix_ns", sa.BigInteger, primary_key=True, autoincrement=False, comment="collector's clock"),
    sa.Column("step", sa.BigInteger, nullable=False, comment="every rank had committed up to here by then"),
    sqlite_with_rowid=False,
)

# Who wrote and deleted what: storage/audit.py. It outlives what it is about, so nothing refers to it.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", _BIG, primary_key=True),
    sa.Column("at_unix_ns", sa.BigInteger, nullable=False),
    sa.Column("actor", sa.Text, nullable=False, comment="token NAME | peer ADDRESS | USER@HOST | collector"),
    sa.Column("action", sa.Text, nullable=False, comment="open | prune | delete | token create | token revoke"),
    sa.Column("subject", sa.Text, nullable=False, comment="project/name of the run, or the token's name"),
    sa.Column("detail_json", sa.Text, nullable=False, server_default="{}", comment="JSON object, by action"),
)

# What diagnosis found: a row for each episode of one rule and one tensor. The texts are as the rule had them then.
finding = sa.Table(
    "finding",
    metadata,
    sa.Column("id", _BIG, primary_key=True),
    sa.Column("run_id", sa.ForeignKey("run.id", ondelete="CASCADE"), nullable=False),
    sa.Column("rule", sa.Text, nullable=False),
    sa.Column("slot", sa.Integer, nullable=False, comment="slot.slot; -1: the whole run"),
    sa.Column("severity", sa.Text, nullable=False, comment="info | warning | critical: the episode's worst"),
    sa.Column("ranks_json", sa.Text, nullable=False, comment="JSON array of the ranks that have it"),
    sa.Column("first_step", sa.BigInteger, nullable=False),
    sa.Column("last_step", sa.BigInteger, nullable=False),
    sa.Column("first_row", sa.BigInteger, nullable=False, comment="recorded steps of the run before first_step"),
    sa.Column("last_row", sa.BigInteger, nullable=False, comment="recorded steps of the run before last_step"),
    sa.Column("rows", sa.BigInteger, nullable=False, comment="recorded steps, of each rank, that were marked"),
    sa.Column("worst", sa.Double, nullable=True, comment="how bad it was, in a unit of the rule's own"),
    sa.Column("worst_step", sa.BigInteger, nullable=False),
    sa.Column("numbers_json", sa.Text, nullable=False, comment="JSON object: evidence at worst_step"),
    sa.Column("note", sa.Text, nullable=False, comment="what the rule says of worst_step, in words"),
    sa.Column("says", sa.Text, nullable=False, comment="what is wrong, in words"),
    sa.Column("evidence", sa.Text, nullable=False, comment="what was seen, in numbers"),
    sa.Column("cause", sa.Text, nullable=False, comment="what usually causes it"),
    sa.Column("remedy", sa.Text, nullable=False, comment="what to do, in words"),
    sa.Column("change", sa.Text, nullable=False, comment="the same as Python or a setting; empty: there is none"),
    sa.Column("opened_unix_ns", sa.BigInteger, nullable=False, comment="collector's clock"),
    sa.Column("updated_unix_ns", sa.BigInteger, nullable=False),
    sa.Column("closed_unix_ns", sa.BigInteger, nullable=True, comment="null: open"),
    sa.Column("ending", sa.Text, nullable=True, comment="cleared | ended | rewritten; null: open"),
    sa.Column("acknowledged_unix_ns", sa.BigInteger, nullable=True, comment="null: nobody has"),
    sa.Column("acknowledged_by", sa.Text, nullable=True),
    sa.Column("acknowledged_reason", sa.Text, nullable=True),
    sa.UniqueConstraint("run_id", "rule", "slot", "first_step"),
)

# How far diagnosis has come with a run.
judged = sa.Table(
    "judged",
    metadata,
    sa.Column("run_id", sa.ForeignKey("run.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("step", sa.BigInteger, nullable=False, comment="steps up to this one are judged; -1: none"),
    sa.Column("rows", sa.BigInteger, nullable=False, comment="recorded steps judged"),
    sa.Column("sources_json", sa.Text, nullable=False, comment="JSON object: source.id to the last step of it judged"),
    sa.Column("updated_unix_ns", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

# Of several collectors on one database one does what must be done once.
lease = sa.Table(
    "lease",
    metadata,
    sa.Column("task", sa.Text, primary_key=True, comment="diagnosis"),
    sa.Column("holder", sa.Text, nullable=False, comment="the process that does it"),
    sa.Column("until_unix_ns", sa.BigInteger, nullable=False, comment="from then on another may take it"),
    sqlite_with_rowid=False,
)
