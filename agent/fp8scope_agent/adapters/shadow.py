"""Plain `nn.Linear` in shadow mode: the statistics that an `Fp8Linear` would have, while nothing is cast to FP8.

Input, weight and the gradient of the output are observed as the recipe would cast them; what the layer computes, and
every gradient, is what it was, to the bit. That costs the passes over the data that a cast takes, and one payload
(a byte an element) at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8core import Fp8Linear, StatsArena
from fp8core.convert import ModuleFilter
from fp8core.formats import HYBRID, FormatPair
from fp8core.quantize import INPUT_DTYPES
from fp8core.recipes import Recipe
from fp8core.records import Role
from fp8core.stats import recording_arena

from .swap import TappedLinear, Wire, local, tap, untap
from .tap import Cast, stored


@dataclass(frozen=True)
class Shadow:
    """What FP8 is imagined: recipe, formats, and for which `nn.Linear`s; `convert_to_fp8` has the same arguments."""

    recipe: Recipe
    formats: FormatPair = HYBRID
    module_filter_fn: ModuleFilter | None = None


def finder(shadow: Shadow) -> Callable[[str, nn.Module], ShadowLayer | None]:
    """Finds the modules whose forward is nn.Linear's, with weights that FP8 is cast from."""

    def find(name: str, module: nn.Module) -> ShadowLayer | None:
        if not isinstance(module, nn.Linear) or isinstance(module, Fp8Linear):
            return None
        plain = isinstance(module, ShadowLinear) or type(module).forward is nn.Linear.forward
        # A forward of the object's own (accelerate's hooks) runs instead of the class's: nothing would be recorded.
        if not plain or "forward" in vars(module) or stored(module).dtype not in INPUT_DTYPES:
            return None
        if shadow.module_filter_fn is not None and not shadow.module_filter_fn(module, name):
            return None
        return ShadowLayer(module, shadow)

    return find


@dataclass(frozen=True)
class ShadowLayer:
    """An nn.Linear, or a class made of it that has no forward of its own."""

    module: nn.Linear
    shadow: Shadow

    @property
    def module_class(self) -> str:
        """The class of the module as its owner made it."""
        module = self.module
        return (module.untapped if isinstance(module, TappedLinear) else type(module)).__name__

    def cast(self, role: Role) -> Cast:
        """As the imagined FP8 says."""
        shadow = self.shadow
        return Cast(shadow.formats.fmt(role).name, repr(shadow.recipe), shadow.recipe.margin(role))

    def bind(self, arena: StatsArena, rows: Mapping[Role, int]) -> None:
        """From now on its forward and backward are observed."""
        tap(self.module, ShadowLinear, {role: self.cast(role) for role in Role}, arena, rows)

    def release(self, arena: StatsArena) -> None:
        """A plain module again."""
        untap(self.module, arena)


class ShadowLinear(TappedLinear):
    """nn.Linear's forward between taps."""

    def forward(self, x: Tensor) -> Tensor:
        """x @ w.T + b."""
        weight = self.weight  # once: a parametrized weight is computed at each access
        y = functional.linear(x, weight, self.bias)
        wires = self._fp8scope_wires
        if self.training and _is_observed(wires[Role.GRAD_OUTPUT]):
            wires[Role.INPUT].observe(local(x))
            wires[Role.WEIGHT].observe(local(weight))
            if y.requires_grad:
                y = _tap_gradient(y, wires[Role.GRAD_OUTPUT])
        return y


def _is_observed(wire: Wire) -> bool:
    """Whether there is anything to observe in this step; code that is compiled now runs in other steps, too."""
    return torch.compiler.is_compiling() or wire.state is not None or recording_arena(wire.arena) is not None


def _tap_gradient(y: Tensor, wire: Wire) -> Tensor:
    """`y`, whose gradient is observed on its way back.

    Eagerly by a hook: y is a view of what the GEMM wrote, and a function that hands it on as changed in place makes the
    backward copy the gradient. A compiler keeps no view, and traces the function.
    """
    if torch.compiler.is_compiling():
        tapped: Tensor = _Tap.apply(y, wire)  # type: ignore[no-untyped-call]  # torch's own signature
        return tapped
    y.register_hook(lambda dy: wire.observe(local(dy)))  # type: ignore[no-untyped-call]  # torch's own signature
    return y


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        # Handed on as if it had been changed in place: a view could not be changed in place later (ReLU(inplace=True)),
        # a copy would cost a pass over the data.
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        ctx.wire.observe(local(dy))
        return dy, None
