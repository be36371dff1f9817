"""The three GEMMs of a linear layer in FP8, forward and backward.

Shapes: B rows (tokens), K in_features, N out_features. A quantised tensor is q = cast(x * s), so x ~ q / s.

    fprop   y_BN  = x_BK  @ w_NK.T     E4M3 x E4M3     q_x,  q_w      fast accumulation
    dgrad   dx_BK = dy_BN @ w_NK       E5M2 x E4M3     q_dy, q_w
    wgrad   dw_NK = dy_BN.T @ x_BK     E5M2 x E4M3     q_dy, q_x

(the formats of HYBRID). In a step each of x, w and dy gets one scale. x is cast in the forward and saved in FP8 for
wgrad; dy is cast in the backward, for two GEMMs. Of w only the scale is saved: dgrad casts it again, with that scale
and so to the same bits, in one pass over it. A saved q_w would cost a byte for every parameter from forward to
backward, and under FSDP2 keep a copy of every gathered weight alive (docs/adr/0004).

The gradient passes through the casts as if they were not there (straight-through), clipped elements included.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp8core.matmul import scaled_mm
from fp8core.quantize import recast


class Cast(NamedTuple):
    """How one role is cast and where its statistics go: the arguments of `quantize` as a compiler can carry them."""

    recipe: str
    role: str
    fmt: str
    state: Tensor | None
    arena: int
    slot: Tensor | None
    update_state: bool

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The payload and the scale of `x`."""
        q, scale = torch.ops.fp8core.quantize(x, *self)
        return q, scale


def fp8_matmul(
    x_BK: Tensor,
    w_NK: Tensor,
    casts: tuple[Cast, Cast, Cast],
    *,
    out_dtype: torch.dtype,
    power_of_two: bool,
) -> Tensor:
    """x_BK @ w_NK.T in `out_dtype`, by FP8 GEMMs in forward and backward.

    `casts` are those of input, weight and grad_output; `power_of_two` says that all their scales are. Gradients come
    in the dtypes of x and w.
    """
    y_BN: Tensor = _Fp8Matmul.apply(  # type: ignore[no-untyped-call]  # torch's own signature
        x_BK, w_NK, casts, out_dtype, power_of_two
    )
    return y_BN


class _Fp8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BK: Tensor,
        w_NK: Tensor,
        casts: tuple[Cast, Cast, Cast],
        out_dtype: torch.dtype,
        power_of_two: bool,
    ) -> Tensor:
        cast_x, cast_w, cast_dy = casts
        q_x_BK, s_x = cast_x(x_BK)
        q_w_NK, s_w = cast_w(w_NK)
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            *((w_NK, s_w) if needs_dx else (None, None)), *((q_x_BK, s_x) if needs_dw else (None, None))
        )
        ctx.cast_dy, ctx.w_fmt = cast_dy, cast_w.fmt
        ctx.x_dtype, ctx.w_dtype, ctx.power_of_two = x_BK.dtype, w_NK.dtype, power_of_two
        return scaled_mm(q_x_BK, q_w_NK.t(), s_x, s_w, out_dtype=out_dtype, power_of_two=power_of_two, fast_accum=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BN: Tensor) -> tuple[Tensor | None, ...]:
        w_NK, s_w, q_x_BK, s_x = ctx.saved_tensors
        q_dy_BN, s_dy = ctx.cast_dy(dy_BN)
        dx_BK = dw_NK = None
        if ctx.needs_input_grad[0]:
            q_w_NK = recast(w_NK, s_w, ctx.w_fmt)
            dx_BK = scaled_mm(q_dy_BN, q_w_NK, s_dy, s_w, out_dtype=ctx.x_dtype, power_of_two=ctx.power_of_two)
        if ctx.needs_input_grad[1]:
            dw_NK = scaled_mm(q_dy_BN.t(), q_x_BK, s_dy, s_x, out_dtype=ctx.w_dtype, power_of_two=ctx.power_of_two)
        return dx_BK, dw_NK, None, None, None
