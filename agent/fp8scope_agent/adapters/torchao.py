"""torchao's `Float8Linear`, as `convert_to_float8_training` makes it: observed with torchao's own scales.

The layer's forward and backward run as they are: the same payloads, gradients and compiled kernels, the same memory.
In a step that is recorded, torchao's function computes each scale a second time from the same tensor, so to the same
bits, and the statistics are those of a cast with it. In other steps the taps cost nothing (docs/adr/0027).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchao.float8.config import CastConfig, Float8LinearConfig, ScalingGranularity, ScalingType
from torchao.float8.distributed_utils import tensor_already_casted_to_fp8
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.float8_utils import tensor_to_scale

from fp8core import StatsArena
from fp8core.formats import FORMATS
from fp8core.ops import define
from fp8core.quantize import observe_cast, observing_arena
from fp8core.recipes import CurrentScaling, parse_recipe
from fp8core.records import Role

from .swap import TappedLinear, Wire, local, tap, untap
from .tap import Cast

_FORMAT_NAMES = {getattr(torch, fmt.torch_dtype): name for name, fmt in FORMATS.items()}


def find(name: str, module: nn.Module) -> Float8Layer | str | None:
    """The layer, if `module` is a Float8Linear; or why it is left alone."""
    if not isinstance(module, Float8Linear):
        return None
    config = module.config
    if config.enable_fsdp_float8_all_gather:
        return "torchao gathers their weights in FP8 (enable_fsdp_float8_all_gather)"
    if any(not _is_tensorwise_dynamic(cast) for cast in _casts(config)):
        return "torchao does not scale all their tensors as a whole ('tensorwise', dynamic)"
    return Float8Layer(module)


@dataclass(frozen=True)
class Float8Layer:
    """A Float8Linear whose casts are tensorwise and dynamic."""

    module: Any  # a Float8Linear, which torchao does not type

    @property
    def module_class(self) -> str:
        """Float8Linear, or a class made of it."""
        return (self.module.untapped if isinstance(self.module, TappedLinear) else type(self.module)).__name__

    def cast(self, role: Role) -> Cast:
        """torchao's tensorwise scaling is our `CurrentScaling`, but for its floor of 1e-12 under the amax."""
        config = self.module.config
        own = {
            Role.INPUT: config.cast_config_input,
            Role.WEIGHT: config.cast_config_weight,
            Role.GRAD_OUTPUT: config.cast_config_grad_output,
        }[role]
        recipe = CurrentScaling(power_of_two=config.round_scales_to_power_of_2)
        return Cast(_FORMAT_NAMES[own.target_dtype], repr(recipe), 0)

    def bind(self, arena: StatsArena, rows: Mapping[Role, int]) -> None:
        """From now on its tensors are observed."""
        tap(self.module, TappedFloat8Linear, {role: self.cast(role) for role in Role}, arena, rows)

    def release(self, arena: StatsArena) -> None:
        """A Float8Linear again."""
        untap(self.module, arena)


class TappedFloat8Linear(TappedLinear):
    """torchao's forward between taps."""

    def forward(self, input: Tensor) -> Tensor:
        """As Float8Linear's."""
        y: Tensor = super().forward(input)
        if self.training:
            wires = self._fp8scope_wires
            # The only autocast that torchao looks at is CUDA's, and it casts before it scales.
            x = input.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled() else input
            _observe(wires[Role.INPUT], x)
            _observe(wires[Role.WEIGHT], self.weight)
            if y.requires_grad:
                y = _Tap.apply(y, wires[Role.GRAD_OUTPUT], self.bias is not None)  # type: ignore[no-untyped-call]  # torch's own signature
        return y


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, wire: Wire, has_bias: bool) -> Tensor:
        ctx.wire = wire
        if has_bias:  # as in shadow mode; without, y is a view that nobody may change in place, and stays one
            ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        _observe(ctx.wire, dy)
        return dy, None, None


def _observe(wire: Wire, x: Tensor) -> None:
    if not tensor_already_casted_to_fp8(x):  # by torchao's tensor parallelism: x itself is gone
        torch.ops.fp8core.observe_as_torchao(local(x), wire.recipe, wire.role, wire.fmt, wire.arena, wire.slot)


def _observe_body(x: Tensor, recipe_text: str, role_name: str, fmt_name: str, arena_handle: int, slot: Tensor) -> None:
    role, fmt, recipe = Role(role_name), FORMATS[fmt_name], parse_recipe(recipe_text)
    arena = observing_arena(x, role, arena_handle)
    if arena is not None:
        assert isinstance(recipe, CurrentScaling)
        dtype = getattr(torch, fmt.torch_dtype)
        scale = tensor_to_scale(x.detach(), dtype, round_scales_to_power_of_2=recipe.power_of_two).reshape(())
        # Of a tensor with NaN torchao's scale is NaN, of one with Inf 0: both are reported as 0.
        observe_cast(x, scale.nan_to_num(nan=0.0), role, fmt, arena, slot)


def _casts(config: Float8LinearConfig) -> list[CastConfig]:
    return [
        config.cast_config_input,
        config.cast_config_weight,
        config.cast_config_grad_output,
        config.cast_config_input_for_grad_weight,
        config.cast_config_weight_for_grad_input,
        config.cast_config_grad_output_for_grad_weight,
    ]


def _is_tensorwise_dynamic(cast: CastConfig) -> bool:
    return cast.scaling_type is ScalingType.DYNAMIC and cast.scaling_granularity is ScalingGranularity.TENSORWISE


define(
    "observe_as_torchao(Tensor x, str recipe, str role, str fmt, int arena, Tensor slot) -> ()",
    _observe_body,
    lambda *arguments: None,
)
torch.fx.node.has_side_effect(torch.ops.fp8core.observe_as_torchao.default)
