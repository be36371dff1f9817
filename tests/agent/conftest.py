"""A small FP8 model, a collector that is real enough, and a spool of the test's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fp8core
import fp8scope_agent as fp8scope
from fake_collector import FakeCollector


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One thread, and no setting of the machine's."""
    torch.set_num_threads(1)
    for name in ("COLLECTOR", "TOKEN", "TLS_CA", "TLS_CLIENT_CERT", "TLS_CLIENT_KEY", "SPOOL_BYTES"):
        monkeypatch.delenv(f"FP8SCOPE_{name}", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("FP8SCOPE_SPOOL_DIR", str(tmp_path / "spool"))
    monkeypatch.setenv("FP8SCOPE_LINGER_S", "3")  # a sender without a collector does not outlive its test for long


@pytest.fixture
def collector() -> Iterator[FakeCollector]:
    server = FakeCollector()
    yield server
    server.die()


@pytest.fixture
def make_model() -> Callable[[], nn.Module]:
    """Two FP8 layers, hence six slots, with the same weights at each call."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return fp8core.convert_to_fp8(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))

    return make


@pytest.fixture
def model(make_model: Callable[[], nn.Module]) -> nn.Module:
    return make_model()


Train = Callable[..., list[float]]


@pytest.fixture
def train() -> Train:
    """A training loop of `steps` steps: train(model, monitor, steps) -> losses."""

    def run(model: nn.Module, monitor: fp8scope.Monitor | None, steps: int, micro_batches: int = 1) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(steps):
            for _ in range(micro_batches):
                loss = model(torch.randn(8, 16, generator=generator)).square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if monitor is not None:
                monitor.step(loss=loss)
        return losses

    return run


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The sentences that the agent has said so far."""
    caplog.set_level(logging.WARNING, logger="fp8scope")

    def sentences() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "fp8scope"]

    return sentences
