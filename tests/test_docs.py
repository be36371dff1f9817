"""The documentation says what the code does: fields, settings, files and links that it names exist, and the reverse."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fp8core.records import FIELDS
from fp8scope_agent.config import SETTINGS
from fp8scope_agent.sources import PREFIX

ROOT = Path(__file__).resolve().parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
PAGES = [name for name in TRACKED if name.endswith(".md") and (ROOT / name).exists()]
SETTING = re.compile(r"\bFP8SCOPE_[A-Z][A-Z_]+[A-Z]\b")


def text_of(names: list[str]) -> str:
    return "\n".join((ROOT / name).read_text() for name in names if (ROOT / name).exists())


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text())

    missing = [
        link
        for link in links
        if "://" not in link and not link.startswith("mailto:") and not (ROOT / page).parent.joinpath(link).exists()
    ]

    assert not missing


def test_every_field_is_defined_in_the_statistics_page() -> None:
    page = (ROOT / "docs/statistics.md").read_text()

    assert [field.name for field in FIELDS if f"| `{field.name}` |" not in page] == []


def test_every_setting_in_the_code_is_documented_and_the_reverse() -> None:
    code = text_of([n for n in TRACKED if n.endswith((".py", ".yml", ".cpp")) and not n.startswith("tests/")])
    docs = text_of([name for name in PAGES if name.startswith("docs/") or name == "README.md"])
    in_tests = text_of([n for n in TRACKED if n.startswith("tests/") or n == ".ci/run"])
    of_the_agent = {PREFIX + name.upper() for name in SETTINGS}  # the code spells their names without the prefix

    assert (set(SETTING.findall(code)) | of_the_agent) - set(SETTING.findall(docs)) == set()
    assert set(SETTING.findall(docs)) - set(SETTING.findall(code + in_tests)) - of_the_agent == set()


def test_the_readme_names_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    named = re.findall(r"`((?:fp8core|agent|collector|dashboard|protos|examples|docs|deploy)/[\w./-]+)`", readme)

    assert len(named) >= 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_decision_page_is_a_claim_that_says_what_would_break_it() -> None:
    pages = [name for name in PAGES if name.startswith("docs/adr/") and not name.endswith("README.md")]

    assert pages
    assert [name for name in pages if "A change breaks this when" not in (ROOT / name).read_text()] == []
    assert [name for name in pages if not re.match(r"# \D", (ROOT / name).read_text())] == []


def test_the_scaling_page_is_what_its_script_computes_from_what_was_measured() -> None:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "bench/scaling.py")
    assert spec
    assert spec.loader
    scaling = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = scaling  # where dataclasses look for it
    spec.loader.exec_module(scaling)

    computed = scaling.page(json.loads((ROOT / "bench/results/ingest.json").read_text()))

    assert (ROOT / "docs/scaling.md").read_text() == computed, "run `python bench/scaling.py`"
