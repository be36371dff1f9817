"""The kernels in plain torch operations: for any device, `meta` included, and the reference of the compiled ones.

Slow (a few dozen passes over the data where statistics are wanted) and simple. Nothing here waits for the device:
rows are read and written with index_select and index_copy_, since `words[slot]` would ask the host for the slot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8core.device_scaling import amax_scale
from fp8core.formats import Fp8Format
from fp8core.records import COLUMNS, FIELD_BY_NAME, is_float
from fp8core.scaling import FLOAT32_MAX


def amax(x: Tensor) -> Tensor:
    """The largest finite |x| as a 0-d float32 tensor; 0 where there is none."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    magnitude = x.abs()
    return torch.where(magnitude.isfinite(), magnitude, 0).amax().float()


def cast(
    x: Tensor,
    scale: Tensor,
    fmt: Fp8Format,
    *,
    words: Tensor | None = None,
    slot: Tensor | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """The payload q = saturating round-half-even cast of fl32(x * scale), contiguous, of x's shape; and x's amax.

    NaN becomes the format's NaN with x's sign, +-Inf the largest finite value. With `words` (the arena's, int64
    [slots, len(COLUMNS)]) the statistics of this call are merged into row `slot`, a 0-d int64 tensor on x's device;
    `overwrite` replaces the row.
    """
    x = x.contiguous()
    scaled = x.float() * scale
    # torch 2.13 saturates E4M3FN on a CPU, but turns E5M2 into Inf and both FNUZ formats into NaN: clamp first.
    q = scaled.clamp(-fmt.max, fmt.max).to(getattr(torch, fmt.torch_dtype))
    largest = amax(x)
    if words is not None:
        assert slot is not None
        _merge(words, slot, _row(x, scaled, q, scale, largest, fmt), overwrite)
    return q, largest


def count(x: Tensor, scale: Tensor, fmt: Fp8Format, *, words: Tensor, slot: Tensor, overwrite: bool) -> Tensor:
    """The amax of `x`, and the statistics that `cast` leaves, where nobody wants the payload."""
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
    """`count` with the scale that AmaxScaling, of this margin and clamp, gives for the amax of `x`.

    `last_scales`, float32 [slots] on the host, is for a kernel that begins with the scale of the slot's last call.
    """
    count(x, amax_scale(amax(x), fmt, margin, clamp), fmt, words=words, slot=slot, overwrite=overwrite)


def dequantize(q: Tensor, dtype: torch.dtype) -> Tensor:
    """The exact values of FP8 codes, as float32 or bfloat16; no scale is applied."""
    return q.to(dtype)


def unscale(product: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """What an emulated GEMM ends with: `product`, contiguous, / (scale_a * scale_b), rounded once; may reuse it."""
    return product.mul_(inverse_of_product(scale_a, scale_b)).to(out_dtype)


def inverse_of_product(scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """1 / (scale_a * scale_b), rounded once to float32 and kept finite."""
    # float64: the product of two float32 scales is exact there and far from its limits.
    return (scale_a.double() * scale_b.double()).reciprocal().clamp(max=FLOAT32_MAX).float()


def exponent_histogram(x: Tensor) -> Tensor:
    """How many elements have each biased float32 exponent, int64 [256].

    Bin e counts 2**(e - 127) <= |x| < 2**(e - 126); bin 0 zeros and float32's subnormals, bin 255 Inf and NaN.
    """
    exponent = (x.float().view(torch.int32) >> 23) & 0xFF
    counts = torch.zeros(256, dtype=torch.int64, device=x.device)
    return counts.index_add_(0, exponent.reshape(-1), torch.ones_like(exponent, dtype=torch.int64).reshape(-1))


def _row(x: Tensor, scaled: Tensor, q: Tensor, scale: Tensor, amax: Tensor, fmt: Fp8Format) -> dict[str, Tensor]:
    finite = x.isfinite()
    magnitude = scaled.abs()
    q_value = q.float()
    q_magnitude = q_value.abs()
    clipped = magnitude >= fmt.overflow_limit if fmt.ties_overflow else magnitude > fmt.overflow_limit
    exact = x.double() * scale.double()
    inv_scale_sq = scale.double().pow(-2)
    return {
        "writes": _count(finite, 1),
        "amax": amax,
        "scale_min": scale,
        "scale_max": scale,
        "numel": _count(finite, x.numel()),
        "zeros": (x == 0).sum(),
        "overflow": (clipped & finite).sum(),
        "underflow": ((x != 0) & (q_value == 0)).sum(),
        "subnormal": ((q_magnitude > 0) & (q_magnitude < fmt.smallest_normal)).sum(),
        "nonfinite": (~finite).sum(),
        "sum_sq": torch.where(finite, exact, 0).square().sum() * inv_scale_sq,
        "err_sq": torch.where(finite, exact - q_value.double(), 0).square().sum() * inv_scale_sq,
    }


def _count(like: Tensor, value: int) -> Tensor:
    return torch.full((), value, dtype=torch.int64, device=like.device)


def _merge(words: Tensor, slot: Tensor, values: dict[str, Tensor], overwrite: bool) -> None:
    at = slot.reshape(1)
    row = words.index_select(0, at)[0]
    merged = []
    for column, name in enumerate(COLUMNS):
        fresh, old = values[name], row[column : column + 1].view(torch.float64 if is_float(name) else torch.int64)[0]
        fresh = fresh.to(old.dtype)
        if not overwrite:
            fresh = _MERGES[FIELD_BY_NAME[name].merge if name in FIELD_BY_NAME else "sum"](old, fresh)
        merged.append(fresh.reshape(1).view(torch.int64))
    words.index_copy_(0, at, torch.cat(merged)[None])


_MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"max": torch.maximum, "min": torch.minimum, "sum": torch.add}
