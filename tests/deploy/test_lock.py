"""requirements.lock pins all that requirements.in and the distributions ask for, at versions that are everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", re.split(r"[\[<>=~!; ]", name.strip())[0]).lower()


def test_every_line_pins_a_public_version() -> None:
    assert [line for line in LINES if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_everything_that_is_asked_for_is_pinned() -> None:
    asked = {normal(line) for line in (ROOT / "requirements.in").read_text().splitlines() if not line.startswith("#")}
    for project in (tomllib.loads(path.read_text())["project"] for path in ROOT.glob("*/pyproject.toml")):
        asked |= {normal(name) for name in project["dependencies"]}
    ours = {name for name in asked if name.startswith(("fp8core", "fp8scope"))}

    assert asked - ours - {normal(line) for line in LINES} == set()
