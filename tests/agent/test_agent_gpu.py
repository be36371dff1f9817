"""On a CUDA device a step enqueues and returns: no synchronisation, and the same rows as anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fp8core
import fp8scope_agent as fp8scope
from fake_collector import FakeCollector

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_synchronisation")
def test_a_step_never_waits_for_the_device(collector: FakeCollector) -> None:
    model = fp8core.convert_to_fp8(nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))).cuda()
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    with fp8scope.attach(model, run="run", collector=collector.address) as monitor:
        for step in range(20):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
            torch.cuda.set_sync_debug_mode("error")
            monitor.step(loss=loss, scaled=loss * step, half=0.5)
            torch.cuda.set_sync_debug_mode("default")

    source = collector.source
    assert len(source.rows) == 20 * 6
    assert source.rows[7, 0]["amax"] == x.abs().max().item()
    assert source.rows[7, 1]["numel"] == 256 * 256
    assert source.scalars["half", 3] == 0.5
    assert all(math.isfinite(source.scalars["loss", step]) for step in range(20))
