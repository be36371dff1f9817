"""Everything about the GPU path that a machine without one cannot show: correctness, speed, no host sync.

    python bench/gpu.py        # needs a CUDA device; prints one table, about two minutes

* casts: payloads and integer counters of the Triton kernels against the CPU's, all 16-bit values and random float32;
  the processor's own conversion against the integer cast (it may become the default once it is seen equal here).
* kernels: GB/s of each, with and without statistics, against a copy of the same tensor.
* layers: forward and backward over Llama's shapes, bfloat16, Fp8Linear with and without statistics, torchao if there.
* steps: a training step with and without a monitor, and one under torch.cuda.set_sync_debug_mode("error").
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from datetime import datetime

import torch
from torch import Tensor, nn

import fp8core
import fp8scope_agent
from fp8core.formats import E4M3FN, E5M2, FORMATS
from fp8core.kernels import kernels_for
from fp8core.records import COLUMNS, Role, is_float
from fp8core.stats import StatsArena

ROUNDS = 30
TOKENS = 8192
MATRIX = (8192, 8192)
LLAMA_SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))  # in_features, out_features
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EXACT_COLUMNS = [index for index, name in enumerate(COLUMNS) if not is_float(name) or name in ("amax", "scale_max")]

Line = tuple[str, str, str]


def main() -> None:
    if not torch.cuda.is_available():
        print("bench/gpu.py measures the CUDA path; this machine has no CUDA device.")
        return
    device = torch.device("cuda")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {datetime.now():%B %Y}")
    print(fp8core.capability())
    lines = [*check_casts(device), *time_kernels(device), *time_layers(device), *time_steps(device)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    if any(line[1] == "DIFFERENT" for line in lines):
        raise SystemExit("the GPU's casts differ from the CPU's")


def check_casts(device: torch.device) -> list[Line]:
    """Whether payload, amax and integer counters equal the CPU's bit for bit."""
    from fp8core.kernels import triton

    every_word = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    patterns = torch.randint(-(2**31), 2**31 - 1, (1 << 20,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    near = torch.randn(1 << 20) * 2.0 ** torch.randint(-24, 20, (1 << 20,))
    lines = []
    for dtype in DTYPES:
        x = torch.cat([patterns, near]) if dtype == torch.float32 else every_word.view(dtype)
        x = x.reshape(-1, 256)
        for fmt in FORMATS.values():
            differing = 0
            for value in (1.0, 0.37, 2.0**20):
                scale = torch.tensor(value)
                here, there = StatsArena(2), StatsArena(2, device)
                slot = torch.tensor(1)
                expected, amax = kernels_for("cpu").cast(x, scale, fmt, words=here.words, slot=slot)
                on_device, slot = (x.to(device), scale.to(device), fmt), slot.to(device)
                casts = [triton.cast(*on_device, words=there.words, slot=slot)]
                rows_equal = torch.equal(here.words[:, EXACT_COLUMNS], there.words[:, EXACT_COLUMNS].cpu())
                there.reset()
                plain, transposed, largest = triton.cast_transpose(*on_device, words=there.words, slot=slot)
                rows_equal &= torch.equal(here.words[:, EXACT_COLUMNS], there.words[:, EXACT_COLUMNS].cpu())
                casts += [(plain, largest), (transposed.t().contiguous(), largest)]
                if fmt in (E4M3FN, E5M2) and torch.cuda.get_device_capability() >= (8, 9):
                    casts.append(triton.cast(*on_device, hw_cast=True))
                for payload, got_amax in casts:
                    differing += int((payload.view(torch.uint8).cpu() != expected.view(torch.uint8)).sum())
                    differing += float(got_amax) != float(amax)
                differing += not rows_equal
            name = f"cast {str(dtype).removeprefix('torch.')} to {fmt}, {x.numel():,} values, 3 scales"
            lines.append((name, "DIFFERENT" if differing else "equal", f"{differing} differences"))
    return lines


def time_kernels(device: torch.device) -> list[Line]:
    """GB/s that each kernel moves (what it has to read and write once), and that as a part of a copy's."""
    from fp8core.kernels import triton

    x = torch.randn(MATRIX, device=device).bfloat16()
    target, scale = torch.empty_like(x), torch.tensor(64.0, device=device)
    arena, slot = StatsArena(1, device), torch.tensor(0, device=device)
    cast = functools.partial(triton.cast, x, scale, E4M3FN)
    cast_transpose = functools.partial(triton.cast_transpose, x, scale, E4M3FN)
    into_arena = functools.partial(cast, words=arena.words, slot=slot)
    kernels: list[tuple[str, int, Callable[[], object]]] = [
        ("copy", 4, lambda: target.copy_(x)),
        ("amax", 2, lambda: triton.amax(x)),
        ("cast", 3, cast),
        ("cast, statistics", 3, into_arena),
        ("cast + transpose", 4, cast_transpose),
        ("cast + transpose, statistics", 4, functools.partial(cast_transpose, words=arena.words, slot=slot)),
        ("exponent histogram", 2, lambda: triton.exponent_histogram(x)),
    ]
    if torch.cuda.get_device_capability() >= (8, 9):
        kernels += [
            ("cast, hardware conversion", 3, functools.partial(cast, hw_cast=True)),
            ("cast, hardware, statistics", 3, functools.partial(into_arena, hw_cast=True)),
        ]
    lines, copy_rate = [], 0.0
    for name, bytes_per_element, kernel in kernels:
        rate = x.numel() * bytes_per_element / median_ms(kernel) / 1e6
        copy_rate = copy_rate or rate
        lines.append(
            (f"{name}, bfloat16 {MATRIX[0]} x {MATRIX[1]}", f"{rate:,.0f} GB/s", f"{rate / copy_rate:.2f} of a copy")
        )
    return lines


def time_layers(device: torch.device) -> list[Line]:
    """Forward and backward of one linear layer."""
    lines = []
    for in_features, out_features in LLAMA_SHAPES:
        x = torch.randn(TOKENS, in_features, device=device, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(TOKENS, out_features, device=device, dtype=torch.bfloat16)
        plain = nn.Linear(in_features, out_features, bias=False, device=device, dtype=torch.bfloat16)
        arena = StatsArena(len(Role), device)
        layers = {
            "bfloat16": plain,
            "Fp8Linear": fp8_linear(plain, None),
            "Fp8Linear, statistics": fp8_linear(plain, arena),
        }
        if importlib.util.find_spec("torchao"):
            layers["torchao, eager"] = torchao_linear(plain)
        bfloat16_ms = 0.0
        for name, layer in layers.items():
            layer_ms = median_ms(functools.partial(forward_and_backward, layer, x, dy))
            bfloat16_ms = bfloat16_ms or layer_ms
            shape = f"{TOKENS} x {in_features} x {out_features}"
            lines.append((f"{name}, {shape}", f"{layer_ms:.3f} ms", f"{bfloat16_ms / layer_ms:.2f} x bfloat16's speed"))
    return lines


def fp8_linear(plain: nn.Linear, arena: StatsArena | None) -> nn.Module:
    """`plain` as an Fp8Linear that writes its statistics into `arena`, if there is one."""
    layer = copy_of(plain)
    fp8core.convert_to_fp8(nn.Sequential(layer))
    assert isinstance(layer, fp8core.Fp8Linear)
    if arena is not None:
        layer.bind_stats(arena, {role: index for index, role in enumerate(Role)})
    return layer


def torchao_linear(plain: nn.Linear) -> nn.Module:
    from torchao.float8 import convert_to_float8_training

    model: nn.Module = convert_to_float8_training(nn.Sequential(copy_of(plain)))
    return model


def forward_and_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    layer(x).backward(dy)


def copy_of(plain: nn.Linear) -> nn.Linear:
    layer = nn.Linear(plain.in_features, plain.out_features, bias=False, device="meta", dtype=plain.weight.dtype)
    layer.weight = nn.Parameter(plain.weight.detach().clone())
    return layer


def time_steps(device: torch.device) -> list[Line]:
    """Training steps of a stack of MLPs: no arena, a monitor, and one step in which a host sync is an error."""
    model = nn.Sequential(*[mlp(width=4096, hidden=14336) for _ in range(4)]).to(device, torch.bfloat16)
    fp8core.convert_to_fp8(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(TOKENS, 4096, device=device, dtype=torch.bfloat16)

    def step() -> Tensor:
        loss: Tensor = model(x).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        optimizer.zero_grad()
        return loss

    unmonitored_ms = median_ms(step)
    with tempfile.TemporaryDirectory() as spool, fp8scope_agent.attach(model, run="gpu", spool_dir=spool) as monitor:

        def monitored_step() -> None:
            monitor.step(loss=step())

        monitored_ms = median_ms(monitored_step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            monitored_step()
            outcome = "none"
        except RuntimeError as error:
            outcome = str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return [
        ("step, unmonitored", f"{unmonitored_ms:.2f} ms", ""),
        ("step, monitored", f"{monitored_ms:.2f} ms", f"{monitored_ms / unmonitored_ms:.3f} of unmonitored"),
        ("host syncs in a monitored step", outcome, ""),
    ]


def mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))


def median_ms(work: Callable[[], object]) -> float:
    """The median time of `work` on the device, after three calls that do not count."""
    for _ in range(3):
        work()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return statistics.median(times)


if __name__ == "__main__":
    main()
