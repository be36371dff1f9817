"""The three GEMMs of a linear layer in FP8, forward and backward.

Shapes: B rows (tokens), K in_features, N out_features. A quantised tensor is q = cast(x * s), so x ~ q / s.

    fprop   y_BN  = x_BK  @ w_NK.T     E4M3 x E4M3     q_x,  q_w      fast accumulation
    dgrad   dx_BK = dy_BN @ w_NK       E5M2 x E4M3     q_dy, q_w
    wgrad   dw_NK = dy_BN.T @ x_BK     E5M2 x E4M3     q_dy, q_x

(the formats of HYBRID). Three tensors are cast in a step, each once: x and w in the forward, saved in FP8 for the
backward, and dy in the backward, for two GEMMs. The gradient passes through the casts as if they were not there
(straight-through), saturated elements included. The bias and its gradient, a sum over dy's rows in float32, stay
in high precision.

With `requantize_weight` the weight itself is saved instead of q_w, and cast again in the backward to the same bits.
FSDP2 needs that: it frees the gathered weight after the forward, and a saved q_w would keep a copy of every
weight alive until the backward (docs/adr/0004).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import fp8core.quantize  # noqa: F401  # defines the operation
from fp8core.matmul import scaled_mm


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
    requantize_weight: bool = False,
) -> Tensor:
    """x_BK @ w_NK.T in `out_dtype`, by FP8 GEMMs in forward and backward.

    `casts` are those of input, weight and grad_output; `power_of_two` says that all their scales are. Gradients come
    in the dtypes of x and w.
    """
    y_BN: Tensor = _Fp8Matmul.apply(  # type: ignore[no-untyped-call]  # torch's own signature
        x_BK, w_NK, casts, out_dtype, power_of_two, requantize_weight
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
        requantize_weight: bool,
    ) -> Tensor:
        cast_x, cast_w, cast_dy = casts
        q_x_BK, s_x = cast_x(x_BK)
        q_w_NK, s_w = cast_w(w_NK)
        ctx.save_for_backward(q_x_BK, s_x, *((w_NK,) if requantize_weight else (q_w_NK, s_w)))
        ctx.cast_w, ctx.cast_dy = cast_w, cast_dy
        ctx.x_dtype, ctx.w_dtype, ctx.power_of_two = x_BK.dtype, w_NK.dtype, power_of_two
        return scaled_mm(q_x_BK, q_w_NK.t(), s_x, s_w, out_dtype=out_dtype, power_of_two=power_of_two, fast_accum=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BN: Tensor) -> tuple[Tensor | None, ...]:
        q_x_BK, s_x, *saved_w = ctx.saved_tensors
        q_dy_BN, s_dy = ctx.cast_dy(dy_BN)
        dx_BK = dw_NK = None
        if ctx.needs_input_grad[0]:
            q_w_NK, s_w = saved_w if len(saved_w) == 2 else ctx.cast_w(*saved_w)
            dx_BK = scaled_mm(q_dy_BN, q_w_NK, s_dy, s_w, out_dtype=ctx.x_dtype, power_of_two=ctx.power_of_two)
        if ctx.needs_input_grad[1]:
            dw_NK = scaled_mm(q_dy_BN.t(), q_x_BK, s_dy, s_x, out_dtype=ctx.w_dtype, power_of_two=ctx.power_of_two)
        return dx_BK, dw_NK, None, None, None, None
