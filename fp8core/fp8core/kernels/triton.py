"""Casts with statistics on CUDA, by the Triton kernels of `triton_jit`: the functions of every kernel module.

Payload, amax and integer counters equal the other paths' bit for bit; see `eager` for the contract. The launchers below
look at shapes and dtypes only: scale, slot and amax stay on the device, nothing waits for it. A slot outside the arena
is therefore not noticed. Statistics cost one more small launch, which merges the programs' totals into the row.

`hw_cast=True` converts by the processor's own instruction (OCP formats, compute capability 8.9 and up). It is off by
default until `bench/gpu.py` has compared it with the integer cast on a device (docs/adr/0012).
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from fp8core.device_scaling import amax_scale
from fp8core.formats import Fp8Format
from fp8core.kernels import triton_jit as jit
from fp8core.records import COLUMNS

INPUT_TYPES = (torch.bfloat16, torch.float16, torch.float32)  # in the order of triton_jit's TYPE
BLOCK = 2048
TILE = (64, 32)
PROGRAMS = 2048
_FINALISE_BLOCK = 256
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def unavailable_reason() -> str | None:
    """Why these kernels cannot run here, as a sentence, or None when they can."""
    return None if torch.cuda.is_available() else "there is no CUDA device"


def amax(x: Tensor) -> Tensor:
    """The largest finite |x| as a float32 0-d tensor; 0 if there is none."""
    x = _checked(x)
    result = torch.zeros((), device=x.device)
    programs, iterations = _split(x.numel(), BLOCK)
    if programs:
        with _device_of(x):
            jit.amax_kernel[(programs,)](
                _words(x), result.view(torch.int32), x.numel(), iterations, TYPE=_type(x), BLOCK=BLOCK, **_OPTIONS
            )
    return result


def cast(
    x: Tensor,
    scale: Tensor,
    fmt: Fp8Format,
    *,
    words: Tensor | None = None,
    slot: Tensor | None = None,
    overwrite: bool = False,
    hw_cast: bool = False,
) -> tuple[Tensor, Tensor]:
    """`x` in FP8 and its amax; with `words`, this call's statistics merged into row `slot`. See `eager.cast`."""
    x = _checked(x)
    payload = torch.empty(x.shape, dtype=getattr(torch, fmt.torch_dtype), device=x.device)
    result = torch.zeros((), device=x.device)
    programs, iterations = _split(x.numel(), BLOCK)
    with _device_of(x):
        partials = _partials(x, programs)
        if programs:
            jit.cast_kernel[(programs,)](
                _words(x),
                payload.view(torch.uint8),
                scale,
                result.view(torch.int32),
                partials,
                x.numel(),
                iterations,
                **_constants(x, fmt, words is not None, hw_cast),
                BLOCK=BLOCK,
                **_OPTIONS,
            )
        if words is not None:
            _finalise(partials, programs, words, slot, scale, result, x.numel(), overwrite)
    return payload, result


def count(x: Tensor, scale: Tensor, fmt: Fp8Format, *, words: Tensor, slot: Tensor, overwrite: bool) -> Tensor:
    """See `eager.count`."""
    return cast(x, scale, fmt, words=words, slot=slot, overwrite=overwrite)[1]


def count_by_amax(
    x: Tensor,
    fmt: Fp8Format,
    margin: int,
    clamp: int,
    *,
    words: Tensor,
    slot: Tensor,
    overwrite: bool,
    last_scales: Tensor,
) -> None:
    """See `eager.count_by_amax`."""
    count(x, amax_scale(amax(x), fmt, margin, clamp), fmt, words=words, slot=slot, overwrite=overwrite)


def cast_transpose(
    x: Tensor,
    scale: Tensor,
    fmt: Fp8Format,
    *,
    words: Tensor | None = None,
    slot: Tensor | None = None,
    overwrite: bool = False,
    hw_cast: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cast` of a matrix x [M, N], with the payload's transpose, contiguous [N, M], between payload and amax."""
    if x.ndim != 2:
        raise ValueError(f"x has {x.ndim} dimensions; cast_transpose takes a matrix")
    x = _checked(x)
    rows, columns = x.shape
    dtype = getattr(torch, fmt.torch_dtype)
    payload = torch.empty((rows, columns), dtype=dtype, device=x.device)
    transposed = torch.empty((columns, rows), dtype=dtype, device=x.device)
    result = torch.zeros((), device=x.device)
    tiles = -(-rows // TILE[0]) * -(-columns // TILE[1])
    programs, iterations = _split(tiles, 1)
    with _device_of(x):
        partials = _partials(x, programs)
        if programs:
            jit.cast_transpose_kernel[(programs,)](
                _words(x),
                payload.view(torch.uint8),
                transposed.view(torch.uint8),
                scale,
                result.view(torch.int32),
                partials,
                rows,
                columns,
                iterations,
                **_constants(x, fmt, words is not None, hw_cast),
                BLOCK_ROWS=TILE[0],
                BLOCK_COLUMNS=TILE[1],
                **_OPTIONS,
            )
        if words is not None:
            _finalise(partials, programs, words, slot, scale, result, x.numel(), overwrite)
    return payload, transposed, result


def dequantize(q: Tensor, dtype: torch.dtype) -> Tensor:
    """The exact values of the codes of `q` in float32 or bfloat16; no scale is applied. torch's cast is fast here."""
    return q.to(dtype)


def exponent_histogram(x: Tensor) -> Tensor:
    """How many elements have each biased float32 exponent, int64 [256]; see `eager.exponent_histogram`."""
    x = _checked(x)
    counts = torch.zeros(256, dtype=torch.int64, device=x.device)
    programs, iterations = _split(x.numel(), BLOCK)
    if programs:
        with _device_of(x):
            jit.exponents_kernel[(programs,)](
                _words(x), counts, x.numel(), iterations, TYPE=_type(x), BLOCK=BLOCK, **_OPTIONS
            )
    return counts


def _finalise(
    partials: Tensor,
    programs: int,
    words: Tensor,
    slot: Tensor | None,
    scale: Tensor,
    amax: Tensor,
    numel: int,
    overwrite: bool,
) -> None:
    assert slot is not None
    assert words.dtype == slot.dtype == torch.int64
    assert words.is_contiguous()
    assert words.shape[1] == len(COLUMNS)
    jit.finalise_kernel[(1,)](
        partials, programs, words, slot, scale, amax, numel, OVERWRITE=overwrite, BLOCK=_FINALISE_BLOCK, **_OPTIONS
    )


def _device_of(x: Tensor) -> torch.cuda.device:
    """Makes x's device the current one, to which Triton launches; nothing for the interpreter's CPU tensors."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def _checked(x: Tensor) -> Tensor:
    if x.dtype not in INPUT_TYPES:
        raise TypeError(f"x is {x.dtype}; expected one of {', '.join(map(str, INPUT_TYPES))}")
    return x.contiguous()


def _words(x: Tensor) -> Tensor:
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _type(x: Tensor) -> int:
    return INPUT_TYPES.index(x.dtype)


def _split(elements: int, block: int) -> tuple[int, int]:
    """Programs, and the blocks that each goes over: no more than its packed counters can count."""
    blocks = -(-elements // block)
    programs = max(min(blocks, PROGRAMS), -(-blocks // jit.MAX_ITERATIONS))
    return programs, -(-blocks // programs) if programs else 0


def _partials(x: Tensor, programs: int) -> Tensor:
    return torch.empty(jit.PARTIALS, max(programs, 1), dtype=torch.float64, device=x.device)


def _constants(x: Tensor, fmt: Fp8Format, stats: bool, hw_cast: bool) -> dict[str, int | bool]:
    return {
        "TYPE": _type(x),
        "MANTISSA_BITS": fmt.mantissa_bits,
        "SMALLEST_NORMAL": _float32_bits(fmt.smallest_normal),
        "MAX": _float32_bits(fmt.max),
        "OVERFLOW_ABOVE": _float32_bits(fmt.overflow_limit) - fmt.ties_overflow,
        "FNUZ": fmt.name.endswith("FNUZ"),
        "STATS": stats,
        "HW_CAST": hw_cast,
    }


def _float32_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")
