"""What the charts share: panels stacked by pixels on one step axis, layer names in blocks, sparklines."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8scope_collector.storage.reader import Slot
from fp8scope_dashboard import text

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_COLUMNS = 500  # of a heat map
MAX_POINTS = 750  # of a curve, each with its smallest and its largest value
CHARACTER_PX = 6.3
_BLOCK = re.compile(r"(.*?\.\d+)\.(.+)")


@dataclass
class Stack:
    """Panels one below the other, each as high as it says, in a figure of a known height."""

    height: int
    top: int
    bottom: int
    used: float = 0.0

    def take(self, height: float, gap: float = 0.0) -> tuple[float, float]:
        """The next panel's part of the plot's height, as plotly counts it: from below, 0 to 1."""
        inside = self.height - self.top - self.bottom
        high = 1 - self.used / inside
        self.used += height
        low = 1 - self.used / inside
        self.used += gap
        return max(0.0, low), min(1.0, high)


def blocks_of(layers: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Consecutive layers of one block together: (block, names within it); a layer outside blocks is its own."""
    blocks: list[tuple[str, list[str]]] = []
    for layer in layers:
        match = _BLOCK.fullmatch(layer)
        block, leaf = match.groups() if match else (layer, "")
        if match and blocks and blocks[-1][0] == block:
            blocks[-1][1].append(leaf)
        else:
            blocks.append((block, [leaf]))
    return blocks


def together(layers: Sequence[str]) -> str:
    """Consecutive layers as one name: what they share of a block is said once, of many only the ends."""
    (block, leaves), *others = blocks_of(layers)
    names = [f"{block}.{leaf}" if leaf else block for leaf in leaves[:1]] + leaves[1:]
    names += [f"{block}.{leaf}" if leaf else block for block, leaves in others for leaf in leaves]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]}"


def layer_axis(slots: Sequence[Slot], row_px: float) -> tuple[dict[str, Any], list[float], int]:
    """Ticks of an axis whose rows are layers, the boundaries between blocks, and the width of the labels in px.

    Every row has its name where rows are high enough; otherwise each block has one, or every n-th block.
    """
    blocks = blocks_of([slot.layer for slot in slots])
    starts = np.cumsum([0] + [len(leaves) for _, leaves in blocks])
    block_px = row_px * len(slots) / len(blocks)
    boundaries = [float(start) - 0.5 for start in starts[1:-1]] if block_px >= 6 else []  # else they hide the rows
    if row_px >= 10.5:
        names = []
        for block, leaves in blocks:
            names += [f"{block} │ {leaf}" if i == 0 and leaf else leaf or block for i, leaf in enumerate(leaves)]
        positions = [float(row) for row in range(len(slots))]
    else:
        each = max(1, int(np.ceil(12 / block_px)))
        chosen = range(0, len(blocks), each)
        names = [blocks[i][0] for i in chosen]
        positions = [float(starts[i] + starts[i + 1] - 1) / 2 for i in chosen]
    short = [text.shorten(name, 30) for name in names]
    width = int(max((len(name) for name in short), default=0) * CHARACTER_PX) + 12
    axis = {"tickmode": "array", "tickvals": positions, "ticktext": [text.plain(name) for name in short]}
    return axis, boundaries, max(56, width)


def gaps_of(step: Ints, last: Ints) -> Ints:
    """Where nothing was recorded for much longer than usual: the indices to insert a missing point before."""
    distance = step[1:] - last[:-1]
    return (
        np.flatnonzero(distance > 3 * max(1.0, float(np.median(distance)))) + 1
        if distance.size
        else np.empty(0, np.int64)
    )


def with_gaps(x: Floats, values: Floats, gaps: Ints) -> tuple[Floats, Floats]:
    """A curve that is interrupted where there are gaps, instead of a straight line that nobody measured."""
    twice = np.repeat(gaps, 2)  # one missing point at each end
    ends = np.stack([x[gaps - 1] + 0.5, x[gaps] - 0.5], axis=1).ravel()
    return np.insert(x, twice, ends), np.insert(values.astype(np.float64), twice, np.nan)


def flat_where_missing(*edges: Floats) -> list[Floats]:
    """The edges of a band, all at one height where any is missing: plotly's fills run across what is not there."""
    missing = np.isnan(np.array(edges)).any(axis=0)
    if missing.all() or not missing.any():
        return list(edges)
    place = np.arange(missing.size)
    return [np.where(missing, np.interp(place, place[~missing], edges[0][~missing]), edge) for edge in edges]


def spark(values: npt.NDArray[np.float64], bars: int = 42) -> list[float | None]:
    """Heights of at most `bars` bars, the largest of each group kept; None where nothing is recorded."""
    starts = np.unique(np.linspace(0, values.size, min(bars, values.size), endpoint=False).astype(np.int64))
    highest = np.fmax.reduceat(values, starts).round(3) if values.size else values
    return [None if math.isnan(height) else height for height in highest.tolist()]
