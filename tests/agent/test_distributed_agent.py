"""Two ranks of torchrun, under DDP, FSDP2 and tensor parallelism: a row for each rank, slot and step, weights alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_collector import FakeCollector, Source

STEPS, SLOTS = 3, 12
PARALLEL = ["native ddp", "native fsdp2", "shadow ddp", "shadow fsdp2", "torchao ddp", "torchao fsdp2"]
WEIGHTS = range(1, SLOTS, 3)


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[tuple[dict[tuple[str, int], Source], list[Any]]]:
    """What the collector has of each (scenario, rank), and the losses that each rank wrote."""
    folder = tmp_path_factory.mktemp("job")
    collector = FakeCollector()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FP8SCOPE_SPOOL_DIR": str(folder / "spool")}
    script = Path(__file__).with_name("distributed_trainer.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    process = subprocess.Popen(
        [*torchrun, f"--master-port={free_port()}", script, folder, collector.address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        _, errors = process.communicate(timeout=150)
    finally:
        process.terminate()
    assert process.returncode == 0, errors[-3000:]
    sources = {(source.open.run, source.open.rank): source for source in collector.sources.values()}
    yield sources, [json.loads((folder / f"losses-{rank}.json").read_text()) for rank in range(2)]
    collector.die()


Job = tuple[dict[tuple[str, int], Source], list[Any]]


@pytest.mark.parametrize("scenario", PARALLEL)
def test_each_rank_has_one_row_for_each_slot_and_step(job: Job, scenario: str) -> None:
    for rank in range(2):
        source = job[0][scenario, rank]
        assert set(source.rows) == {(step, slot) for step in range(STEPS) for slot in range(SLOTS)}
        assert source.duplicate_rows == 0
        assert source.open.world_size == 2
        assert source.rows[0, 0]["numel"] == 2 * 8 * 32  # two micro-batches
        assert source.rows[0, 1]["numel"] == 64 * 32  # the whole weight, sharded or not


@pytest.mark.parametrize("scenario", PARALLEL)
def test_weights_have_the_same_amax_and_scale_on_all_ranks_and_inputs_their_own(job: Job, scenario: str) -> None:
    first, second = (job[0][scenario, rank].rows for rank in range(2))

    for step in range(STEPS):
        for slot in WEIGHTS:
            assert first[step, slot] == second[step, slot]
    assert first[0, 0]["amax"] != second[0, 0]["amax"]


@pytest.mark.parametrize("kind", ["native", "shadow", "torchao"])
def test_sharding_changes_no_statistic_of_the_first_step(job: Job, kind: str) -> None:
    for rank in range(2):
        whole, sharded = (job[0][f"{kind} {way}", rank].rows for way in ("ddp", "fsdp2"))

        for slot in range(SLOTS):
            assert {name: whole[0, slot][name] for name in ("amax", "scale_max", "numel", "underflow")} == {
                name: sharded[0, slot][name] for name in ("amax", "scale_max", "numel", "underflow")
            }


def test_watching_changes_no_loss_on_any_rank(job: Job) -> None:
    for losses in job[1]:
        for scenario, (alone, watched) in losses.items():
            assert watched == alone, scenario


def test_under_tensor_parallelism_a_rank_records_its_own_part(job: Job) -> None:
    for rank in range(2):
        source = job[0]["shadow tp", rank]
        assert set(source.rows) == {(step, slot) for step in range(STEPS) for slot in range(SLOTS)}
        numel = [source.rows[0, slot]["numel"] for slot in range(6)]
        assert numel == [2 * 8 * 32, 32 * 32, 2 * 8 * 32, 2 * 8 * 32, 32 * 32, 2 * 8 * 32]
