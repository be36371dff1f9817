"""What /metrics says, as Prometheus parses it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fp8scope_collector.decode import decode_open, decode_stats
from fp8scope_collector.limits import Limits
from fp8scope_collector.messages import Batch, Source
from fp8scope_collector.metrics import COMMIT_BUCKETS_S, FINDINGS_PER_RUN, MAX_RUNS, Metrics
from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.findings import FindingsNow, OpenFinding
from fp8scope_collector.storage.overview import RunState
from fp8scope_collector.storage.writer import StatsWriter
from fp8scope_protos.v1 import telemetry_pb2 as pb

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
Samples = dict[tuple[str, ...], float]


def test_every_metric_has_its_line_in_the_documentation_and_every_line_its_metric(wire: Any) -> None:
    lines = re.findall(r"^\| `(fp8scope_\w+)` \| (\w+) \| ([\w, ]*) ?\| \w", DOCUMENT.read_text(), re.MULTILINE)
    documented = {
        name: (kind, {label for label in labels.replace(" ", "").split(",") if label}) for name, kind, labels in lines
    }

    exposed = {}
    for family in text_string_to_metric_families(_text(_busy(wire))):
        name = family.name + ("_total" if family.type == "counter" else "")
        exposed[name] = (family.type, {label for sample in family.samples for label in sample.labels} - {"le"})

    assert exposed == documented


def test_counters_start_at_zero_for_what_is_known() -> None:
    metrics = Metrics("1.2.3")
    metrics.observe_source(_source())
    metrics.observe_database([RunState("run", None, 0, True, {})], 0)

    samples = _samples(metrics)

    for outcome in ("committed", "duplicate", "refused"):
        assert samples["fp8scope_ingest_batches_total", f"outcome={outcome}"] == 0
    for role in ("input", "weight", "grad_output"):
        assert samples["fp8scope_overflow_elements_total", f"role={role}", "run=run"] == 0
    for reason in ("ring_full", "spool_full", "spool_error"):
        assert samples["fp8scope_agent_dropped_rows_total", f"reason={reason}", "run=run"] == 0
    assert samples["fp8scope_build_info", "version=1.2.3"] == 1
    assert not [name for name, *_ in samples if name == "fp8scope_run_last_step"], "no step yet is not step 0"


def test_elements_are_summed_by_role(wire: Any) -> None:
    metrics = Metrics("0")
    columns = wire.columns(1)
    columns["overflow"] = np.array([1, 2, 3, 10, 20, 30], np.uint64)
    columns["numel"] = np.full(6, 1000, np.uint64)
    del columns["underflow"]

    metrics.observe_rows(_batch(wire, columns))
    metrics.observe_rows(_batch(wire, columns))
    samples = _samples(metrics)

    def sums(name: str) -> list[float]:
        return [
            samples[f"fp8scope_{name}_total", f"role={role}", "run=run"] for role in ("input", "weight", "grad_output")
        ]

    assert sums("overflow_elements") == [22, 44, 66]
    assert sums("elements") == [4000, 4000, 4000]
    assert sums("underflow_elements") == [0, 0, 0]
    assert samples[("fp8scope_ingest_rows_total",)] == 12


def test_worst_values_are_of_the_newest_step(wire: Any) -> None:
    metrics = Metrics("0")

    metrics.observe_rows(_batch(wire, _two_layers(wire, step=8, overflow=(90, 0), amax=(448, 1))))
    metrics.observe_rows(_batch(wire, _two_layers(wire, step=9, overflow=(5, 2), amax=(0.5, 7))))
    metrics.observe_rows(_batch(wire, _two_layers(wire, step=3, overflow=(99, 0), amax=(900, 1))))

    assert _worst(metrics) == (0.05, pytest.approx(math.log2(448) - math.log2(7 * 2)))


def test_of_a_batch_with_two_steps_the_newer_has_the_worst_values(wire: Any) -> None:
    metrics = Metrics("0")
    older = _two_layers(wire, step=8, overflow=(90, 0), amax=(448, 1))
    newer = _two_layers(wire, step=9, overflow=(5, 2), amax=(0.5, 7))

    metrics.observe_rows(_batch(wire, {name: np.concatenate([older[name], newer[name]]) for name in newer}))

    assert _worst(metrics) == (0.05, pytest.approx(math.log2(448) - math.log2(7 * 2)))


def test_parts_of_one_step_and_ranks_are_merged_to_the_worst(wire: Any) -> None:
    metrics = Metrics("0")

    metrics.observe_rows(_batch(wire, _two_layers(wire, step=9, overflow=(5, 2), amax=(4, 7)), rank=0))
    metrics.observe_rows(_batch(wire, _two_layers(wire, step=9, overflow=(1, 1), amax=(1, 28)), rank=0))
    metrics.observe_rows(_batch(wire, _two_layers(wire, step=7, overflow=(8, 1), amax=(1, 1)), rank=1))

    assert _worst(metrics) == (0.08, pytest.approx(math.log2(448) - math.log2(28 * 2)))


def test_a_new_incarnation_starts_over_at_whatever_step(wire: Any) -> None:
    metrics = Metrics("0")

    metrics.observe_rows(_batch(wire, _two_layers(wire, step=900, overflow=(50, 0), amax=(400, 1)), incarnation=1))
    metrics.observe_rows(_batch(wire, _two_layers(wire, step=20, overflow=(1, 0), amax=(1, 1)), incarnation=2))
    metrics.observe_rows(_batch(wire, _two_layers(wire, step=901, overflow=(60, 0), amax=(400, 1)), incarnation=1))

    assert _worst(metrics) == (0.01, pytest.approx(math.log2(448) - 1))


@pytest.mark.parametrize("amax", [0.0, np.nan, np.inf])
def test_a_tensor_without_a_usable_amax_has_no_headroom(wire: Any, amax: float) -> None:
    metrics = Metrics("0")
    columns = _two_layers(wire, step=1, overflow=(0, 0), amax=(amax, amax))
    columns["numel"][:] = 0

    metrics.observe_rows(_batch(wire, columns))

    assert _worst(metrics) == (None, None)


def test_only_the_runs_active_last_are_kept(wire: Any) -> None:
    metrics = Metrics("0")

    for run_id in range(MAX_RUNS + 5):
        metrics.observe_rows(_batch(wire, wire.columns(1), run_id=run_id))
        metrics.observe_source(_source(run_id=0))

    shown = {name[2] for name in _samples(metrics) if name[0] == "fp8scope_elements_total"}
    assert shown == {f"run=run{run_id or ''}" for run_id in [0, *range(6, MAX_RUNS + 5)]}


def test_reasons_that_agents_make_up_stay_few() -> None:
    metrics = Metrics("0")

    metrics.observe_database([RunState("run", 1, 1, True, {f"r{i:02}": 1 for i in range(40)})], 0)

    shown = {
        name[1]: value for name, value in _samples(metrics).items() if name[0] == "fp8scope_agent_dropped_rows_total"
    }
    assert len(shown) == 17
    assert shown["reason=other"] == 27


def test_commits_are_counted_in_buckets() -> None:
    metrics = Metrics("0")

    for seconds in (0.001, 0.005, 0.3, 60):
        metrics.observe_commit(seconds)
    samples = _samples(metrics)

    buckets = [samples["fp8scope_commit_seconds_bucket", f"le={bound}"] for bound in (*COMMIT_BUCKETS_S, "+Inf")]
    assert buckets == [2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4]
    assert samples[("fp8scope_commit_seconds_count",)] == 4
    assert samples[("fp8scope_commit_seconds_sum",)] == pytest.approx(60.306)


def test_names_are_escaped(wire: Any) -> None:
    metrics = Metrics("0")
    name = 'p/"q\\"}'

    metrics.observe_database([RunState(name, 7, 1_500_000_000, True, {})], 0)

    assert _samples(metrics)["fp8scope_run_last_step", f"run={name}"] == 7


def test_a_restart_keeps_what_is_said_of_runs(
    start_collector: Callable[..., Any], connect: Callable[..., Any], wire: Any, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/test.db"
    collector = start_collector(url)
    for rank, outcome in [(0, pb.OUTCOME_FINISHED), (1, pb.OUTCOME_FAILED)]:
        stream = connect(collector.grpc, wire.open("done", rank=rank))
        stream.send(stats=wire.stats(1, wire.columns(41 + rank), drops=[pb.Drop(reason="ring_full", rows=3)]))
        stream.send(finish=wire.finish(2, outcome))
        stream.finish_sending()
    stream = connect(collector.grpc, wire.open("going", project="team"))
    stream.send(stats=wire.stats(1, wire.columns(5)))
    stream.wait_ack(1)
    live = collector.metrics()
    collector.terminate()

    restarted = start_collector(url)
    deadline = time.monotonic() + 10
    while ("fp8scope_run_active", "run=done") not in (samples := restarted.metrics()) and time.monotonic() < deadline:
        time.sleep(0.05)

    assert live[("fp8scope_ingest_rows_total",)] == 18
    assert live[("fp8scope_open_streams",)] == 1
    assert live["fp8scope_ingest_batches_total", "outcome=committed"] == 5
    assert samples[("fp8scope_ingest_rows_total",)] == 0
    assert samples["fp8scope_run_last_step", "run=done"] == 42
    assert samples["fp8scope_run_active", "run=done"] == 0
    assert samples["fp8scope_agent_dropped_rows_total", "reason=ring_full", "run=done"] == 6
    assert samples["fp8scope_run_last_step", "run=team/going"] == 5
    assert samples["fp8scope_run_active", "run=team/going"] == 1
    assert abs(samples["fp8scope_run_last_seen_timestamp_seconds", "run=team/going"] - time.time()) < 60
    assert samples[("fp8scope_database_bytes",)] > 10_000


def test_an_open_finding_has_one_series_and_is_counted(wire: Any) -> None:
    samples = _samples(_busy(wire))

    labels = ("layer=fc", "role=input", "rule=overflow", "run=run", "severity=critical")
    assert [key for key in samples if key[0] == "fp8scope_finding"] == [("fp8scope_finding", *labels)]
    counts = {key[2]: value for key, value in samples.items() if key[0] == "fp8scope_open_findings"}
    assert counts == {"severity=info": 0, "severity=warning": 0, "severity=critical": 1}
    assert samples[("fp8scope_diagnosis_last_look_timestamp_seconds",)] == 5


def test_findings_of_very_many_tensors_leave_the_page_small(engine: sa.Engine, wire: Any) -> None:
    """Ten runs of 512 ranks and 1,680 tensors, in each of which everything is wrong."""
    writer = StatsWriter(engine)
    slots = [
        pb.Slot(slot=i, layer=f"layers.{i // 3}.mlp", role=[1, 2, 3][i % 3], format="E4M3FN", recipe="AmaxScaling()")
        for i in range(1680)
    ]
    metrics = Metrics("0")
    states = []
    for number in range(10):
        opening = decode_open(wire.open(f"run-{number}", slots=slots, world_size=512), Limits())
        source = writer.register(opening, now_unix_ns=1)
        states.append(RunState(source.run, 7, 1, True, {"ring_full": 1, "spool_full": 2}))
        columns = wire.columns(1, slots=1680)
        for rank in range(512):
            of_rank = replace(source, rank=rank)
            metrics.observe_source(of_rank)
            if rank % 64 == 0:
                metrics.observe_rows(decode_stats(wire.stats(1, columns), of_rank, Limits()))
        rows = [
            {"run_id": source.run_id, "slot": slot, "severity": severity, "opened_unix_ns": slot, "first_step": slot}
            for slot, severity in zip(range(1000), ["warning"] * 960 + ["critical"] * 40, strict=True)
        ]
        with engine.begin() as connection:
            connection.execute(sa.insert(schema.finding), [_FINDING | row for row in rows])
    metrics.observe_database(states, 1)
    metrics.observe_findings(writer.findings(FINDINGS_PER_RUN))

    samples = _samples(metrics)

    series = [dict(part.split("=", 1) for part in key[1:]) for key in samples if key[0] == "fp8scope_finding"]
    print(f"{len(samples)} series")
    assert len(samples) < 2000
    assert len(series) == 10 * FINDINGS_PER_RUN
    of_one = [each for each in series if each["run"] == "run-3"]
    layers = {each["layer"] for each in of_one if each["severity"] == "warning"}
    assert sum(each["severity"] == "critical" for each in of_one) == 40
    assert layers <= {f"layers.{i // 3}.mlp" for i in range(10)}, "of those equally bad the oldest"


_FINDING = {
    "rule": "underflow",
    "ranks_json": "[0]",
    "last_step": 9,
    "first_row": 0,
    "last_row": 0,
    "rows": 1,
    "worst": 1.0,
    "worst_step": 9,
    "numbers_json": "{}",
    "note": "",
    "updated_unix_ns": 1,
    **dict.fromkeys(("says", "evidence", "cause", "remedy", "change"), ""),
}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = open_engine(f"sqlite:///{tmp_path}/test.db")
    migrate(engine)
    yield engine
    engine.dispose()


def _busy(wire: Any) -> Metrics:
    """Metrics of a collector that has seen everything once."""
    metrics = Metrics("0")
    metrics.observe_source(_source())
    metrics.observe_rows(_batch(wire, wire.columns(1)))
    metrics.observe_commit(0.1)
    metrics.observe_database([RunState("run", 7, 1, True, {"ring_full": 1})], 1)
    finding = OpenFinding("run", "overflow", "critical", "fc", "input")
    metrics.observe_findings(FindingsNow((finding,), (("run", "critical", 1),), 5 * 10**9))
    return metrics


def _text(metrics: Metrics) -> str:
    registry = CollectorRegistry()
    registry.register(metrics)
    return generate_latest(registry).decode()


def _samples(metrics: Metrics) -> Samples:
    return {
        (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(_text(metrics))
        for sample in family.samples
    }


def _worst(metrics: Metrics) -> tuple[float | None, float | None]:
    """Overflow ratio and headroom of the inputs."""
    samples = _samples(metrics)
    return (
        samples.get(("fp8scope_worst_overflow_ratio", "role=input", "run=run")),
        samples.get(("fp8scope_lowest_headroom_bits", "role=input", "run=run")),
    )


def _two_layers(wire: Any, *, step: int, overflow: tuple[int, int], amax: tuple[float, float]) -> dict[str, np.ndarray]:
    """The inputs of two layers at a step: 100 elements each, scale 2."""
    columns: dict[str, np.ndarray] = {name: column[[0, 3]] for name, column in wire.columns(step).items()}
    columns["numel"][:] = 100
    columns["scale_max"][:] = 2
    columns["overflow"][:] = overflow
    columns["amax"][:] = amax
    return columns


def _source(*, run_id: int = 0, rank: int = 0, incarnation: int = 1) -> Source:
    roles = np.array([0, 1, 2, 0, 1, 2], np.int8)
    label = f"run{run_id or ''}"
    return Source(1, run_id, label, rank, incarnation, 0, False, np.arange(6), roles, np.full(6, math.log2(448)))


def _batch(wire: Any, columns: dict[str, np.ndarray], **source: int) -> Batch:
    return decode_stats(wire.stats(1, columns), _source(**source), Limits())
