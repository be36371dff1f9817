"""What the adapters record, in the database of a real collector, and what its diagnosis makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nvdlfw_inspect.api as debug_api
import pytest
import sqlalchemy as sa
import torch
from torch import nn

import fp8scope_agent as fp8scope
from fp8core import AmaxScaling
from fp8scope_agent.adapters.inspect import InspectLogger
from programs import FP8SCOPE, Program, environment


@pytest.fixture
def database(
    tmp_path: Path, start_collector: Callable[..., tuple[Program, str]], monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """The URL of a database and the address of its collector."""
    monkeypatch.setenv("FP8SCOPE_SPOOL_DIR", str(tmp_path / "spool"))
    torch.set_num_threads(1)
    url = f"sqlite:///{tmp_path / 'fp8scope.db'}"
    return url, start_collector(url)[1]


def ask(url: str, query: str) -> list[Any]:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        answer = [tuple(row) for row in connection.execute(sa.text(query))]
    engine.dispose()
    return answer


def diagnose(url: str, run: str) -> list[dict[str, Any]]:
    command = [sys.executable, FP8SCOPE, "diagnose", run, "--db", url, "--json"]
    answer = subprocess.run(command, check=True, env=environment(), timeout=60, capture_output=True, text=True)
    findings: list[dict[str, Any]] = json.loads(answer.stdout)["findings"]
    return findings


def test_a_bf16_run_in_shadow_mode_is_told_which_tensors_are_not_ready(database: tuple[str, str]) -> None:
    url, address = database
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch.no_grad():
        model[2].weight[0] *= 2.0**14  # outliers: at their scale the other rows vanish

    with fp8scope.attach(model, run="bf16", collector=address, shadow=AmaxScaling()) as monitor:
        for _ in range(12):
            x = torch.randn(64, 64).bfloat16()
            loss = model[:2](x).square().mean() + model[3](x).square().mean() + model[2](x)[:, 1:].square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss)

    harmful = {(each["layer"], each["role"]) for each in diagnose(url, "bf16") if each["severity"] != "info"}
    assert harmful == {("2", "weight")}


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[InspectLogger]:
    logger = InspectLogger()
    debug_api.initialize(statistics_logger=logger, log_dir=str(tmp_path))
    yield logger
    debug_api.end_debug()


def test_what_transformer_engine_logs_is_rows_and_numbers_and_can_be_diagnosed(
    database: tuple[str, str], logger: InspectLogger
) -> None:
    url, address = database
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    debug_api.infer_and_assign_layer_names(model)

    with fp8scope.attach(model, run="te", collector=address, inspect=logger) as monitor:
        for step in range(12):
            for layer in ("model.0", "model.1"):
                logger.log_scalar(f"{layer}_activation_cur_amax", torch.tensor(2.0 + step), step)
                logger.log_scalar(f"{layer}_activation_scale_inv_min", torch.tensor((2.0 + step) / 448), step)
                logger.log_scalar(f"{layer}_activation_scale_inv_max", torch.tensor((2.0 + step) / 448), step)
                logger.log_scalar(f"{layer}_activation_underflows%", torch.tensor(0.5), step)
                logger.log_scalar(f"{layer}_weight_mse", torch.tensor(1e-6), step)
            monitor.step(loss=1.0)

    rows = ask(
        url,
        "SELECT layer, role, COUNT(*), MIN(amax), MAX(scale_max), COUNT(numel) FROM stats JOIN slot"
        " USING (slot) GROUP BY layer, role ORDER BY layer",
    )
    assert rows == [(f"model.{n}", "input", 12, 2.0, pytest.approx(224.0), 0) for n in (0, 1)]
    extras = ask(url, "SELECT name, slot, COUNT(*), MIN(value) FROM extra GROUP BY name, slot ORDER BY name, slot")
    assert extras == [("mse", 1, 12, pytest.approx(1e-6)), ("mse", 4, 12, pytest.approx(1e-6))] + [
        ("underflows%", slot, 12, 0.5) for slot in (0, 3)
    ]
    assert diagnose(url, "te") == []
