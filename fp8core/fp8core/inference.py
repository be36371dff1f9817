"""Inference: weights held in FP8, cast once; inputs cast as they come.

    quantize_for_inference(model, AmaxScaling())        # inputs scaled by their own amax
    quantize_for_inference(model, ConstantScaling(0))   # or by a constant, without the amax pass

After training, without calibration, as in arXiv 2309.17224. A weight takes a byte an element, in the state_dict
too: `weight` in FP8 and `weight_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from fp8core.convert import ModuleFilter, linear_layers
from fp8core.formats import E4M3FN, Fp8Format
from fp8core.linear import result_dtype
from fp8core.matmul import scaled_mm
from fp8core.quantize import quantize
from fp8core.recipes import AmaxScaling, DelayedScaling, Recipe
from fp8core.records import Role


class Fp8InferenceLinear(nn.Module):
    """y = x @ w.T + b with w held in FP8; buffers `weight` [out_features, in_features] and `weight_scale` (0-d)."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, recipe: Recipe, fmt: Fp8Format) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.recipe, self.fmt = recipe, fmt
        self._recipe_text = repr(recipe)  # Dynamo cannot print a dataclass
        weight, scale = quantize(linear.weight, recipe=recipe, role=Role.WEIGHT, fmt=fmt)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x @ w.T + b for x [..., in_features]; no gradient flows.

        Raises:
            ValueError: x has another number of features.
        """
        *leading, features = x.shape
        if features != self.in_features:
            raise ValueError(f"x is {list(x.shape)}; expected {self.in_features} features in the last dimension")
        x_BK = x.reshape(math.prod(leading), features)
        out_dtype = result_dtype(x)
        q_BK, s_x = quantize(x_BK, recipe=self._recipe_text, role="input", fmt=self.fmt.name)
        y_BN = scaled_mm(
            *(q_BK, self.weight.t(), s_x, self.weight_scale),
            out_dtype=out_dtype,
            power_of_two=self.recipe.power_of_two,
            fast_accum=True,
        )
        y = y_BN.view(*leading, self.out_features)
        return y if self.bias is None else y + self.bias.to(out_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # module.to(dtype) must not make bfloat16 numbers of the codes: weight and scale follow to another device only.
        weight, scale = self.weight, self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own signature
        self.weight, self.weight_scale = weight.to(self.weight.device), scale.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        """Features, recipe, format, and what the weight takes: half of bfloat16's bytes."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        weight_bytes = self.weight.numel() * self.weight.element_size()
        saved = f"weight {weight_bytes:,} bytes (bfloat16: {2 * self.weight.numel():,})"
        return f"{sizes}, recipe={self.recipe!r}, fmt={self.fmt}, {saved}"


def quantize_for_inference(
    model: nn.Module,
    recipe: Recipe | None = None,
    *,
    fmt: Fp8Format = E4M3FN,
    module_filter_fn: ModuleFilter | None = None,
) -> nn.Module:
    """`model` with its linear layers (`nn.Linear` and `Fp8Linear`) replaced by ones that hold their weight in FP8.

    In place, except for a model that is a linear layer itself. A weight tied to another parameter (an embedding) is
    copied: the other one stays as it is. The default recipe is `AmaxScaling()`.

    Raises:
        ValueError: the recipe is `DelayedScaling`, whose scales come from training.
    """
    recipe = AmaxScaling() if recipe is None else recipe
    if isinstance(recipe, DelayedScaling):
        raise ValueError(
            "DelayedScaling needs a training history; choose AmaxScaling, CurrentScaling or ConstantScaling"
        )
    with torch.no_grad():
        for name, module in linear_layers(model, module_filter_fn).items():
            replacement = Fp8InferenceLinear(module, recipe, fmt).train(module.training)
            if module is model:
                return replacement
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
    return model
