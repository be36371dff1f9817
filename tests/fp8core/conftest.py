"""What the numerics tests share: one torch thread, the formats, the kernels of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from fp8core.kernels import dispatch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def eager_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every cast by the eager kernels."""
    monkeypatch.setenv(dispatch.ENV, "eager")
    dispatch.kernels_for.cache_clear()
    yield
    dispatch.kernels_for.cache_clear()
