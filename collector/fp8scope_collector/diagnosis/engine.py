"""From windows to episodes: what rules say of consecutive windows, joined; the same for a replay and for a live run.

A rule says something of rows; `Episodes` joins what it says of one tensor. An episode is opened once, extended as long
as its rows follow each other within `GAP_ROWS`, and closed; it is one finding. Rules see the same context wherever the
run is cut, so the answer does not depend on the size of the windows: `diagnose` gets a stored run in pieces, the live
engine (`diagnosis.live`) a few rows at a time, and both say the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from fp8core.records import Role
from fp8scope_collector.diagnosis.catalogue import RULES
from fp8scope_collector.diagnosis.finding import Finding, Rule, merged
from fp8scope_collector.diagnosis.thresholds import DATED_BACK_ROWS, GAP_ROWS, MAX_FINDINGS
from fp8scope_collector.diagnosis.window import Window, slide

Key: TypeAlias = tuple[str, str, Role | None]  # rule, layer, role: what an episode is of

_ORDER = {rule.name: number for number, rule in enumerate(RULES)}


@dataclass(frozen=True)
class Diagnosis:
    """The findings of a run, worst first; `omitted` more were less bad. `rows` recorded steps of `ranks` were read."""

    findings: tuple[Finding, ...]
    omitted: int
    rows: int
    ranks: int


def diagnose(pieces: Iterable[Window], *, rules: Sequence[Rule] = RULES) -> Diagnosis:
    """All rules over consecutive pieces of a run."""
    episodes = Episodes(rules)
    rows = ranks = 0
    for window in slide(pieces):
        rows += window.steps.size - window.fresh
        ranks = len(window.ranks)
        episodes.observe(window)
    everything = sorted((finding for key in episodes.all_keys() for finding in episodes.of(key)), key=by_badness)
    return Diagnosis(tuple(everything[:MAX_FINDINGS]), max(0, len(everything) - MAX_FINDINGS), rows, ranks)


class Episodes:
    """The episodes of a run. What each group of ranks has is kept apart until it is asked for, and joined then."""

    def __init__(self, rules: Sequence[Rule] = RULES) -> None:
        self._rules = rules
        self._parts: dict[Key, dict[tuple[int, ...], list[Finding]]] = {}

    def observe(self, window: Window, rules: Sequence[Rule] | None = None) -> None:
        """Takes in what the rules (all, or `rules`) say of the window's fresh rows."""
        for rule in self._rules if rules is None else rules:
            for finding in rule.check(window.recent(rule.reach)):
                of_ranks = self._parts.setdefault(key_of(finding), defaultdict(list))
                _extend(of_ranks[finding.ranks], finding)

    def resume(self, findings: Iterable[Finding]) -> None:
        """Takes in findings of which the rows are not there any more, to go on with them."""
        for finding in findings:
            of_ranks = self._parts.setdefault(key_of(finding), defaultdict(list))
            of_ranks[finding.ranks].append(finding)
            for rank in finding.ranks if len(finding.ranks) > 1 else ():
                of_ranks[rank,].append(replace(finding, ranks=(rank,), rows=0))

    def all_keys(self) -> list[Key]:
        """What there are episodes of."""
        return [key for key, parts in self._parts.items() if any(parts.values())]

    def of(self, key: Key) -> list[Finding]:
        """The episodes of one rule and tensor, over all ranks, the oldest first."""
        joined: list[Finding] = []
        parts = [finding for found in self._parts.get(key, {}).values() for finding in found]
        for finding in sorted(parts, key=lambda finding: (finding.first_row, finding.ranks)):
            _extend(joined, finding)
        return joined

    def forget(self, rows: int) -> None:
        """Drops what nothing can join any more when `rows` rows have been observed."""
        for key, found in list(self._parts.items()):
            if not any(is_final(episode, rows) for episodes in found.values() for episode in episodes):
                continue
            last_row = max((episode.last_row for episode in self.of(key) if is_final(episode, rows)), default=-1)
            parts = {
                ranks: [finding for finding in found if finding.last_row > last_row]
                for ranks, found in self._parts[key].items()
            }
            self._parts[key] = defaultdict(list, {ranks: found for ranks, found in parts.items() if found})
            if not self._parts[key]:
                del self._parts[key]


def key_of(finding: Finding) -> Key:
    """What the finding is of."""
    return (finding.rule, finding.slot.layer, finding.slot.role) if finding.slot else (finding.rule, "", None)


def is_over(episode: Finding, rows: int) -> bool:
    """Whether an episode has ended when `rows` rows have been observed: more than `GAP_ROWS` were quiet."""
    return rows > episode.last_row + GAP_ROWS


def is_final(episode: Finding, rows: int) -> bool:
    """Whether not even a finding that is dated back can join the episode any more."""
    return rows > episode.last_row + GAP_ROWS + DATED_BACK_ROWS


def by_badness(finding: Finding) -> tuple[int, int, int, int, int]:
    """The order of telling: worst first, then by the first step, then in the order of computation."""
    return (-finding.severity, finding.first_step, *_computed(finding), _ORDER.get(finding.rule, len(_ORDER)))


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
