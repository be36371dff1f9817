"""Does diagnosis find what is wrong, soon, and only that? Eleven faults and healthy runs, on real training.

    python bench/found_faults.py                              # all of it: about ten minutes of one core
    python bench/found_faults.py --keep DIR --budget-s 300    # in pieces: recordings stay in DIR; run it until it ends

The model is that of the tests, 2 layers of width 32; the seeds are not those that thresholds were set with. Each
fault is injected under each recipe that shows it, beside a twin of the same seed without it. "Deviation" is the first
step in which the tensor that the fault is in differs measurably from the twin's (its amax or scale by 10 %, a count
by 0.1 % of its elements, a frozen scale and a weight between ranks at all); "loss up" the first in which the mean of
three losses is 10 % above the twin's. Writes bench/results/found_faults.md and the tables of docs/diagnosis.md.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/support"), str(ROOT / "examples")]

import faults  # noqa: E402
from fp8core import AmaxScaling, CurrentScaling, DelayedScaling  # noqa: E402
from fp8scope_collector.diagnosis.engine import diagnose  # noqa: E402
from fp8scope_collector.diagnosis.finding import Finding, Severity  # noqa: E402
from fp8scope_collector.diagnosis.window import Window, cut  # noqa: E402
from inject_fault import FAULTS, FITTING, Spec, recipe_of  # noqa: E402

HELD_OUT_SEEDS = (201, 202, 203)
HEALTHY_SEEDS = (201, 202, 203, 204, 205)
HEALTHY_STEPS = 300
WITHIN = 5
HORIZON = {True: 60, False: 12}  # steps after the fault: where the loss is waited for, and elsewhere
RESULTS = ROOT / "bench/results/found_faults.md"
DOCS = ROOT / "docs/diagnosis.md"


@dataclass(frozen=True)
class Trial:
    """What became of one fault under one recipe with one seed; steps, None: not seen."""

    fault: str
    recipe: str
    seed: int
    deviated: int | None
    told: int | None
    risen: int | None
    early: int  # warnings before the fault


class Recordings:
    """Recordings by what they are of, each made once and kept in `folder` where there is one."""

    def __init__(self, folder: Path | None, budget_s: float) -> None:
        self._folder = folder
        self._deadline = time.monotonic() + budget_s
        self.made = 0

    def __call__(self, name: str, make: Callable[[], Window]) -> Window:
        path = self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.pickle" if self._folder else None
        if path and path.exists():
            loaded: Window = pickle.loads(path.read_bytes())
            return loaded
        if time.monotonic() > self._deadline:
            sys.exit(f"{self.made} recordings made; run it again")
        window = make()
        self.made += 1
        if path:
            path.write_bytes(pickle.dumps(window))
        return window


def trial(record: Recordings, name: str, spec: Spec, recipe: str, seed: int) -> Trial:
    steps = spec.at + HORIZON[spec.diverges]
    options: dict[str, Any] = {"seed": seed, "ranks": spec.ranks, "swiglu": spec.swiglu, "steps": steps}
    chosen = recipe_of(spec, recipe)
    healthy = chosen if recipe != "constant" else {"recipe": FITTING}
    twin = record(f"twin {healthy} {options}", lambda: faults.record(**healthy, **options))
    broken = record(f"{name} {chosen} {options}", lambda: faults.record(**chosen, fault=spec.fault(spec.at), **options))
    told = None
    for step in range(spec.at, steps):
        if any(fits(spec, finding) for finding in upto(broken, step)):
            told = step
            break
    early = warnings(upto(broken, spec.at - 1)) if spec.at else []
    return Trial(name, recipe, seed, deviation(spec, broken, twin), told, loss_up(broken, twin, spec.at), len(early))


def upto(window: Window, step: int) -> list[Finding]:
    return list(diagnose([next(cut(window, step + 1))]).findings)


def warnings(found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.severity >= Severity.WARNING]


def fits(spec: Spec, finding: Finding) -> bool:
    """Whether it is the right rule, of the right layer and role."""
    layer, role = (finding.slot.layer, str(finding.slot.role)) if finding.slot else ("", "")
    return finding.rule == spec.rule and spec.layer in ("", layer) and spec.role in ("", role)


def deviation(spec: Spec, broken: Window, twin: Window) -> int | None:
    slots = [
        index
        for index, slot in enumerate(broken.slots)
        if spec.layer in ("", slot.layer) and spec.role in ("", str(slot.role))
    ]
    for step in range(spec.at, broken.steps.size):
        ours, theirs = ({n: v[:, step, slots] for n, v in w.fields.items()} for w in (broken, twin))
        if spec.ranks > 1:
            differs = (np.isnan(ours["amax"]) != np.isnan(theirs["amax"])) | (ours["amax"][:1] != ours["amax"][-1:])
            if spec.rule == "rank-missing":
                differs = np.isnan(ours["amax"])
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                differs = np.abs(np.log2(ours["amax"] / theirs["amax"])) > np.log2(1.1)
                for count in ("zeros", "overflow", "underflow", "nonfinite"):
                    differs |= np.abs(ours[count] - theirs[count]) / theirs["numel"] > 1e-3
                differs |= np.isnan(ours["amax"]) != np.isnan(theirs["amax"])
                differs |= np.abs(np.log2(ours["scale_min"] / theirs["scale_min"])) > np.log2(1.1)
                if spec.rule == "scale-frozen":  # exact arithmetic: it does not wait for ten per cent
                    differs = ours["scale_min"] != theirs["scale_min"]
        if differs.any():
            return step
    return None


def loss_up(broken: Window, twin: Window, at: int) -> int | None:
    ours, theirs = broken.scalars["loss"].values, twin.scalars["loss"].values
    for step in range(at, ours.size):
        mean, other = ours[max(at, step - 2) : step + 1].mean(), theirs[max(at, step - 2) : step + 1].mean()
        if not mean <= 1.1 * other:
            return step
    return None


def healthy_runs(record: Recordings) -> dict[str, list[int]]:
    """Warnings of each healthy run, by recipe."""
    shadow = {"recipe": AmaxScaling(), "shadow": True}
    kinds: dict[str, dict[str, Any]] = {
        "amax": {"recipe": AmaxScaling()},
        "current": {"recipe": CurrentScaling()},
        "delayed": {"recipe": DelayedScaling()},
        "shadow": shadow,
    }
    found: dict[str, list[int]] = {}
    for seed in HEALTHY_SEEDS:
        for name, options in kinds.items():
            window = record(
                f"healthy {name} {seed}",
                lambda options=options, seed=seed: faults.record(**options, seed=seed, steps=HEALTHY_STEPS),  # type: ignore[misc]  # mypy cannot infer it
            )
            told = warnings(list(diagnose(cut(window, 64)).findings))
            for finding in told:
                print(f"healthy {name}, seed {seed}: {finding}", file=sys.stderr)
            found.setdefault(name, []).append(len(told))
    return found


def tables(trials: list[Trial], healthy: dict[str, list[int]]) -> str:
    lines = [
        "| fault | recipes | found within 5 steps | steps from deviation to finding | steps from finding to loss up |",
        "|---|---|---|---|---|",
    ]
    for name in FAULTS:
        own = [trial for trial in trials if trial.fault == name]
        delays = [trial.told - trial.deviated for trial in own if trial.told is not None and trial.deviated is not None]
        leads = [trial.risen - trial.told for trial in own if trial.told is not None and trial.risen is not None]
        soon = sum(delay <= WITHIN for delay in delays)
        recipes = ", ".join(dict.fromkeys(trial.recipe for trial in own))
        lead = f"{span(leads)} ({len(leads)} of {len(own)} runs)" if leads else "the loss did not rise"
        lines.append(f"| {name} | {recipes} | {soon} of {len(own)} | {span(delays)} | {lead} |")
    lines += ["", "| healthy runs | seeds | steps | with a warning or worse |", "|---|---|---|---|"]
    for name, counts in healthy.items():
        lines.append(f"| {name} | {len(counts)} | {HEALTHY_STEPS} | {sum(count > 0 for count in counts)} |")
    right = sum(
        trial.told is not None and trial.deviated is not None and trial.told - trial.deviated <= WITHIN
        for trial in trials
    )
    wrong = sum(count > 0 for counts in healthy.values() for count in counts) + sum(trial.early > 0 for trial in trials)
    judged = len(trials) + sum(map(len, healthy.values()))
    lines += [
        "",
        f"Recall: {right} of {len(trials)} faults ({right / len(trials):.0%}). Precision: {right} of {right + wrong} "
        f"runs that were called broken ({right / (right + wrong):.0%}); {wrong} false of {judged} judged, "
        "where the runs with a fault count as healthy until it begins.",
    ]
    return "\n".join(lines)


def span(values: list[int]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}, median {statistics.median(values):g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep recordings here, and use those that are there")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="stop recording then (default %(default)s)")
    args = parser.parse_args()
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    record = Recordings(args.keep, args.budget_s)
    trials = [
        trial(record, name, spec, recipe, seed)
        for name, spec in FAULTS.items()
        for recipe in spec.recipes
        for seed in HELD_OUT_SEEDS
    ]
    for each in trials:
        print(each, file=sys.stderr)
    text = tables(trials, healthy_runs(record))
    month = time.strftime("%B %Y")
    where = f"{platform.machine()}, CPU, {month}; seeds {', '.join(map(str, HELD_OUT_SEEDS))} (faults) and "
    where += f"{HEALTHY_SEEDS[0]} to {HEALTHY_SEEDS[-1]} (healthy), none of which set a threshold but "
    where += "INPUT_DOUBLED_BITS and INPUT_RISING_BITS"
    RESULTS.write_text(f"# Faults found, and healthy runs left alone\n\n`bench/found_faults.py`, {where}.\n\n{text}\n")
    page = DOCS.read_text()
    begin, end = "<!-- bench/found_faults.py writes this -->\n", "<!-- until here -->"
    DOCS.write_text(re.sub(f"{begin}.*?{end}", lambda _: f"{begin}{text}\n{end}", page, flags=re.DOTALL))
    print(text)


if __name__ == "__main__":
    main()
