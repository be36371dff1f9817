"""Grafana's dashboard is what the code writes, and asks for metrics that there are."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/grafana"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_grafana", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expressions() -> list[str]:
    panels: list[dict[str, Any]] = json.loads((FOLDER / "fp8scope.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_the_file_is_what_the_code_writes(make: ModuleType) -> None:
    assert (FOLDER / "fp8scope.json").read_text() == make.text()


def test_no_panel_lies_upon_another(make: ModuleType) -> None:
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in make.dashboard()["panels"]]

    for i, (x, y, w, h) in enumerate(places):
        assert x + w <= 24
        for other_x, other_y, other_w, other_h in places[i + 1 :]:
            apart = x + w <= other_x or other_x + other_w <= x or y + h <= other_y or other_y + other_h <= y
            assert apart, (places[i], (other_x, other_y, other_w, other_h))


def test_every_expression_is_promql_about_metrics_of_the_catalogue(
    require_binary: Callable[[str], Path], tmp_path: Path
) -> None:
    catalogue = set(re.findall(r"`(fp8scope_\w+)`", (ROOT / "docs/metrics.md").read_text()))
    rules = [{"record": f"panel:{i}", "expr": e.replace("$run", "x")} for i, e in enumerate(expressions())]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))

    said = subprocess.run(
        [str(require_binary("promtool")), "check", "rules", str(tmp_path / "panels.yml")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert said.returncode == 0, said.stdout + said.stderr
    used = {name.removesuffix("_bucket") for e in expressions() for name in re.findall(r"fp8scope_\w+", e)}
    assert used - catalogue == set()
