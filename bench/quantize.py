"""What a cast to FP8 costs on a CPU, with and without statistics: our C++ kernels against torch, interleaved.

Every candidate does what just-in-time scaling needs: amax of x, scale = max / amax, cast. x is bfloat16, the format
E4M3FN. Only one of them also counts: "statistics" are all columns of `fp8core.records`. torch.compile is warmed up for
each shape first. One thread; its processor time is taken, and the candidates take turns, so that other work on the
machine disturbs little and all alike. Freed memory is kept by the process: the first touch of fresh pages would cost
some candidates as much as the cast, by chance of the heap.

Then what the statistics cost where they are used: steps of the demo's model (`examples/train_gpt.py`, its default size)
with the arena recording and not, by turns.

    python bench/quantize.py [--rounds 40] [--steps 12]       # writes bench/results/quantize.md
"""

from __future__ import annotations

import argparse
import runpy
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import LinearMMConfig

from fp8core import Fp8Linear, convert_to_fp8
from fp8core.formats import E4M3FN
from fp8core.kernels import cpu
from fp8core.records import Role
from fp8core.stats import StatsArena
from measured import cell, keep_freed_memory, machine

SHAPES = ((2048, 384), (2048, 1536), (8192, 4096))
RESULTS = Path(__file__).parent / "results" / "quantize.md"

OURS, OURS_PLAIN = "ours, all statistics", "ours, none"
COMPILED, EAGER, TORCHAO = "torch.compile, none", "torch eager, none", "torchao eager, none"
HISTOGRAM = "exponent histogram alone"
EXAMPLE = Path(__file__).parents[1] / "examples" / "train_gpt.py"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=40)
    arguments.add_argument("--steps", type=int, default=12, help="of each kind, of the demo's model")
    options = arguments.parse_args()
    if reason := cpu.unavailable_reason():
        raise SystemExit(f"nothing to measure: {reason}")
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {shape: measure(shape, options.rounds) for shape in SHAPES}
    text = report(results, options.rounds) + "\n\n" + report_steps(*step_seconds(options.steps))
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
        TORCHAO: lambda: hp_tensor_to_float8_dynamic(
            x, torch.float8_e4m3fn, LinearMMConfig(), scaling_granularity=ScalingGranularity.TENSORWISE
        ),
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
        f"{machine('torch')}; {datetime.now():%B %Y}. amax, scale and cast of bfloat16 to E4M3FN, one thread,",
        f"{rounds} interleaved rounds, median (quartiles) of its processor time in ms: `bench/quantize.py`.",
        "",
        "| | " + " | ".join(f"{rows} x {columns}" for rows, columns in SHAPES) + " |",
        "|---" * (1 + len(SHAPES)) + "|",
    ]
    for name in (OURS, OURS_PLAIN, COMPILED, EAGER, TORCHAO, HISTOGRAM):
        cells = [cell(results[shape][name]) for shape in SHAPES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for title, other in (
        ("statistics / torch.compile without (wanted: < 1)", COMPILED),
        ("statistics / torch eager without (wanted: <= 0.5)", EAGER),
        ("statistics / torchao eager without (wanted: <= 0.5)", TORCHAO),
        ("statistics / our own without (wanted: <= 1.6)", OURS_PLAIN),
    ):
        ratios = [np.median(results[shape][OURS]) / np.median(results[shape][other]) for shape in SHAPES]
        lines.append(f"| {title} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def step_seconds(steps: int) -> tuple[list[float], list[float]]:
    """Seconds of training steps of the demo's model with statistics and without, taken by turns."""
    example = runpy.run_path(str(EXAMPLE))
    model: nn.Module = example["Gpt"](layers=6, width=384, heads=6, context=256)
    convert_to_fp8(model, module_filter_fn=lambda _, name: name.startswith("blocks."))
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    arena = StatsArena(3 * len(layers))
    for index, layer in enumerate(layers):
        layer.bind_stats(arena, {role: 3 * index + offset for offset, role in enumerate(Role)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens_BT = torch.randint(256, (8, 257), generator=torch.Generator().manual_seed(0))
    seconds: tuple[list[float], list[float]] = ([], [])
    for step in range(2 * steps + 2):  # the first two warm up
        arena.recording = step % 2 == 0
        arena.reset()
        start = time.thread_time()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= 2:
            seconds[step % 2].append(time.thread_time() - start)
        assert bool(arena.words[:, 0].all()) == arena.recording
    return seconds


def report_steps(with_statistics: list[float], without: list[float]) -> str:
    """One sentence; the ratio is of neighbouring steps."""
    low, median, high = np.quantile(np.divide(with_statistics, without), [0.25, 0.5, 0.75])
    return (
        f"A step of the demo's model (8 x 256 bytes, 6 blocks, 384 wide), {len(without)} of each kind by turns: "
        f"{cell(with_statistics)} ms with all statistics,\n{cell(without)} without; ratio {median:.3f} "
        f"({low:.3f}-{high:.3f}; wanted: <= 1.03)."
    )


if __name__ == "__main__":
    main()
