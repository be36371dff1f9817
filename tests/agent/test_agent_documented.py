"""docs/agent.md names what the agent has: each argument, each reason for a drop, each trouble's first words."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import fp8scope_agent as fp8scope
from fp8scope_agent.config import SETTINGS
from fp8scope_agent.sampling import PRESETS, Sampling

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/agent.md").read_text()
CODE = "\n".join(path.read_text() for path in (ROOT / "agent/fp8scope_agent").rglob("*.py"))


@pytest.mark.parametrize("name", inspect.signature(fp8scope.attach).parameters)
def test_every_argument_of_attach_is_in_its_table(name: str) -> None:
    table = PAGE.split("### Arguments of `attach`")[1].split("###")[0]

    assert f"`{name}`" in table


@pytest.mark.parametrize("name", [*SETTINGS, "token"])
def test_every_setting_is_in_the_table_of_variables(name: str) -> None:
    table = PAGE.split("### Variables and the settings file")[1].split("###")[0]

    assert f"FP8SCOPE_{name.upper()}" in table


def test_the_presets_are_documented_as_they_are() -> None:
    table = PAGE.split("| preset |")[1].split("\n\n")[0]

    rows = re.findall(r"^\| `(\w+)` +\| (\d+) +\| (\d+) +\| (\d+) +\|", table, re.MULTILINE)
    documented = {name: Sampling(int(every), int(histograms), int(burst)) for name, every, histograms, burst in rows}
    assert documented == PRESETS


def test_every_reason_for_a_drop_is_documented_and_the_reverse() -> None:
    reasons = set(re.findall(r'drops\.add(?:_histograms)?\(\s*"(\w+)"', CODE)) | set(
        re.findall(r'_drop\("(\w+)"', CODE)
    )
    reasons |= {"spool_damaged"} & set(re.findall(r'"(\w+)"', CODE))
    table = PAGE.split("| reason | dropped because |")[1].split("##")[0]

    assert len(reasons) == 12
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == reasons


def test_every_sentence_of_the_table_of_troubles_is_in_the_code() -> None:
    table = PAGE.split("| sentence begins | cause | what to do |")[1].split("\n\n")[0]
    sentences = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)[1:]
    spoken = re.sub(r'"\s*f?"', "", CODE)
    spoken = re.sub(r"\{[^}]*\}", "...", spoken)

    assert len(sentences) >= 14
    for sentence in sentences:
        words = [part.strip(" ,.") for part in sentence.split("...") if part.strip(" ,.")]
        assert all(part in spoken for part in words), sentence
