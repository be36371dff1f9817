"""docs/diagnosis.md says of every rule what its code says, and of every threshold its value and reason."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import pytest

import fp8scope_collector.diagnosis.rules
from fp8core.recipes import RECIPES
from fp8scope_collector.diagnosis import thresholds
from fp8scope_collector.diagnosis.catalogue import RULES
from fp8scope_collector.diagnosis.finding import Rule

PAGE = Path(__file__).parents[3] / "docs" / "diagnosis.md"


def section(rule: Rule) -> str:
    """A rule as the page has it; where this is not in the page, this is what belongs there."""
    meaning = " ".join((inspect.getdoc(rule.check) or "").split())
    lines = [f"### {rule.name}", "", wrapped(f"**{rule.says[0].upper()}{rule.says[1:]}.** {meaning}"), ""]
    lines += [bullet(f"Cause: {rule.cause}")]
    for recipe, text in rule.remedies.items():
        under = f" ({recipe})" if recipe else " (other recipes)" if len(rule.remedies) > 1 else ""
        lines += [bullet(f"Remedy{under}: {text.format(layer='LAYER', role='ROLE')}")]
    for choice, text in rule.changes.items():
        of = f" ({choice})" if choice else " (others)" if len(rule.changes) > 1 else ""
        lines += [bullet(f"Change{of}: `{text.format(layer='LAYER', role='ROLE', recipe='RECIPE')}`")]
    return "\n".join(lines) + "\n"


def threshold_rows() -> list[str]:
    """The table of thresholds, from the assignments and their comments."""
    found = re.findall(r"^([A-Z_]+) = (.+?)  # (.+)$", inspect.getsource(thresholds), re.MULTILINE)
    return [f"| `{name}` | {value} | {reason[0].upper()}{reason[1:]} |" for name, value, reason in found]


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def bullet(text: str) -> str:
    return wrapped(f"* {text}", "  ")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_page_says_of_a_rule_what_the_code_says(rule: Rule) -> None:
    assert section(rule) in PAGE.read_text()


def test_the_page_has_every_rule_once_in_order_and_no_other() -> None:
    assert re.findall(r"^### (.+)$", PAGE.read_text(), re.MULTILINE) == [rule.name for rule in RULES]


def test_the_page_has_every_threshold_with_its_value_and_reason() -> None:
    constants = [name for name in vars(thresholds) if name.isupper()]

    rows = re.findall(r"^\| `[A-Z_]+` \|.*$", PAGE.read_text(), re.MULTILINE)

    assert rows == threshold_rows()
    assert len(rows) == len(constants)


def test_every_file_of_rules_is_in_the_catalogue() -> None:
    files = Path(fp8scope_collector.diagnosis.rules.__path__[0]).glob("[a-z]*.py")

    assert sorted(path.stem for path in files) == sorted(rule.name.replace("-", "_") for rule in RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_says_how_far_it_can_be_trusted_and_has_remedies_for_recipes_that_exist(rule: Rule) -> None:
    assert "Trust:" in (inspect.getdoc(rule.check) or "")
    assert "" in rule.remedies
    assert set(rule.remedies) - {""} <= set(RECIPES)
