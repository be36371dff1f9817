"""Making the linear layers of a model FP8 ones, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import nn
from torch.nn.utils import parametrize

from fp8core.formats import HYBRID, FormatPair
from fp8core.linear import Fp8Linear
from fp8core.recipes import AmaxScaling, Recipe

ModuleFilter = Callable[[nn.Module, str], bool]


def convert_to_fp8(
    model: nn.Module,
    *,
    recipe: Recipe | None = None,
    formats: FormatPair = HYBRID,
    module_filter_fn: ModuleFilter | None = None,
) -> nn.Module:
    """`model` with every `nn.Linear` for which `module_filter_fn(module, name)` is true turned into an `Fp8Linear`.

    The modules change their class and stay the same objects: parameters, hooks, tied weights and references to them
    are kept. A filter is how the output head stays in high precision: `lambda module, name: name != "lm_head"`.
    Subclasses of `nn.Linear` with a forward of their own are left alone; an `Fp8Linear` gets the new recipe.
    The default recipe is `AmaxScaling()`. Warns if there is nothing to convert.
    """
    recipe = AmaxScaling() if recipe is None else recipe
    converted = 0
    for name, module in model.named_modules():
        if not _is_linear(module) or (module_filter_fn is not None and not module_filter_fn(module, name)):
            continue
        _become_fp8(module).set_recipe(recipe, formats)
        converted += 1
    if not converted:
        warnings.warn(f"convert_to_fp8: no nn.Linear to convert in {type(model).__name__}", stacklevel=2)
    return model


def _is_linear(module: nn.Module) -> bool:
    """Whether the forward of `module` is nn.Linear's or Fp8Linear's, parametrized or not."""
    return isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, Fp8Linear.forward)


def _become_fp8(module: nn.Module) -> Fp8Linear:
    if not isinstance(module, Fp8Linear):
        if parametrize.is_parametrized(module):
            # A parametrized module has a class of its own, which holds the parameters' properties.
            module.__class__ = type(f"Parametrized{Fp8Linear.__name__}", (Fp8Linear,), dict(vars(type(module))))
        else:
            module.__class__ = Fp8Linear
    assert isinstance(module, Fp8Linear)
    return module
