"""DDP and FSDP2 on two processes: one row per slot and rank, weights of equal amax, equal gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

D, LAYERS = 256, 6
SCENARIOS = ["ddp", "ddp, compiled", "fsdp2", "fsdp2, compiled", "fsdp2, bfloat16"]


def train(scenarios: str, folder: Path) -> list[dict[str, Any]]:
    """What the two processes saw, by scenario."""
    rendezvous = folder / "file"
    worker = Path(__file__).with_name("distributed_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), "2", str(rendezvous), scenarios],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train("usual", tmp_path_factory.mktemp("rendezvous"))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_slot_is_written_once_on_every_rank(ranks: list[dict[str, Any]], scenario: str) -> None:
    for rank in ranks:
        assert rank[scenario]["writes"] == [1, 1, 1] * LAYERS
        assert rank[scenario]["overflow"] == 0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_weights_have_the_same_amax_on_all_ranks_and_inputs_their_own(
    ranks: list[dict[str, Any]], scenario: str
) -> None:
    first, second = (rank[scenario]["amax"] for rank in ranks)

    assert first[1::3] == second[1::3]
    assert first[0] != second[0]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gradients_are_equal_on_all_ranks(ranks: list[dict[str, Any]], scenario: str) -> None:
    assert ranks[0][scenario]["grads"] == ranks[1][scenario]["grads"]


@pytest.mark.parametrize("scenario", ["ddp, compiled", "fsdp2", "fsdp2, compiled"])
def test_sharding_and_compiling_change_neither_gradients_nor_statistics(
    ranks: list[dict[str, Any]], scenario: str
) -> None:
    for rank in ranks:
        assert rank[scenario]["amax"] == rank["ddp"]["amax"]
        assert rank[scenario]["grads"] == pytest.approx(rank["ddp"]["grads"], rel=1e-6)


def test_under_a_bfloat16_policy_the_weights_amax_is_that_of_the_bfloat16_copy(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        weights, exact = rank["fsdp2, bfloat16"]["amax"][1::3], rank["ddp"]["amax"][1::3]
        assert weights == torch.tensor(exact).bfloat16().tolist()
        assert weights != exact


@pytest.mark.parametrize("scenario", ["ddp", "fsdp2"])
def test_no_fp8_copy_of_a_weight_is_kept_for_the_backward(ranks: list[dict[str, Any]], scenario: str) -> None:
    assert ranks[0][scenario]["kept"] == [[8, D], [8, 2 * D]]


def test_micro_batches_merge_on_each_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["ddp, two micro-batches"]["writes"] == [2, 1, 2] * LAYERS


def test_ddp_gives_all_ranks_the_delayed_scales_of_rank_0(ranks: list[dict[str, Any]]) -> None:
    # DDP broadcasts the buffers of rank 0 before each forward.
    first, second = (rank["ddp, delayed"] for rank in ranks)

    assert first["scale"] == second["scale"]
    assert 1.0 not in first["scale"]
    assert first["amax"][0] != second["amax"][0]


def test_ddp_compiles_the_model_in_several_graphs(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["ddp graphs"] > 1 for rank in ranks)


@pytest.mark.slow
def test_recomputation_under_ddp_and_fsdp2_is_not_counted_and_changes_nothing(
    ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Checkpointing of both kinds, eager and compiled, and the compiler's own, by `activation_memory_budget`."""
    for rank, recomputing in zip(ranks, train("recomputing", tmp_path), strict=True):
        assert len(recomputing) == 10
        for scenario, seen in recomputing.items():
            assert seen["writes"] == [1, 1, 1] * LAYERS, scenario
            assert seen["overflow"] == 0, scenario
            assert seen["amax"] == rank["ddp"]["amax"], scenario
            assert seen["scale"] == rank["ddp"]["scale"], scenario
            assert seen["grads"] == pytest.approx(rank["ddp"]["grads"], rel=1e-6), scenario
