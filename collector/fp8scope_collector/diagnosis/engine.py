"""From windows to episodes: replays every rule over a run and answers what went wrong, worst first.

A rule says something of rows; the engine joins what it says of one tensor into episodes. An episode is opened once,
extended as long as its rows follow each other within `GAP_ROWS`, and closed; it is one finding. Rules see the same
context wherever the run is cut, so the answer does not depend on the size of the windows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fp8core.records import Role
from fp8scope_collector.diagnosis.catalogue import RULES
from fp8scope_collector.diagnosis.finding import Finding, Rule, merged
from fp8scope_collector.diagnosis.thresholds import GAP_ROWS, MAX_FINDINGS
from fp8scope_collector.diagnosis.window import Window, slide


@dataclass(frozen=True)
class Diagnosis:
    """The findings of a run, worst first; `omitted` more were less bad. `rows` recorded steps of `ranks` were read."""

    findings: tuple[Finding, ...]
    omitted: int
    rows: int
    ranks: int


def diagnose(pieces: Iterable[Window], *, rules: Sequence[Rule] = RULES) -> Diagnosis:
    """All rules over consecutive pieces of a run."""
    episodes: dict[tuple[str, str, Role | None, tuple[int, ...]], list[Finding]] = defaultdict(list)
    rows = ranks = 0
    for window in slide(pieces):
        rows += window.steps.size - window.fresh
        ranks = len(window.ranks)
        for rule in rules:
            for finding in rule.check(window):
                layer, role = (finding.slot.layer, finding.slot.role) if finding.slot else ("", None)
                _extend(episodes[rule.name, layer, role, finding.ranks], finding)
    over_ranks: dict[tuple[str, str, Role | None], list[Finding]] = defaultdict(list)
    for (name, layer, role, _), found in episodes.items():
        over_ranks[name, layer, role] += found
    everything: list[Finding] = []
    for found in over_ranks.values():
        joined: list[Finding] = []
        for finding in sorted(found, key=lambda finding: (finding.first_row, finding.ranks)):
            _extend(joined, finding)
        everything += joined
    order = {rule.name: number for number, rule in enumerate(rules)}
    everything.sort(
        key=lambda finding: (-finding.severity, finding.first_step, *_computed(finding), order[finding.rule])
    )
    return Diagnosis(tuple(everything[:MAX_FINDINGS]), max(0, len(everything) - MAX_FINDINGS), rows, ranks)


def _extend(episodes: list[Finding], finding: Finding) -> None:
    """Joins a finding to the newest episode where it follows on, else opens one."""
    if episodes and finding.first_row <= episodes[-1].last_row + GAP_ROWS:
        episodes[-1] = merged(episodes[-1], finding)
    elif finding.opens:
        episodes.append(finding)


def _computed(finding: Finding) -> tuple[int, int]:
    """Where in a step the tensor is computed: forward in model order, gradients back from the end, then the loss."""
    if finding.slot is None:
        return (2, 0)
    return (1, -finding.slot.slot) if finding.slot.role == Role.GRAD_OUTPUT else (0, finding.slot.slot)
