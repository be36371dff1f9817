"""ClickHouse's tables as SQL: of one server, of chDB, or of a cluster with shards and replicas.

A cluster has the rows in `stats_local`, replicated within each shard, and `stats` distributes over the shards by
source: all versions of a row meet on one shard, where the later batch replaces the earlier. `fp8scope clickhouse-ddl`
prints this for whoever creates tables by hand; a collector executes the same statements when it starts.
"""

from __future__ import annotations

from collections.abc import Collection

from fp8core.records import FIELDS

STATS = "stats"
STATS_STEP = "stats_step"
STEPS_A_BLOCK = 256
RUNS_A_PARTITION = 100

TYPES = {"float32": "Float32", "float64": "Float64", "int32": "Int32", "int64": "Int64", "uint64": "Int64"}
_TUNED = {"auto_statistics_types": "''", "merge_selector_base": "20"}
_INSERTS_REMEMBERED = 1000  # whose tokens are compared


def create_tables(cluster: str | None = None) -> list[str]:
    """The statements that create what is not there, in their order."""
    stats = [
        "run_id Int64 CODEC(Delta, LZ4) COMMENT 'run.id'",
        "source_id Int64 CODEC(Delta, LZ4) COMMENT 'source.id'",
        "step Int64 CODEC(Delta, LZ4) COMMENT 'optimizer step'",
        "slot Int32 CODEC(Delta, LZ4) COMMENT 'slot.slot'",
        "seq Int64 CODEC(Delta, LZ4) COMMENT 'number of the batch that brought the row; the highest counts'",
        *(_field_column(name) for name in (field.name for field in FIELDS)),
    ]
    steps = [
        "run_id Int64 COMMENT 'run.id'",
        "source_id Int64 COMMENT 'source.id'",
        "step Int64 CODEC(Delta, LZ4) COMMENT 'a step that the source recorded'",
    ]
    order = f"(run_id, intDiv(step, {STEPS_A_BLOCK}), slot, source_id, step)"
    partition = f"intDiv(run_id, {RUNS_A_PARTITION})"
    statements = [
        _table(STATS, cluster, stats, version="seq", order=order, partition=partition),
        _table(STATS_STEP, cluster, steps, version="", order="(source_id, step)", partition=None),
    ]
    if cluster:
        statements += [_distributed(STATS, cluster), _distributed(STATS_STEP, cluster)]
    return statements


def missing_columns(table: str, cluster: str | None, known: Collection[str]) -> list[str]:
    """The statements that add to `table` the fields that are not among its `known` columns."""
    return [
        f"ALTER TABLE {table}{_on(cluster)} ADD COLUMN IF NOT EXISTS {_field_column(field.name)}"
        for field in FIELDS
        if field.name not in known
    ]


def tune(table: str, cluster: str | None, known: Collection[str]) -> list[str]:
    """The statements that set what makes merges and inserts cheap, of the table settings that this server has.

    Rows are merged in one step into parts 20 times as large, not in two: each row is written anew half as often.
    Statistics of each column are for the planner; our queries name the key.
    """
    return [
        f"ALTER TABLE {local(table, cluster)}{_on(cluster)} MODIFY SETTING {name} = {value}"
        for name, value in _TUNED.items()
        if name in known
    ]


def local(table: str, cluster: str | None) -> str:
    """The table that holds the rows: in a cluster each server's own part."""
    return f"{table}_local" if cluster else table


def _field_column(name: str) -> str:
    field = next(field for field in FIELDS if field.name == name)
    comment = f"{field.definition} ({field.unit})".replace("\\", "\\\\").replace("'", "\\'")
    codec = "LZ4" if field.dtype.startswith("float") else "T64, LZ4"
    return f"{name} Nullable({TYPES[field.dtype]}) CODEC({codec}) COMMENT '{comment}'"


def _table(
    name: str, cluster: str | None, columns: list[str], *, version: str, order: str, partition: str | None
) -> str:
    engine = f"ReplacingMergeTree({version})"
    settings = {"fsync_after_insert": 1, "fsync_part_directory": 1}  # an insert that returned is on disk
    settings["min_bytes_for_wide_part"] = 64 << 20  # an insert is one file of columns to sync, not thirty
    if cluster:
        arguments = ", ".join(filter(None, ["'/clickhouse/tables/{shard}/{database}/{table}'", "'{replica}'", version]))
        engine = f"ReplicatedReplacingMergeTree({arguments})"
        settings["replicated_deduplication_window"] = _INSERTS_REMEMBERED
    else:
        settings["non_replicated_deduplication_window"] = _INSERTS_REMEMBERED
    lines = [
        f"CREATE TABLE IF NOT EXISTS {local(name, cluster)}{_on(cluster)} (",
        ",\n".join(f"    {column}" for column in columns),
        ")",
        f"ENGINE = {engine}",
        *([f"PARTITION BY {partition}"] if partition else []),
        f"ORDER BY {order}",
        "SETTINGS " + ", ".join(f"{key} = {value}" for key, value in settings.items()),
    ]
    return "\n".join(lines)


def _distributed(name: str, cluster: str) -> str:
    """By source, so that a batch goes to one shard whole."""
    return (
        f"CREATE TABLE IF NOT EXISTS {name}{_on(cluster)} AS {local(name, cluster)}\n"
        f"ENGINE = Distributed('{cluster}', currentDatabase(), {local(name, cluster)}, source_id)"
    )


def _on(cluster: str | None) -> str:
    return f" ON CLUSTER '{cluster}'" if cluster else ""
