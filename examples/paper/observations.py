"""The paper's observations (section 1.7 of our notes: (i) to (viii)), each held against the study's own numbers.

`observations` gives for each its claim, whether it holds here, and the numbers that say so. A claim about growth with
size needs two sizes; the quick form, which has one, leaves those out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from paper.measure import passing

Numbers = dict[str, Any]
STATIC_FLIPS = 0.05  # changes a step: one in twenty
SHARP_RISE = 2  # powers of two within the first steps


@dataclass(frozen=True)
class Observation:
    """`holds` is None where this study cannot tell."""

    number: str
    claim: str
    holds: bool | None
    numbers: str


def observations(found: Numbers) -> list[Observation]:
    """In the paper's order."""
    sizes: Numbers = found["sizes"]
    at_rest = {size: own["inference"] for size, own in sizes.items() if "inference" in own}
    checks: list[Callable[[], Observation]] = [
        lambda: _weights_larger_and_narrower(at_rest),
        lambda: _varies_more_with_size(at_rest),
        lambda: _attention_output_is_highest(at_rest),
        lambda: _upper_limit_is_the_tightest_tensors(found, at_rest),
        lambda: _inputs_and_weights_are_static(sizes),
        lambda: _gradients_change_and_rise(sizes),
        lambda: _ends_are_atypical(sizes),
        lambda: _gradients_span_more_with_size(sizes),
    ]
    return [check() for check in checks]


def _weights_larger_and_narrower(at_rest: Numbers) -> Observation:
    parts, holds = [], []
    for size, by_role in at_rest.items():
        w, x = by_role["weight"], by_role["input"]
        holds.append(w["median"] > x["median"] and w["integers"] < x["integers"])
        parts.append(f"{size}: W median {w['median']:g}, {w['integers']} integers; X {x['median']:g}, {x['integers']}")
    claim = "Scales of weights are larger and spread less than those of inputs"
    return Observation("i", claim, _all(holds), "; ".join(parts))


def _varies_more_with_size(at_rest: Numbers) -> Observation:
    spans = {size: _mean_range(by_role["input"]) for size, by_role in at_rest.items()}
    holds = _all(late > early for early, late in pairwise(spans.values()))
    claim = "Scales of inputs vary more over depth as models grow"
    return Observation("ii", claim, holds, _by_size(spans, "{:.2f}", "mean range of X over depth, in bits: "))


def _attention_output_is_highest(at_rest: Numbers) -> Observation:
    parts, holds = [], []
    for size, by_role in at_rest.items():
        x = by_role["input"]
        spans, out = x["range_over_depth"], x["modes"].get("attn.out", [0])
        widest = max(spans, key=lambda kind: spans[kind])
        early = out.index(max(out)) < len(out) / 2
        holds.append(x["highest_kind"] == "attn.out" and spans.get("attn.out", 0) == spans[widest] and early)
        parts.append(f"{size}: highest {x['highest_kind']} ({x['highest']}), attn.out by depth {_list(out)}")
    claim = "The input of attn.out has the highest scale, varies most over depth, and is highest in the first layers"
    return Observation("iii", claim, _all(holds), "; ".join(parts))


def _upper_limit_is_the_tightest_tensors(found: Numbers, at_rest: Numbers) -> Observation:
    parts, holds = [], []
    for size, by_role in at_rest.items():
        ends = [_upper_end(task, scores) for task, scores in found["inference"][size].items()]
        lowest = min(by_role["input"]["lowest"], by_role["weight"]["lowest"])
        holds.append(all(end == lowest for end in ends))
        kind = by_role["input"]["lowest_kind"]
        parts.append(f"{size}: upper ends {_list(ends)}, lowest AMAX scale {lowest} (X of {kind})")
    claim = "A constant works up to the FP8-AMAX scale of the lowest tensor, the input of attn.qkv"
    return Observation("iv", claim, _all(holds), "; ".join(parts))


def _upper_end(task: str, scores: Numbers) -> int | None:
    inside = passing(
        {int(constant): score for constant, score in scores["constants"].items()},
        scores["fp32_of_sweep"],
        lower_is_better=task == "text",
    )
    return max(inside, default=None)


def _inputs_and_weights_are_static(sizes: Numbers) -> Observation:
    parts, holds = [], []
    for size, own in sizes.items():
        x, w = own["dynamics"]["input"], own["dynamics"]["weight"]
        settled = own["settled"]["input"]["integers"] > 1
        holds.append(max(x["flips_per_step"], w["flips_per_step"]) <= STATIC_FLIPS and settled)
        parts.append(
            f"{size}: flips a step X {x['flips_per_step']:.3f}, W {w['flips_per_step']:.3f}, largest jump "
            f"{x['largest_jump']} and {w['largest_jump']}"
        )
    claim = "In training X and W are nearly static, each layer at a value of its own"
    return Observation("v", claim, _all(holds), "; ".join(parts))


def _gradients_change_and_rise(sizes: Numbers) -> Observation:
    parts, holds = [], []
    for size, own in sizes.items():
        g, x, w = (own["dynamics"][role] for role in ("grad_output", "input", "weight"))
        more = g["flips_per_step"] > max(x["flips_per_step"], w["flips_per_step"])
        holds.append(more and g["rise_in_first_steps"] >= SHARP_RISE)
        parts.append(
            f"{size}: flips a step G {g['flips_per_step']:.3f}, X {x['flips_per_step']:.3f}, W "
            f"{w['flips_per_step']:.3f}; G rises by {g['rise_in_first_steps']:g} (at most {g['largest_rise']})"
        )
    claim = "G changes more often, and rises sharply in the first steps"
    return Observation("vi", claim, _all(holds), "; ".join(parts))


def _ends_are_atypical(sizes: Numbers) -> Observation:
    parts, holds = [], []
    for size, own in sizes.items():
        x, g = own["ends"]["input"], own["ends"]["grad_output"]
        holds.append(x["first"] > 0 and g["first"] < 0 and g["last"] > 0)
        parts.append(f"{size}: first X {x['first']:+.1f}, first G {g['first']:+.1f}, last G {g['last']:+.1f}")
    claim = "The first layer's X is higher and its G lower than the layers' between, the last layer's G is higher"
    return Observation("vii", claim, _all(holds), "; ".join(parts))


def _gradients_span_more_with_size(sizes: Numbers) -> Observation:
    spans = {size: own["dynamics"]["grad_output"]["integers_in_last_steps"] for size, own in sizes.items()}
    holds = _all(late > early for early, late in pairwise(spans.values()))
    claim = "G spans more integers as models grow"
    return Observation("viii", claim, holds, _by_size(spans, "{:.2f}", "integers a tensor within the last 60 steps: "))


def _mean_range(role: Numbers) -> float:
    ranges = list(role["range_over_depth"].values())
    return float(sum(ranges)) / len(ranges)


def _all(holds: Any) -> bool | None:
    values = list(holds)
    return all(values) if values else None


def _by_size(values: Numbers, form: str, label: str) -> str:
    return label + ", ".join(f"{size} {form.format(value)}" for size, value in values.items())


def _list(values: Sequence[object]) -> str:
    return "[" + ", ".join(map(str, values)) + "]"
