"""The rows of bench/ingest.py through what people log training with: how many points a second, on the same machine.

A point is one number of one tensor at one step; a row of ours has eleven. Each peer gets whole steps of 560 layers
(1,680 rows, 18,480 points) as fast as it takes them, one process, in the way that its documentation recommends for many
numbers, with the durability that it comes with. Nothing is rolled up, checked or read meanwhile.

    .venv-bench/bin/python bench/ingest_peers.py [--seconds 5]        # make bench makes that environment
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fp8core.records import FIELDS

ROWS = 1680
POINTS = ROWS * len(FIELDS)
ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-bench"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=5, help="measured time of each peer")
    arguments.add_argument("--json", action="store_true", help="points a second by peer, for bench/ingest.py")
    options = arguments.parse_args()
    measured: dict[str, float] = {}
    for name, peer in PEERS.items():
        with tempfile.TemporaryDirectory() as folder:
            measured[name] = points_per_s(peer(Path(folder)), options.seconds)
    if options.json:
        print(json.dumps(measured))
    else:
        print("\n".join(table(measured)))


def compared(seconds: float, rows_per_s: float) -> list[str]:
    """Lines of a table of the peers, measured now, beside a collector that acknowledged so many rows a second."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        return ["The peers were not measured: `make bench` installs them."]
    command = [str(python), __file__, "--json", "--seconds", str(seconds)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return table({"fp8scope": rows_per_s * len(FIELDS)} | json.loads(found.stdout.splitlines()[-1]))


def table(measured: dict[str, float]) -> list[str]:
    """The table, and what its numbers mean."""
    ours = measured.get("fp8scope")
    lines = ["| | points/s | |", "|---|---|---|"]
    for name, points in measured.items():
        ratio = f"{ours / points:,.1f} times slower" if ours and name != "fp8scope" else ""
        lines.append(f"| {name} | {points:,.0f} | {ratio} |")
    return lines


def points_per_s(log_step: Callable[[int, dict[str, list[float]]], None], seconds: float) -> float:
    """How many points a second it takes, after one step to warm up."""
    log_step(0, step_of(0))
    started, step = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        step += 1
        log_step(step, step_of(step))
    return step * POINTS / elapsed


def step_of(step: int) -> dict[str, list[float]]:
    """One step's numbers by field, each a list over the tensors; the next step's are the same, turned by one."""
    return {name: values[-step % ROWS :] + values[: -step % ROWS] for name, values in _FIRST.items()}


def _first_step() -> dict[str, list[float]]:
    chance = np.random.default_rng(0)
    return {
        field.name: (chance.poisson(3, ROWS) if field.dtype == "uint64" else chance.lognormal(size=ROWS)).tolist()
        for field in FIELDS
    }


_FIRST = _first_step()
_NAMES = {field.name: [f"{field.name}/blocks.{i // 3}.fc/{i % 3}" for i in range(ROWS)] for field in FIELDS}


def mlflow(folder: Path) -> Callable[[int, dict[str, list[float]]], None]:
    """`MlflowClient.log_batch`, a thousand metrics a call (its limit), into SQLite."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    logging.disable(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run_id = client.create_run(client.create_experiment("bench")).info.run_id

    def log_step(step: int, values: dict[str, list[float]]) -> None:
        now = int(time.time() * 1000)
        for batch in batched(values, 1000):
            client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in batch])

    return log_step


def tensorboard(folder: Path) -> Callable[[int, dict[str, list[float]]], None]:
    """`SummaryWriter.add_scalar` for each number, flushed once a step."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder))

    def log_step(step: int, values: dict[str, list[float]]) -> None:
        for name, value in batched(values, 1):
            writer.add_scalar(name, value, step)
        writer.flush()

    return log_step


def prometheus_text(folder: Path) -> Callable[[int, dict[str, list[float]]], None]:
    """Lines of Prometheus's text format, appended to a file: no server behind it, the least that anything could do."""
    file = (folder / "metrics.prom").open("w")
    labels = [f'{{layer="blocks.{i // 3}.fc",role="{i % 3}"}}' for i in range(ROWS)]

    def log_step(step: int, values: dict[str, list[float]]) -> None:
        now = int(time.time() * 1000)
        for name, column in values.items():
            file.writelines(f"fp8_{name}{label} {value!r} {now}\n" for label, value in zip(labels, column, strict=True))
        file.flush()

    return log_step


def batched(values: dict[str, list[float]], size: int) -> Iterator[Any]:
    """(name, number) of all points, in lists of `size`, or one by one."""
    points = [point for name, column in values.items() for point in zip(_NAMES[name], column, strict=True)]
    if size == 1:
        yield from points
    else:
        for start in range(0, len(points), size):
            yield points[start : start + size]


PEERS = {
    "MLflow log_batch, SQLite": mlflow,
    "TensorBoard SummaryWriter": tensorboard,
    "Prometheus text, no server": prometheus_text,
}

if __name__ == "__main__":
    main()
