"""What several tests look at: a tiny GPT, healthy, on two ranks; and rows of which every rule has something to say."""

from __future__ import annotations

import os

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faults
import fp8core
from fp8core.records import Role
from fp8scope_collector.diagnosis.window import FIELDS_READ, Floats, ScalarSeries, Window
from fp8scope_collector.storage.readmodels import Slot

RANKS, STEPS = 2, 300


@pytest.fixture(scope="session")
def two_ranks() -> Window:
    """24 healthy steps of two replicas under FP8-AMAX."""
    return faults.record(fp8core.AmaxScaling(), ranks=2)


@pytest.fixture(scope="session")
def noisy() -> Window:
    """Rows without any order: what matters here is only that cutting changes nothing."""
    rng = np.random.default_rng(7)
    recipes = ["AmaxScaling()", "DelayedScaling(history_len=16)", "ConstantScaling()", "CurrentScaling()"]
    slots = tuple(
        Slot(i, f"blocks.{i // 3}.fc", role, "Fp8Linear", 8, 8, "E4M3FN", recipes[i // 3 % 4], 0)
        for i in range(6 * 3)
        for role in [list(Role)[i % 3]]
    )
    shape = (RANKS, STEPS, len(slots))
    level = np.cumsum(rng.normal(0, 0.7, shape), axis=1)
    numel = np.full(shape, 1e4)
    rare = rng.random(shape)
    fields = {
        "amax": np.where(rare < 0.02, 0.0, 2.0**level),
        "scale_min": 2.0 ** np.round(-level + rng.normal(0, 2, shape)),
        "numel": numel,
        "zeros": np.where(rare < 0.05, numel, 10),
        "overflow": np.where(rng.random(shape) < 0.1, 3000.0, 0.0),
        "underflow": np.where(rng.random(shape) < 0.3, 2000.0, 0.0),
        "nonfinite": np.where(rng.random(shape) < 0.01, 5.0, 0.0),
    }
    fields["scale_max"] = fields["scale_min"]
    for rank in range(RANKS):
        for start in range(30 + 20 * rank, STEPS, 90):
            for values in fields.values():
                values[rank, start : start + 11] = np.nan
    fields = {name: np.where(rng.random(shape) < 0.01, np.nan, fields[name]) for name in FIELDS_READ}
    steps = np.cumsum(1 + (rng.random(STEPS) < 0.05))
    loss = 3 + 0.1 * rng.standard_normal(STEPS) + 4.0 * (rng.random(STEPS) < 0.03)
    loss[rng.random(STEPS) < 0.01] = np.nan
    return Window(steps, (0, 1), slots, fields, {"loss": ScalarSeries(steps, loss)})


@pytest.fixture(scope="session")
def plateaus() -> Window:
    """Rows that stay as they are for a while, so that rules which wait for many alike speak as well."""
    rng = np.random.default_rng(11)

    def held(shape: tuple[int, ...], choices: list[float], share: float) -> Floats:
        new = rng.random(shape) < share
        new[:, 0] = True
        since = np.maximum.accumulate(np.where(new, np.arange(shape[1])[None, :, None], 0), axis=1)
        return np.take_along_axis(rng.choice(choices, shape), since, axis=1)

    recipes = ["AmaxScaling(clamp=6)", "DelayedScaling(history_len=16)", "DelayedScaling(history_len=16)"]
    slots = tuple(
        Slot(i, f"blocks.{i // 3}.fc", role, "Fp8Linear", 8, 8, "E4M3FN", recipes[i // 3 % 3], 0)
        for i in range(8 * 3)
        for role in [list(Role)[i % 3]]
    )
    of_all, of_ranks = (1, STEPS, len(slots)), (RANKS, STEPS, len(slots))
    scale = 2.0 ** held(of_all, [8, 8, 5, 6, 0], 0.02)
    rows = {
        "amax": 2.0 ** held(of_all, [0, 0, 0, 0, 1, 3, 9], 0.05) * np.where(rng.random(of_ranks) < 0.003, 2, 1),
        "scale_min": scale,
        "scale_max": scale,
        "numel": np.full(of_all, 1e4),
        "zeros": held(of_all, [9, 9, 1e4], 0.3),
        "overflow": held(of_all, [0, 0, 20], 0.3),
        "underflow": np.zeros(of_all),
        "nonfinite": np.zeros(of_all),
    }
    gone = (held((RANKS, STEPS, 1), [0, 0, 0, 1], 0.06) > 0) | (held(of_ranks, [0] * 15 + [1], 0.03) > 0)
    fields = {name: np.where(gone, np.nan, np.broadcast_to(rows[name], of_ranks)) for name in FIELDS_READ}
    steps = np.arange(STEPS) + np.cumsum(rng.random(STEPS) < 0.01)
    return Window(steps, (0, 1), slots, fields, {"loss": ScalarSeries(steps, np.full(STEPS, 3.0))})
