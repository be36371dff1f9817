"""The product of two FP8 matrices, unscaled: `scaled_mm(a_MK, b_KN, ...)`, on tensor cores or by exact emulation.

    y_MN = (a_MK.float() @ b_KN.float()) / (scale_a * scale_b)

Where CUDA has FP8 tensor cores (compute capability 8.9 and up) this is `torch.nn.functional.scaled_mm` or, in older
versions, `torch._scaled_mm`. It wants a row-major first operand, a column-major second one, and every dimension but M
divisible by 16; here, once for all, operands are laid out anew where they are not so, and padded with zeros, which add
nothing to any sum. Fast accumulation (fewer bits) is for fprop only, as in Transformer Engine and torchao.

Elsewhere it is emulated: decode, multiply with float32 accumulation, unscale, round once. FP8 values are exact in
bfloat16 and their products in float32, so what is lost is the order of a float32 sum.

* On a CPU the C++ kernels do all of it, with what is fastest there: bfloat16 in tile registers (AMX) or vectors, or
  float32 vectors (`kernels/cpu_gemm.cpp`). Where torch lets them (2.10), they are the operation's body themselves, and
  plain tensors whose product nobody watches go past the dispatcher (`kernels/cpu_direct.py`).
* With the eager kernels, torch's bfloat16 GEMM if the processor has instructions for it, the result is bfloat16 and
  both scales are powers of two: unscaling is then exact and the one rounding is the GEMM's. With other scales it would
  round twice, which puts a quarter of the elements off.
* A float32 GEMM of float32 operands everywhere else.

Scales multiply into FP8. A product of scales beyond 2**+-126 flushes the result to zero or saturates the factor.

Shapes: M, N, K; the three GEMMs of a linear layer are `scaled_mm` of transposed views.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8core.kernels import cpu, eager, kernels_for
from fp8core.ops import define

ALIGNMENT = 16


def scaled_mm(
    a_MK: Tensor,
    b_KN: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    out_dtype: torch.dtype,
    power_of_two: bool = False,
    fast_accum: bool = False,
) -> Tensor:
    """a_MK @ b_KN / (scale_a * scale_b) in `out_dtype`, for FP8 operands; no gradient flows.

    Operands may be transposed views of contiguous tensors. Set `power_of_two` only if both scales are powers of two.
    """
    if not torch.compiler.is_dynamo_compiling():
        product = cpu.product_or_none(a_MK, b_KN, scale_a, scale_b, out_dtype)
        if product is not None:
            return product
    out: Tensor = _operation(a_MK, b_KN, scale_a, scale_b, out_dtype, power_of_two, fast_accum)
    return out


def mm_body(
    a_MK: Tensor,
    b_KN: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    power_of_two: bool,
    fast_accum: bool,
) -> Tensor:
    """What the operation does, on real tensors of any device."""
    if a_MK.numel() == 0 or b_KN.numel() == 0:  # an empty sum is zero, and GEMM libraries refuse empty operands
        return a_MK.new_zeros((a_MK.shape[0], b_KN.shape[1]), dtype=out_dtype)
    if has_fp8_tensor_cores(a_MK.device) and tensor_cores_take(a_MK.dtype, b_KN.dtype):
        return _tensor_core_mm(a_MK, b_KN, scale_a, scale_b, out_dtype, fast_accum)
    if kernels_for(a_MK.device.type) is cpu:
        return cpu.scaled_mm(a_MK, b_KN, scale_a, scale_b, out_dtype)
    bfloat16 = power_of_two and out_dtype == torch.bfloat16 and has_bfloat16_gemm(a_MK.device)
    return emulated_mm(a_MK, b_KN, scale_a, scale_b, out_dtype, bfloat16_mm if bfloat16 else float32_mm)


def emulated_mm(
    a_MK: Tensor,
    b_KN: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    mm: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The product without FP8 hardware; `mm` gives that of the codes' values, unscaled."""
    with torch._C._DisableAutocast():  # it reaches into the bodies of operations and would round to bfloat16 here
        return eager.unscale(mm(a_MK, b_KN), scale_a, scale_b, out_dtype)


def float32_mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """The product of the codes' values in float32, on any device."""
    return _dequantize(a_MK, torch.float32) @ _dequantize(b_KN, torch.float32)


def bfloat16_mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """The product of the codes' values, summed in float32 and rounded to bfloat16."""
    return _dequantize(a_MK, torch.bfloat16) @ _dequantize(b_KN, torch.bfloat16)


@functools.cache
def has_fp8_tensor_cores(device: torch.device) -> bool:
    """Whether torch's FP8 GEMM runs on `device`."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def tensor_cores_take(a: torch.dtype, b: torch.dtype) -> bool:
    """Whether NVIDIA's tensor cores multiply these formats: OCP's, and not E5M2 by E5M2."""
    return torch.float8_e4m3fn in (a, b) and {a, b} <= {torch.float8_e4m3fn, torch.float8_e5m2}


@functools.cache
def has_bfloat16_gemm(device: torch.device) -> bool:
    """Whether a bfloat16 GEMM on `device` is faster than a float32 one and accumulates in float32."""
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _dequantize(q: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `q`, in the memory order of `q`: GEMM libraries read transposed operands as they are."""
    dequantize = kernels_for(q.device.type).dequantize
    if q.ndim == 2 and not q.is_contiguous() and q.t().is_contiguous():
        return dequantize(q.t(), dtype).t()
    return dequantize(q.contiguous(), dtype)


def _tensor_core_mm(
    a_MK: Tensor, b_KN: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, fast_accum: bool
) -> Tensor:
    M, N = a_MK.shape[0], b_KN.shape[1]
    a_MK = _padded_to_16(a_MK.contiguous(), rows=False)
    b_NK = _padded_to_16(b_KN.t().contiguous(), rows=True)
    out_MN = _call_tensor_cores(a_MK, b_NK.t(), scale_a.reciprocal(), scale_b.reciprocal(), out_dtype, fast_accum)
    return out_MN if out_MN.shape == (M, N) else out_MN[:M, :N].contiguous()


def _padded_to_16(q: Tensor, *, rows: bool) -> Tensor:
    """`q` with its columns, and its rows if `rows`, brought to a multiple of 16 by zeros."""
    down = -q.shape[0] % ALIGNMENT if rows else 0
    right = -q.shape[1] % ALIGNMENT
    if not down and not right:
        return q
    # FP8 tensors have no pad; code 0 is the value 0 in every format.
    return F.pad(q.view(torch.uint8), (0, right, 0, down)).view(q.dtype)


def _call_tensor_cores(
    a: Tensor, b: Tensor, inv_scale_a: Tensor, inv_scale_b: Tensor, out_dtype: torch.dtype, fast_accum: bool
) -> Tensor:
    if hasattr(F, "scaled_mm"):
        tensorwise = F.ScalingType.TensorWise
        return F.scaled_mm(
            *(a, b, inv_scale_a, tensorwise, inv_scale_b, tensorwise),
            output_dtype=out_dtype,
            use_fast_accum=fast_accum,
        )
    return torch._scaled_mm(
        a, b, scale_a=inv_scale_a, scale_b=inv_scale_b, out_dtype=out_dtype, use_fast_accum=fast_accum
    )


def _on_meta(
    a_MK: Tensor,
    b_KN: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    power_of_two: bool,
    fast_accum: bool,
) -> Tensor:
    return a_MK.new_empty((a_MK.shape[0], b_KN.shape[1]), dtype=out_dtype)


_operation = define(
    "scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, ScalarType out_dtype, bool power_of_two,"
    " bool fast_accum) -> Tensor",
    mm_body,
    _on_meta,
)
