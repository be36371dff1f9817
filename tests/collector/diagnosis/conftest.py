"""Real recordings that several tests look at: a tiny GPT, healthy, on two ranks."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faults
import fp8core
from fp8scope_collector.diagnosis.window import Window


@pytest.fixture(scope="session")
def two_ranks() -> Window:
    """24 healthy steps of two replicas under FP8-AMAX."""
    return faults.record(fp8core.AmaxScaling(), ranks=2)
