"""The paper's figures 5 to 10 from the collector's database, and one that it lacks: what casts do along the sweep.

`draw` gives plotly figures by name; `write_pictures` photographs them in the report's page, where there is a Chromium.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from plotly.graph_objects import Figure, Scatter
from plotly.subplots import make_subplots

from fp8core.records import Role
from fp8scope_collector.storage.reader import Reader
from paper.measure import LAYERS, Ints, loss_curve, place, scales

Numbers = dict[str, Any]
COLORS = ("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#666666")
SHORT = {Role.INPUT: "X", Role.WEIGHT: "W", Role.GRAD_OUTPUT: "G"}
CHROMIUM = Path("/usr/bin/chromium")
WIDTH = 1000


def draw(reader: Reader, found: Numbers) -> dict[str, Figure]:
    """Every figure that the finished runs allow, by the name of its picture."""
    figures = {}
    if found["inference"]:
        figures["fig5-constants"] = _constants(found)
    at_rest = {size: own["inference"] for size, own in found["sizes"].items() if "inference" in own}
    if at_rest:
        figures["fig6-depth"] = _depth(at_rest)
    for number, size in enumerate(found["sizes"], 7):
        figures[f"fig{number}-steps-{size}"] = _steps(scales(reader, f"{size}-train-amax-graphcore-seed0"), size)
    figures["fig10-loss"] = _losses(reader, list(found["sizes"]))
    figures["casts"] = _casts(found)
    return figures


def write_pictures(page: Path, names: list[str], folder: Path) -> list[Path]:
    """A PNG of each figure of the page; none, and a sentence, where Chromium is missing."""
    if not CHROMIUM.exists():
        print(f"no pictures: {CHROMIUM} is missing (make test-deps)", file=sys.stderr)
        return []
    from PIL import Image
    from playwright.sync_api import sync_playwright

    folder.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": WIDTH + 100, "height": 900})
        tab.goto(page.as_uri())
        for name in names:
            picture = tab.locator(f"[id='{name}']").screenshot()
            with Image.open(io.BytesIO(picture)) as image:
                image.convert("RGB").quantize(64).save(folder / f"{name}.png", optimize=True)
        browser.close()
    return [folder / f"{name}.png" for name in names]


def _constants(found: Numbers) -> Figure:
    """Figure 5, and the same of training: scores against the constant, as a part of float32's."""
    figure = make_subplots(1, 2, subplot_titles=("inference", "training (loss of float32 / loss)"), shared_yaxes=True)
    for size, tasks in found["inference"].items():
        for task, scores in tasks.items():
            loss = task == "text"
            points = sorted((int(constant), score) for constant, score in scores["constants"].items())
            parts = [
                scores["fp32_of_sweep"] / score if loss else score / scores["fp32_of_sweep"] for _, score in points
            ]
            _line(figure, [constant for constant, _ in points], parts, f"{size} {task}", 1)
    for size, methods in found["losses"].items():
        points = sorted(
            (int(name.removeprefix("constant")), losses) for name, losses in methods.items() if "con" in name
        )
        parts = [np.mean([methods["fp32"][seed] / loss for seed, loss in losses.items()]) for _, losses in points]
        _line(figure, [constant for constant, _ in points], parts, f"{size} training", 2)
    figure.add_hline(y=0.995, line_dash="dot", line_color="#999999")
    figure.update_yaxes(range=[0.5, 1.03])
    figure.update_xaxes(title_text="scale_exp2 of all tensors")
    return _sized(figure, 420)


def _line(figure: Figure, x: Any, y: Any, name: str, column: int, row: int = 1, **more: Any) -> None:
    figure.add_trace(Scatter(x=list(x), y=list(y), name=name, mode="lines+markers", **more), row=row, col=column)


def _depth(at_rest: Numbers) -> Figure:
    """Figure 6: FP8-AMAX's scale over depth in inference."""
    sizes = list(at_rest)
    titles = [f"{role}, {size}" for role in ("W", "X") for size in sizes]
    figure = make_subplots(2, len(sizes), subplot_titles=titles, shared_yaxes="rows")
    for column, size in enumerate(sizes, 1):
        for row, role in enumerate(("weight", "input"), 1):
            by_kind = at_rest[size][role]["modes"]
            for color, (kind, values) in zip(COLORS, by_kind.items(), strict=False):
                name = kind if len(by_kind) == len(LAYERS) else ""
                first = row == 1 and column == 1
                line = {"color": color}
                _line(
                    figure, range(len(values)), values, name, column, row, line=line, legendgroup=name, showlegend=first
                )
    figure.update_xaxes(title_text="block", row=2)
    return _sized(figure, 520)


def _steps(moved: Mapping[str, Ints], size: str) -> Figure:
    """Figures 7 to 9: FP8-AMAX's scale over training steps, by kind of layer and role, a line a block."""
    titles = [f"{kind} {SHORT[role]}" for kind in LAYERS for role in Role]
    figure = make_subplots(len(LAYERS), len(Role), subplot_titles=titles, shared_xaxes=True, vertical_spacing=0.05)
    blocks = sorted({place(tensor)[0] for tensor in moved})
    shown = sorted({blocks[round(part * (len(blocks) - 1) / 3)] for part in range(4)})
    for tensor, exponents in moved.items():
        block, kind, role = place(tensor)
        if block not in shown:
            continue
        row, column = LAYERS.index(kind) + 1, list(Role).index(Role(role)) + 1
        line = {"color": COLORS[shown.index(block)], "width": 1}
        figure.add_trace(
            Scatter(
                y=exponents.tolist(),
                name=f"block {block}",
                mode="lines",
                line=line,
                legendgroup=str(block),
                showlegend=row == column == 1,
            ),
            row=row,
            col=column,
        )
    figure.update_xaxes(title_text="step", row=len(LAYERS))
    return _sized(figure, 900, title=f"{size}: scale_exp2 over steps")


def _losses(reader: Reader, sizes: list[str]) -> Figure:
    """Figure 10: the training loss in float32 and FP8, and their difference."""
    figure = make_subplots(2, 1, subplot_titles=("loss, mean of ten steps", "FP8-AMAX less float32, in percent"))
    for color, size in zip(COLORS, sizes, strict=False):
        exact, cast = (
            _smooth(loss_curve(reader, f"{size}-train-{method}-seed0")) for method in ("fp32", "amax-graphcore")
        )
        steps = np.arange(exact.size) * 10
        _line(figure, steps, exact, f"{size} fp32", 1, 1, line={"color": color})
        _line(figure, steps, cast, f"{size} FP8-AMAX", 1, 1, line={"color": color, "dash": "dot"})
        _line(figure, steps, 100 * (cast / exact - 1), size, 1, 2, line={"color": color}, showlegend=False)
    figure.update_xaxes(title_text="step", row=2)
    return _sized(figure, 600)


def _smooth(curve: Any) -> Any:
    whole = curve.size // 10 * 10
    return curve[:whole].reshape(-1, 10).mean(axis=1)


def _casts(found: Numbers) -> Figure:
    """What the paper lacks: SQNR, overflow and underflow of each role along the sweep, in training."""
    titles = ("SQNR, dB", "clipped, % of elements", "vanished, % of elements")
    figure = make_subplots(1, 3, subplot_titles=titles)
    size = next(iter(found["sizes"]))
    by_constant = {
        int(name.removeprefix("constant")): roles
        for name, roles in found["sizes"][size]["casts"].items()
        if name.startswith("constant")
    }
    for color, role in zip(COLORS, Role, strict=False):
        points = [(constant, roles[role.value]) for constant, roles in sorted(by_constant.items())]
        x = [constant for constant, _ in points]
        for column, (field, factor) in enumerate((("sqnr_db", 1), ("overflow", 100), ("underflow", 100)), 1):
            y = [factor * (own[field] or 0) for _, own in points]
            _line(figure, x, y, f"{SHORT[role]} ({role})", column, line={"color": color}, showlegend=column == 1)
    figure.update_xaxes(title_text="scale_exp2 of all tensors")
    return _sized(figure, 380, title=f"{size}, pre-training")


def _sized(figure: Figure, height: int, title: str | None = None) -> Figure:
    margin = {"l": 50, "r": 20, "t": 60 if title else 40, "b": 40}
    figure.update_layout(width=WIDTH, height=height, title=title, template="plotly_white", margin=margin)
    figure.update_annotations(font_size=12)
    return figure
