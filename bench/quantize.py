"""What a cast to FP8 costs on a CPU, with and without statistics: our C++ kernels against torch, interleaved.

Every candidate does what just-in-time scaling needs: amax of x, scale = max / amax, cast. x is bfloat16, the format
E4M3FN. Only one of them also counts: "statistics" are all columns of `fp8core.records`. torch.compile is warmed up for
each shape first. One thread; its processor time is taken, and the candidates take turns, so that other work on the
machine disturbs little and all alike.

    python bench/quantize.py [--rounds 40]        # writes bench/results/quantize.md
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fp8core.formats import E4M3FN
from fp8core.kernels import cpu
from fp8core.stats import StatsArena

SHAPES = ((2048, 384), (2048, 1536), (8192, 4096))
RESULTS = Path(__file__).parent / "results" / "quantize.md"

OURS, OURS_PLAIN = "ours, all statistics", "ours, none"
COMPILED, EAGER, HISTOGRAM = "torch.compile, none", "torch eager, none", "exponent histogram alone"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=40)
    options = arguments.parse_args()
    if reason := cpu.unavailable_reason():
        raise SystemExit(f"nothing to measure: {reason}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {shape: measure(shape, options.rounds) for shape in SHAPES}
    text = report(results, options.rounds)
    print(text)
    RESULTS.write_text(text + "\n")


def measure(shape: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate, a value for each round."""
    x = torch.randn(shape).bfloat16()
    arena, slot = StatsArena(1), torch.tensor(0)
    largest = torch.tensor(E4M3FN.max)

    def ours() -> Tensor:
        return cpu.cast(x, largest / cpu.amax(x), E4M3FN, words=arena.words, slot=slot)[0]

    def ours_plain() -> Tensor:
        return cpu.cast(x, largest / cpu.amax(x), E4M3FN)[0]

    def eager(x: Tensor = x) -> Tensor:
        scale = largest / x.abs().amax().float()
        return (x.float() * scale).clamp(-E4M3FN.max, E4M3FN.max).to(torch.float8_e4m3fn)

    compiled = torch.compile(eager, dynamic=False)
    candidates: dict[str, Callable[[], object]] = {
        OURS: ours,
        OURS_PLAIN: ours_plain,
        COMPILED: lambda: compiled(x),
        EAGER: eager,
        HISTOGRAM: lambda: cpu.exponent_histogram(x),
    }
    assert torch.equal(ours().view(torch.uint8), eager().view(torch.uint8))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            candidate()  # so that each finds the caches and the heap as it leaves them, not as another one does
            start = time.thread_time()
            candidate()
            seconds[name].append(time.thread_time() - start)
    return seconds


def report(results: dict[tuple[int, int], dict[str, list[float]]], rounds: int) -> str:
    """The table and what follows from it."""
    lines = [
        "# Casting to FP8 on a CPU",
        "",
        f"{machine()}; {datetime.now():%B %Y}. amax, scale and cast of bfloat16 to E4M3FN, one thread,",
        f"{rounds} interleaved rounds, median (quartiles) of its processor time in ms: `bench/quantize.py`.",
        "",
        "| | " + " | ".join(f"{rows} x {columns}" for rows, columns in SHAPES) + " |",
        "|---" * (1 + len(SHAPES)) + "|",
    ]
    for name in (OURS, OURS_PLAIN, COMPILED, EAGER, HISTOGRAM):
        cells = [cell(results[shape][name]) for shape in SHAPES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for title, other in (
        ("statistics / torch.compile without (wanted: < 1)", COMPILED),
        ("statistics / torch eager without (wanted: <= 0.5)", EAGER),
        ("statistics / our own without (wanted: <= 1.6)", OURS_PLAIN),
    ):
        ratios = [np.median(results[shape][OURS]) / np.median(results[shape][other]) for shape in SHAPES]
        lines.append(f"| {title} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def cell(seconds: list[float]) -> str:
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]) * 1e3
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def machine() -> str:
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    name = model[1] if model else platform.machine()
    return f"{os.cpu_count()} cores of {name}, Python {platform.python_version()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
