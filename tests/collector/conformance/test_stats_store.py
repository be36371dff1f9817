"""What every `StatsStore` promises: rows come back exactly, once, by spans, slots and steps, and go when told."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa

from fp8core.records import FIELDS
from fp8scope_collector.decode import decode_histograms, decode_open, decode_stats
from fp8scope_collector.limits import Limits
from fp8scope_collector.messages import Batch, Source
from fp8scope_collector.storage import samples
from fp8scope_collector.storage.history import FIRST_STEP, LAST_STEP, Span
from fp8scope_collector.storage.stats_store import row_schema
from fp8scope_protos.v1 import telemetry_pb2 as pb

NAMES = [field.name for field in FIELDS]


def test_rows_come_back_exactly_and_in_order(kept: Any, wire: Any) -> None:
    source = register(kept, wire)
    columns = wire.columns(3, steps=2)
    columns["amax"][:6] = np.array([0.1, 1e-45, np.finfo(np.float32).max, 0.25, 448, np.inf], np.float32)
    columns["numel"][:6] = np.array([0, 1, 2**31, 2**53 + 1, 2**63 - 1, 7], np.uint64)
    columns["sum_sq"][:6] = np.array([1 / 3, 5e-324, 1.7e308, 0, np.inf, 1], np.float64)
    backwards = {name: column[::-1].copy() for name, column in columns.items()}

    commit(kept, [decode(wire.stats(1, backwards), source)])

    table = read(kept, [whole(source)])
    assert table.schema == row_schema(NAMES)
    assert table["source_id"].to_pylist() == [source.id] * 12
    for name, column in columns.items():
        np.testing.assert_array_equal(table[name].to_numpy().astype(column.dtype), column, err_msg=name)


def test_absent_columns_and_nan_are_null(kept: Any, wire: Any) -> None:
    source = register(kept, wire)
    with_nan, without = wire.columns(1), wire.columns(2)
    with_nan["err_sq"][2] = np.nan
    del without["err_sq"], without["underflow"]

    commit(kept, [decode(wire.stats(1, with_nan), source), decode(wire.stats(2, without), source)])

    table = read(kept, [whole(source)], ["err_sq", "underflow"])
    assert table["err_sq"].is_null().to_pylist() == [False, False, True, False, False, False] + [True] * 6
    assert table["underflow"].is_null().to_pylist() == [False] * 6 + [True] * 6


def test_a_batch_is_written_once_however_often_it_comes(kept: Any, wire: Any) -> None:
    source = register(kept, wire)
    batches = [decode(wire.stats(seq, wire.columns(seq)), source) for seq in (1, 2, 5)]
    commit(kept, batches)
    before = read(kept, [whole(source)])
    changed = wire.columns(1)
    changed["amax"] += 1

    commit(kept, [*batches, decode(wire.stats(4, changed), source)])

    assert read(kept, [whole(source)]).equals(before)
    assert before.num_rows == 18


def test_a_transaction_that_is_repeated_after_it_failed_leaves_each_row_once(kept: Any, wire: Any) -> None:
    source = register(kept, wire)
    batches = [decode(wire.stats(seq, wire.columns(seq)), source) for seq in (1, 2)]
    with kept.engine.connect() as connection, connection.begin() as transaction:
        kept.store.write(connection, batches)
        transaction.rollback()

    commit(kept, [*batches, decode(wire.stats(3, wire.columns(3)), source)])

    table = read(kept, [whole(source)])
    assert table["step"].to_pylist() == [step for step in (1, 2, 3) for _ in range(6)]


def test_a_row_that_is_sent_again_replaces_the_first(kept: Any, wire: Any) -> None:
    source = register(kept, wire)

    def versions(*amax: float) -> dict[str, np.ndarray]:
        one = {name: column[:1] for name, column in wire.columns(1).items()}
        return {n: np.repeat(c, len(amax)) for n, c in one.items()} | {"amax": np.array(amax, np.float32)}

    commit(kept, [decode(wire.stats(1, versions(10)), source)])
    commit(kept, [decode(wire.stats(3, versions(30, 31)), source), decode(wire.stats(2, versions(20)), source)])

    assert read(kept, [whole(source)], ["amax"])["amax"].to_pylist() == [31.0]


def test_spans_and_slots_choose_rows(kept: Any, wire: Any) -> None:
    first, second = register(kept, wire), register(kept, wire, rank=1)
    for seq, step in enumerate([0, 4, 5, 9], start=1):
        commit(kept, [decode(wire.stats(seq, wire.columns(step)), source) for source in (second, first)])

    spans = [Span(second.id, 1, 4, 5), Span(first.id, 1, 5, LAST_STEP)]
    some = read(kept, spans, ["amax"], slots=[4, 1])
    every = read(kept, spans, ["amax"])

    key = ("source_id", "step", "slot")
    expected = [(source.id, step, slot) for source, step in [(second, 4), (second, 5), (first, 5), (first, 9)]
                for slot in range(6)]  # fmt: skip
    assert list(zip(*(every[name].to_pylist() for name in key), strict=True)) == expected
    assert list(zip(*(some[name].to_pylist() for name in key), strict=True)) == [k for k in expected if k[2] in (1, 4)]


def test_short_spans_of_many_sources_come_one_after_another_and_exactly(kept: Any, wire: Any) -> None:
    sources = [register(kept, wire, rank=rank) for rank in range(7)]
    for seq, step in enumerate([3, 4, 5, 40], start=1):
        columns = wire.columns(step)
        columns["amax"][:2] = math.nan
        del columns["overflow"]
        commit(kept, [decode(wire.stats(seq, columns), source) for source in sources])

    spans = [Span(source.id, 1, 4, last) for source, last in zip(sources[::-1], (4, 8, 4, 50, 5, 4, 60), strict=True)]
    spans.append(Span(sources[3].id, 1, 0, 3))
    table, some = read(kept, spans, NAMES), read(kept, spans, NAMES, slots=[5, 0])

    expected = [
        (span.source_id, step, slot)
        for span in spans for step in (3, 4, 5, 40) if span.first_step <= step <= span.last_step for slot in range(6)
    ]  # fmt: skip
    assert list(zip(*(table[name].to_pylist() for name in ("source_id", "step", "slot")), strict=True)) == expected
    assert table["amax"].to_pylist() == [None if slot < 2 else step * 64 + slot for _, step, slot in expected]
    assert table["overflow"].null_count == table.num_rows
    for name in set(NAMES) - {"amax", "overflow"}:
        index = NAMES.index(name)
        assert table[name].to_pylist() == [step * 64 + slot + index for _, step, slot in expected]
    assert some.equals(table.filter(np.isin(table["slot"].to_numpy(), [0, 5])))


def test_of_each_stretch_of_steps_the_first_that_is_there_comes(kept: Any, wire: Any) -> None:
    sources = [register(kept, wire, rank=rank) for rank in (0, 1)]
    for source, steps in zip(sources, [(0, 1, 2, 5, 9, 10, 12), (3, 4, 7, 300)], strict=True):
        commit(kept, [decode(wire.stats(step + 1, wire.columns(step)), source) for step in steps])

    spans = [whole(sources[1]), Span(sources[0].id, 1, 1, 11)]
    table = read(kept, spans, ["amax"], slots=[4], every=4)

    assert table["step"].to_pylist() == [3, 4, 300, 1, 5, 9]
    assert table["slot"].to_pylist() == [4] * 6
    assert table["amax"].to_pylist() == [step * 64 + 4 for step in (3, 4, 300, 1, 5, 9)]


def test_batches_are_bounded(kept: Any, wire: Any) -> None:
    source = register(kept, wire)
    commit(kept, [decode(wire.stats(1, wire.columns(0, steps=800)), source)])

    for most in (70, 2100, 4500):
        with kept.engine.connect() as connection:
            batches = list(kept.store.rows(connection, [whole(source)], ["amax"], batch_rows=most))

        assert max(batch.num_rows for batch in batches) <= most
        assert [amax for batch in batches for amax in batch["amax"].to_pylist()] == [
            step * 64 + slot for step in range(800) for slot in range(6)
        ]


def test_steps_are_those_recorded(kept: Any, wire: Any) -> None:
    source, other = register(kept, wire), register(kept, wire, rank=1)
    for seq, step in enumerate([0, 4, 5, 9], start=1):
        commit(kept, [decode(wire.stats(seq, wire.columns(step)), source)])
    commit(kept, [decode(wire.stats(1, wire.columns(7)), other)])

    with kept.engine.connect() as connection:
        assert kept.store.last_steps(connection, source.id, 3) == [9, 5, 4]
        assert kept.store.last_steps(connection, source.id, 9) == [9, 5, 4, 0]
        assert kept.store.last_steps(connection, 10**6, 3) == []
        spans = [Span(source.id, 1, 1, 5), Span(other.id, 1, FIRST_STEP, LAST_STEP)]
        found = kept.store.steps(connection, spans)

    assert sorted(found) == sorted([(source.id, 4), (source.id, 5), (other.id, 7)])


def test_pruning_takes_the_old_steps_of_one_source_and_deletion_all(kept: Any, wire: Any) -> None:
    source, other = register(kept, wire), register(kept, wire, rank=1)
    commit(kept, [decode(wire.stats(1, wire.columns(0, steps=10)), each) for each in (source, other)])

    with kept.engine.begin() as connection:
        kept.store.prune(connection, source.id, 7)

    assert set(read(kept, [whole(source)])["step"].to_pylist()) == {7, 8, 9}
    assert read(kept, [whole(other)]).num_rows == 60

    with kept.engine.begin() as connection:
        kept.store.delete(connection, [source.id])

    assert read(kept, [whole(source)]).num_rows == 0
    assert read(kept, [whole(other)]).num_rows == 60


def test_histograms_come_back_and_the_last_one_of_a_step_counts(kept: Any, wire: Any) -> None:
    source, other = register(kept, wire), register(kept, wire, rank=1)
    first = wire.histograms(1, [(4, 2, 0, [7, 2**40]), (4, 3, 255, [1]), (9, 2, 120, [])])
    second = wire.histograms(2, [(9, 2, 5, [2**63 - 1, 0, 3])])

    commit(kept, [decode_histograms(message, source, Limits()) for message in (first, second)])
    commit(kept, [decode_histograms(wire.histograms(1, [(4, 2, 1, [1])]), other, Limits())])

    with kept.engine.connect() as connection:
        found = list(samples.histograms(connection, [whole(source)], 2))
        part = list(samples.histograms(connection, [Span(source.id, 1, 5, 9)], 3))
    assert [(row.source_id, row.step, row.first_bin, row.counts.tolist()) for row in found] == [
        (source.id, 4, 0, [7, 2**40]),
        (source.id, 9, 5, [2**63 - 1, 0, 3]),
    ]
    assert part == []


def test_extra_numbers_come_back_and_the_last_one_of_a_step_counts(kept: Any, wire: Any) -> None:
    source = register(kept, wire)
    numbers = [(1, 2, "underflow%", 0.5), (1, 2, "mse", math.nan), (2, 2, "mse", math.inf), (1, 3, "mse", 9.0)]
    extras = [pb.Extra(step=step, slot=slot, name=name, value=value) for step, slot, name, value in numbers]

    commit(kept, [decode(wire.stats(1, {}, extras=extras), source)])
    commit(kept, [decode(wire.stats(2, {}, extras=[pb.Extra(step=2, slot=2, name="mse", value=-1.5)]), source)])

    with kept.engine.connect() as connection:
        found = [(e.step, e.name, e.value) for e in samples.extras(connection, [whole(source)], 2)]
    assert repr(found) == repr([(1, "mse", math.nan), (1, "underflow%", 0.5), (2, "mse", -1.5)])


def register(kept: Any, wire: Any, **opening: Any) -> Source:
    source: Source = kept.writer.register(decode_open(wire.open(**opening), Limits()), now_unix_ns=1)
    return source


def decode(message: Any, source: Source) -> Batch:
    return decode_stats(message, source, Limits())


def commit(kept: Any, batches: list[Batch]) -> None:
    kept.writer.commit(batches, now_unix_ns=1)


def whole(source: Source) -> Span:
    return Span(source.id, source.incarnation, FIRST_STEP, LAST_STEP)


def read(kept: Any, spans: list[Span], fields: list[str] = NAMES, **options: Any) -> pa.Table:
    with kept.engine.connect() as connection:
        return pa.Table.from_batches(list(kept.store.rows(connection, spans, fields, **options)), row_schema(fields))
