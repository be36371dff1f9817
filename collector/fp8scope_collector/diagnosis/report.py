"""A diagnosis for people (text) and for programs (JSON, a documented form that only grows)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fp8scope_collector.diagnosis.catalogue import BY_NAME
from fp8scope_collector.diagnosis.engine import Diagnosis
from fp8scope_collector.diagnosis.finding import Finding, Severity
from fp8scope_collector.diagnosis.thresholds import SHOWN_PER_RULE
from fp8scope_collector.storage.readmodels import RunSummary

JSON_VERSION = 1


def as_text(run: RunSummary, diagnosis: Diagnosis) -> Iterator[str]:
    """Lines for a terminal: findings worst first, each rule's cause and remedy once, below its first tensor."""
    counts = Counter(str(finding.severity) for finding in diagnosis.findings)
    levels = [str(severity) for severity in sorted(Severity, reverse=True)]
    found = ", ".join(f"{counts[level]} {level}" for level in levels if counts[level])
    yield f"{run.ref}: {diagnosis.rows:,} recorded steps, {found or 'nothing found'}"
    shown: Counter[str] = Counter()
    explained: set[tuple[str, str]] = set()
    for finding in diagnosis.findings:
        shown[finding.rule] += 1
        if shown[finding.rule] > SHOWN_PER_RULE:
            continue
        rule, remedy = BY_NAME[finding.rule], BY_NAME[finding.rule].remedy(finding.slot)
        yield ""
        yield f"{finding.severity!s:8}  {_tensor(finding)}  {finding.rule}  {_when(finding, diagnosis)}"
        yield f"          {rule.says}: {evidence(finding)}"
        recipe = finding.slot.recipe.partition("(")[0] if finding.slot else ""
        if (finding.rule, recipe) not in explained:
            explained.add((finding.rule, recipe))
            yield f"          cause:  {rule.cause}"
            yield f"          remedy: {remedy}"
            if change := rule.change(finding.slot):
                yield f"          change: {change}"
    more = {name: count - SHOWN_PER_RULE for name, count in shown.items() if count > SHOWN_PER_RULE}
    if more or diagnosis.omitted:
        rest = [f"{count} of {name}" for name, count in more.items()]
        rest += [f"{diagnosis.omitted} less bad ones"] if diagnosis.omitted else []
        yield ""
        yield f"not shown: {', '.join(rest)}; --json has " + ("all but the last" if diagnosis.omitted else "all")


def as_json(run: RunSummary, diagnosis: Diagnosis) -> dict[str, Any]:
    """The diagnosis as docs/diagnosis.md describes it; a number that is not finite is null."""
    return {
        "version": JSON_VERSION,
        "run": run.ref,
        "state": run.state,
        "recorded_steps": diagnosis.rows,
        "omitted": diagnosis.omitted,
        "findings": [_finding(finding, diagnosis) for finding in diagnosis.findings],
    }


def evidence(finding: Finding) -> str:
    """What was seen, in numbers."""
    text = BY_NAME[finding.rule].evidence.format(**finding.numbers)
    return f"{text}; {finding.note}" if finding.note else text


def _finding(finding: Finding, diagnosis: Diagnosis) -> dict[str, Any]:
    rule, slot = BY_NAME[finding.rule], finding.slot
    return {
        "severity": str(finding.severity),
        "rule": finding.rule,
        "layer": slot.layer if slot else None,
        "role": str(slot.role) if slot else None,
        "format": slot.format if slot else None,
        "recipe": slot.recipe if slot else None,
        "ranks": list(finding.ranks),
        "first_step": finding.first_step,
        "last_step": finding.last_step,
        "lasting": _lasting(finding, diagnosis),
        "rows": finding.rows,
        "worst_step": finding.worst_step,
        "numbers": {name: value if math.isfinite(value) else None for name, value in finding.numbers.items()},
        "evidence": evidence(finding),
        "cause": rule.cause,
        "remedy": rule.remedy(slot),
        "change": rule.change(slot),
    }


def _lasting(finding: Finding, diagnosis: Diagnosis) -> bool:
    """Whether it was still so in the last recorded step."""
    return finding.last_row == diagnosis.rows - 1


def _tensor(finding: Finding) -> str:
    return f"{finding.slot.role} of {finding.slot.layer}" if finding.slot else "the run"


def _when(finding: Finding, diagnosis: Diagnosis) -> str:
    steps = f"step {finding.first_step}"
    if finding.last_step > finding.first_step:
        steps = f"steps {finding.first_step} to {finding.last_step}"
    if _lasting(finding, diagnosis):
        steps += " (the last)"
    return steps + _ranks(finding.ranks, diagnosis.ranks)


def _ranks(ranks: Sequence[int], all_ranks: int) -> str:
    if len(ranks) == all_ranks:
        return ""
    return f", rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}" + (" ..." if len(ranks) > 8 else "")
