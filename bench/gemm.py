"""What an FP8 product costs on a CPU and how exact it is: ours, torch's `_scaled_mm`, and a plain float32 GEMM.

The three GEMMs of a linear layer (fprop, dgrad, wgrad) on FP8 operands, scales that are powers of two, bfloat16 result;
the float32 GEMM multiplies float32 tensors of the same shapes. One thread; its processor time is taken, and the
candidates take turns. The error is against the float64 product of the same codes, before rounding to bfloat16.

    python bench/gemm.py [--rounds 15]        # writes bench/results/gemm.md
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

from fp8core.capabilities import capability
from fp8core.matmul import scaled_mm

SHAPES = ((2048, 384, 1536), (512, 1024, 1024))  # tokens, in_features, out_features
RESULTS = Path(__file__).parent / "results" / "gemm.md"
OURS, TORCH, FLOAT32 = "ours", "torch._scaled_mm", "float32 GEMM"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [
        "# FP8 products on a CPU",
        "",
        f"{machine()}; {datetime.now():%B %Y}.",
        f"{capability().splitlines()[1]}. One thread, {options.rounds} interleaved rounds,",
        "median (quartiles) of its processor time in ms: `bench/gemm.py`. Error: of a float32 result against float64,",
        "norm over norm.",
        "",
        f"| tokens x in x out | GEMM | {OURS} | {TORCH} | {FLOAT32} | {TORCH} / {OURS} | error of {OURS} |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        for name, (a_MK, b_KN) in gemms(*shape).items():
            lines.append(measure(" x ".join(map(str, shape)), name, a_MK, b_KN, options.rounds))
    print("\n".join(lines))
    RESULTS.write_text("\n".join(lines) + "\n")


def gemms(tokens: int, in_features: int, out_features: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The operands [M, K] and [K, N] of each GEMM, in the layouts that a linear layer has them in."""
    x = torch.randn(tokens, in_features).to(torch.float8_e4m3fn)
    w = torch.randn(out_features, in_features).to(torch.float8_e4m3fn)
    dy = torch.randn(tokens, out_features).to(torch.float8_e5m2)
    return {"fprop": (x, w.t()), "dgrad": (dy, w), "wgrad": (dy.t(), x)}


def measure(shape: str, name: str, a_MK: Tensor, b_KN: Tensor, rounds: int) -> str:
    scale_a, scale_b = torch.tensor(2.0**3), torch.tensor(2.0**-2)
    inv_a, inv_b = scale_a.reciprocal(), scale_b.reciprocal()
    a_float, b_float = a_MK.float(), b_KN.float()
    candidates: dict[str, Callable[[], object]] = {
        OURS: lambda: scaled_mm(a_MK, b_KN, scale_a, scale_b, out_dtype=torch.bfloat16, power_of_two=True),
        # It wants a row-major first and a column-major second operand: copies, as our path on tensor cores makes them.
        TORCH: lambda: torch._scaled_mm(
            a_MK.contiguous(), b_KN.t().contiguous().t(), scale_a=inv_a, scale_b=inv_b, out_dtype=torch.bfloat16
        ),
        FLOAT32: lambda: a_float @ b_float,
    }
    seconds: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    for candidate in candidates.values():
        candidate()
    for _ in range(rounds):
        for label, candidate in candidates.items():
            start = time.thread_time()
            candidate()
            seconds[label].append(time.thread_time() - start)
    exact = (a_MK.double() @ b_KN.double()) / (scale_a * scale_b).double()
    error = (scaled_mm(a_MK, b_KN, scale_a, scale_b, out_dtype=torch.float32) - exact).norm() / exact.norm()
    ratio = np.median(seconds[TORCH]) / np.median(seconds[OURS])
    cells = " | ".join(cell(seconds[label]) for label in candidates)
    return f"| {shape} | {name} | {cells} | {ratio:.1f} | {error:.1e} |"


def cell(seconds: list[float]) -> str:
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]) * 1e3
    return f"{median:.1f} ({low:.1f}-{high:.1f})"


def machine() -> str:
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    name = model[1] if model else platform.machine()
    return f"{os.cpu_count()} cores of {name}, Python {platform.python_version()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
