"""What an FP8 product costs on a CPU and how exact it is: ours, torch's `_scaled_mm`, and a plain float32 GEMM.

The three GEMMs of a linear layer (fprop, dgrad, wgrad) on FP8 operands, with a bfloat16 result under scales that are
powers of two and under any, and with a float32 result; the float32 GEMM multiplies float32 tensors of the same shapes,
once as they are and once made of the FP8 ones by torch's cast, as one would without us. One thread; its processor time
is taken, and the candidates take turns. The error is against the float64 product of the same codes: norm over norm of
a float32 result, and the part of a bfloat16 result that is not the rounded float64 one.

What a call costs before it does anything is shown by a product without rows, which allocates a result: ours as it goes,
past torch's dispatcher, ours by torch.ops, as under a profiler or a mode, and torch.mm.

torch's `_scaled_mm` goes through oneDNN where oneDNN knows the processor's bfloat16 instructions, and has only a
reference implementation there, thousands of times slower: it is timed once. The candidate in the table is what torch
does without oneDNN.

    python bench/gemm.py [--rounds 15] [--shapes 64x64x64,...]    # without shapes writes bench/results/gemm.md
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fp8core.capabilities import capability
from fp8core.kernels import cpu
from fp8core.matmul import scaled_mm
from measured import cell, keep_freed_memory, machine

# tokens, in_features, out_features
SHAPES = (
    *((2048, 384, 1536), (512, 1024, 1024), (1021, 515, 333), (256, 256, 256), (128, 128, 128), (64, 64, 64)),
    *((32, 32, 32), (16, 16, 16), (1, 1024, 1024), (16, 4096, 16), (4096, 4096, 48), (2048, 16, 2047)),
)
RESULTS = Path(__file__).parent / "results" / "gemm.md"
POWERS, ANY, WIDE = "bf16, powers of two", "bf16, any scales", "float32"
PLAIN = "bf16, any scales, no bf16 instructions"  # as on other processors
TORCH, FLOAT32, CAST = "torch._scaled_mm", "float32 GEMM", "cast + float32 GEMM"
ONE, SQUARE_FLOAT, NO_ROWS_FLOAT = torch.tensor(1.0), torch.ones(16, 16), torch.ones(0, 16)
SQUARE, NO_ROWS = SQUARE_FLOAT.to(torch.float8_e4m3fn), NO_ROWS_FLOAT.to(torch.float8_e4m3fn)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--shapes", type=lambda text: [tuple(map(int, one.split("x"))) for one in text.split(",")])
    options = arguments.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [
        "# FP8 products on a CPU",
        "",
        f"{machine('torch')}; {datetime.now():%B %Y}.",
        f"{capability().splitlines()[1]}. One thread, {options.rounds} interleaved rounds,",
        "median (quartiles) of its processor time in ms: `bench/gemm.py`. Ours by result and scales; error: of the",
        "float32 result against float64, norm over norm; off: elements of the bf16 results that are not the rounded",
        "float64 ones. Before anything is multiplied, that is with a matrix without rows, a call of ours takes",
        f"{call_us(scaled_mm_of_no_rows):.1f} us, by torch.ops {call_us(operation_of_no_rows):.1f} us, "
        f"and one of torch.mm {call_us(mm_of_no_rows):.1f} us.",
        "",
    ]
    lines += [
        f"| tokens x in x out | GEMM | {POWERS} | {ANY} | {WIDE} | {PLAIN} | {TORCH} | {FLOAT32} | {CAST} "
        f"| {TORCH} / ours | slowest of ours / {FLOAT32} | without bf16 instructions / {FLOAT32} "
        f"| slowest of ours / {CAST} | error | off |",
        "|---" * 15 + "|",
    ]
    for shape in options.shapes or SHAPES:
        for name, (a_MK, b_KN) in gemms(*shape).items():
            lines.append(measure(" x ".join(map(str, shape)), name, a_MK, b_KN, options.rounds))
    if torch._C._has_mkldnn and not options.shapes:
        lines += [
            "",
            f"{TORCH} as torch dispatches it here, through oneDNN: {once_through_onednn():,.1f} ms at 128 x 128 x 128.",
        ]
    print("\n".join(lines))
    if not options.shapes:
        RESULTS.write_text("\n".join(lines) + "\n")


def scaled_mm_of_no_rows() -> Tensor:
    return scaled_mm(NO_ROWS, SQUARE, ONE, ONE, out_dtype=torch.bfloat16)


def operation_of_no_rows() -> Tensor:
    y: Tensor = torch.ops.fp8core.scaled_mm.default(NO_ROWS, SQUARE, ONE, ONE, torch.bfloat16, False, False)
    return y


def mm_of_no_rows() -> Tensor:
    return torch.mm(NO_ROWS_FLOAT, SQUARE_FLOAT)


def call_us(candidate: Callable[[], Tensor], calls: int = 2000) -> float:
    """The median of 15 means."""
    return float(np.median([seconds_of(candidate, calls) for _ in range(15)])) * 1e6


def seconds_of(candidate: Callable[[], Tensor], calls: int) -> float:
    """Processor time of one of so many calls."""
    start = time.thread_time()
    for _ in range(calls):
        candidate()
    return (time.thread_time() - start) / calls


def once_through_onednn() -> float:
    a_MK, b_KN = gemms(128, 128, 128)["fprop"]
    one = torch.tensor(1.0)
    start = time.thread_time()
    torch._scaled_mm(a_MK, b_KN, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return (time.thread_time() - start) * 1e3


def gemms(tokens: int, in_features: int, out_features: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The operands [M, K] and [K, N] of each GEMM, in the layouts that a linear layer has them in."""
    x = torch.randn(tokens, in_features).to(torch.float8_e4m3fn)
    w = torch.randn(out_features, in_features).to(torch.float8_e4m3fn)
    dy = torch.randn(tokens, out_features).to(torch.float8_e5m2)
    return {"fprop": (x, w.t()), "dgrad": (dy, w), "wgrad": (dy.t(), x)}


def measure(shape: str, name: str, a_MK: Tensor, b_KN: Tensor, rounds: int) -> str:
    powers, any_scales = torch.tensor([2.0**3, 2.0**-2]), torch.tensor([3.7, 0.011])
    (scale_a, scale_b), (power_a, power_b), (inv_a, inv_b) = any_scales, powers, powers.reciprocal()
    a_float, b_float = a_MK.float(), b_KN.float()

    def torchs() -> Tensor:
        # It wants a row-major first and a column-major second operand: copies, as our path on tensor cores makes them.
        with torch.backends.mkldnn.flags(enabled=False):
            return torch._scaled_mm(
                a_MK.contiguous(), b_KN.t().contiguous().t(), scale_a=inv_a, scale_b=inv_b, out_dtype=torch.bfloat16
            )

    candidates: dict[str, Callable[[], Tensor]] = {
        POWERS: lambda: scaled_mm(a_MK, b_KN, power_a, power_b, out_dtype=torch.bfloat16, power_of_two=True),
        ANY: lambda: scaled_mm(a_MK, b_KN, scale_a, scale_b, out_dtype=torch.bfloat16),
        WIDE: lambda: scaled_mm(a_MK, b_KN, scale_a, scale_b, out_dtype=torch.float32),
        PLAIN: lambda: scaled_mm(a_MK, b_KN, scale_a, scale_b, out_dtype=torch.bfloat16),
        TORCH: torchs,
        FLOAT32: lambda: a_float @ b_float,
        CAST: lambda: a_MK.float() @ b_KN.float(),
    }
    engines = {PLAIN: "float32"}
    fastest = cpu.engine()
    calls = max(1, (1 << 23) // (a_MK.numel() * b_KN.shape[1]))
    seconds: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    for candidate in candidates.values():
        candidate()
    for _ in range(rounds):
        for label, candidate in candidates.items():
            cpu.use_engine(engines.get(label, fastest))
            candidate()  # so that each finds the caches and the heap as it leaves them, not as another one does
            seconds[label].append(seconds_of(candidate, calls))
    cpu.use_engine(fastest)
    product = a_MK.double() @ b_KN.double()
    exact = {POWERS: product / powers.double().prod(), ANY: product / any_scales.double().prod()}
    error = (candidates[WIDE]() - exact[ANY]).norm() / exact[ANY].norm()
    off = max((candidates[each]() != exact[each].bfloat16()).double().mean().item() for each in exact)
    median = {label: float(np.median(seconds[label])) for label in candidates}
    cells = " | ".join(cell(seconds[label]) for label in candidates)
    slowest = max(median[label] for label in (POWERS, ANY, WIDE))
    return (
        f"| {shape} | {name} | {cells} | {median[TORCH] / median[POWERS]:.1f} | {slowest / median[FLOAT32]:.2f} "
        f"| {median[PLAIN] / median[FLOAT32]:.2f} | {slowest / median[CAST]:.2f} "
        f"| {error:.1e} | {off:.3%} |"
    )


if __name__ == "__main__":
    main()
