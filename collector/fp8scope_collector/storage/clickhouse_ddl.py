"""ClickHouse's tables as SQL: of one server, of chDB, or of a cluster with shards and replicas.

A row of `stats_by_step` is what one batch brought of one step and 256 slots, an array for each field (docs/adr/0086).
`stats` is a view that has a row for each tensor, for whoever asks in SQL.

A cluster has the rows in `stats_by_step_local`, replicated within each shard, and `stats_by_step` distributes over the
shards by source. `fp8scope clickhouse-ddl` prints this for whoever creates tables by hand; a collector executes the
same statements when it starts.
"""

from __future__ import annotations

from collections.abc import Collection

from fp8core.records import FIELDS, Field

STATS_BY_STEP = "stats_by_step"
STATS = "stats"
RUNS_A_PARTITION = 100
SLOTS_A_BLOCK = 256

TYPES = {"float32": "Float32", "float64": "Float64", "int32": "Int32", "int64": "Int64", "uint64": "Int64"}
_TUNED = {
    "auto_statistics_types": "''",
    "merge_selector_base": "20",
    "merge_max_block_size_bytes": str(1 << 20),
    "vertical_merge_algorithm_min_rows_to_activate": "1",
    "min_columns_to_activate_adaptive_write_buffer": "1",
}
_TUNED_IN_A_FOLDER = {"min_bytes_for_full_part_storage": str(32 << 20)}
_INSERTS_REMEMBERED = 1000  # whose tokens are compared


def create_tables(cluster: str | None = None) -> list[str]:
    """The statements that create what is not there, in their order; the last one makes the view anew."""
    return [_table(cluster), *([_distributed(cluster)] if cluster else []), _view(cluster)]


def missing_columns(cluster: str | None, known: Collection[str]) -> list[str]:
    """The statements that add the fields that are not among the `known` columns."""
    return [
        f"ALTER TABLE {table}{_on(cluster)} ADD COLUMN IF NOT EXISTS {_column(field)}"
        for table in dict.fromkeys((local(cluster), STATS_BY_STEP))
        for field in FIELDS
        if field.name not in known
    ]


def tune(cluster: str | None, known: Collection[str], *, folder: bool = False) -> list[str]:
    """The statements that set what makes merges and inserts cheap, of the table settings that this server has.

    Rows are merged in one step into parts 20 times as large, not in two: each row is written anew half as often. Large
    parts are merged column after column, which takes a sixth of the memory (docs/adr/0087). Statistics of each column
    are for the planner; our queries name the key.

    In a `folder` of chDB an insert is one file instead of a dozen, each of which has to be made and synced. A server's
    parts may have to be read by a version before 26.7, which cannot (docs/adr/0088).
    """
    return [
        f"ALTER TABLE {local(cluster)}{_on(cluster)} MODIFY SETTING {name} = {value}"
        for name, value in (_TUNED | (_TUNED_IN_A_FOLDER if folder else {})).items()
        if name in known
    ]


def local(cluster: str | None) -> str:
    """The table that holds the rows: in a cluster each server's own part."""
    return f"{STATS_BY_STEP}_local" if cluster else STATS_BY_STEP


def _column(field: Field) -> str:
    comment = f"{field.definition} ({field.unit})".replace("\\", "\\\\").replace("'", "\\'")
    codec = "LZ4" if field.dtype.startswith("float") else "T64, LZ4"
    return f"{field.name} Array({TYPES[field.dtype]}) CODEC({codec}) COMMENT '{comment}'"


def _table(cluster: str | None) -> str:
    columns = [
        "run_id Int64 CODEC(Delta, LZ4) COMMENT 'run.id'",
        "source_id Int64 CODEC(Delta, LZ4) COMMENT 'source.id'",
        f"slot_block Int64 CODEC(Delta, LZ4) COMMENT 'slot / {SLOTS_A_BLOCK}'",
        "step Int64 CODEC(Delta, LZ4) COMMENT 'optimizer step'",
        "seq Int64 CODEC(Delta, LZ4) COMMENT 'number of the batch; of two that have a slot the higher counts'",
        "slot Array(Int32) CODEC(Delta(4), LZ4) COMMENT 'slot.slot, ascending; a field has as many values, or none'",
        *map(_column, FIELDS),
    ]
    engine = "ReplacingMergeTree"
    settings = {"fsync_after_insert": 1, "fsync_part_directory": 1}  # an insert that returned is on disk
    settings["min_bytes_for_wide_part"] = 64 << 20  # an insert is one file of columns to sync, not thirty
    settings["index_granularity_bytes"] = 512 << 10  # what is read at least: two dozen steps of a block of slots
    if cluster:
        engine = "ReplicatedReplacingMergeTree('/clickhouse/tables/{shard}/{database}/{table}', '{replica}')"
        settings["replicated_deduplication_window"] = _INSERTS_REMEMBERED
    else:
        settings["non_replicated_deduplication_window"] = _INSERTS_REMEMBERED
    lines = [
        f"CREATE TABLE IF NOT EXISTS {local(cluster)}{_on(cluster)} (",
        ",\n".join(f"    {column}" for column in columns),
        ")",
        f"ENGINE = {engine}",
        f"PARTITION BY intDiv(run_id, {RUNS_A_PARTITION})",
        "ORDER BY (run_id, source_id, slot_block, step, seq)",
        "SETTINGS " + ", ".join(f"{key} = {value}" for key, value in settings.items()),
    ]
    return "\n".join(lines)


def _distributed(cluster: str | None) -> str:
    """By source, so that a batch goes to one shard whole."""
    return (
        f"CREATE TABLE IF NOT EXISTS {STATS_BY_STEP}{_on(cluster)} AS {local(cluster)}\n"
        f"ENGINE = Distributed('{cluster}', currentDatabase(), {local(cluster)}, source_id)"
    )


def _view(cluster: str | None) -> str:
    """A row for each tensor; NaN and what its batch did not have are null."""
    names = ", ".join(field.name for field in FIELDS)
    whole = []
    for field in FIELDS:
        known = field.name
        if TYPES[field.dtype].startswith("Float"):
            known = f"arrayMap(value -> if(isNaN(value), NULL, value), {field.name})"
        whole.append(f"if(empty({field.name}), arrayWithConstant(length(slot), NULL), {known}) AS {field.name}")
    return (
        f"CREATE OR REPLACE VIEW {STATS}{_on(cluster)} AS\n"
        f"SELECT run_id, source_id, step, slot, seq, {names}\n"
        f"FROM (SELECT run_id, source_id, step, seq, slot, {', '.join(whole)} FROM {STATS_BY_STEP} FINAL)\n"
        f"ARRAY JOIN slot, {names}"
    )


def _on(cluster: str | None) -> str:
    return f" ON CLUSTER '{cluster}'" if cluster else ""
