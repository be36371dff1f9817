"""What several tests look at: a tiny GPT, healthy, on two ranks; and rows that make every rule speak."""

from __future__ import annotations

import os

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faults
import fp8core
from fp8core.records import Role
from fp8scope_collector.diagnosis.window import FIELDS_READ, ScalarSeries, Window
from fp8scope_collector.storage.readmodels import Slot

RANKS, STEPS = 2, 300


@pytest.fixture(scope="session")
def two_ranks() -> Window:
    """24 healthy steps of two replicas under FP8-AMAX."""
    return faults.record(fp8core.AmaxScaling(), ranks=2)


@pytest.fixture(scope="session")
def noisy() -> Window:
    """Rows that make every rule speak, at random: what matters here is only that cutting changes nothing."""
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
