"""Making the linear layers of a model FP8 ones, in place.

convert_to_fp8(model, module_filter_fn=lambda module, name: name != "lm_head",
               overrides=[Override("blocks.0.*", recipe=CurrentScaling()),
                          Override("*.fc2", role="grad_output", fmt=E4M3FN)])
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from fp8core.formats import HYBRID, FormatPair, Fp8Format
from fp8core.linear import Fp8Linear
from fp8core.quantize import INPUT_DTYPES
from fp8core.recipes import AmaxScaling, Recipe
from fp8core.records import Role, parse_role

ModuleFilter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Override:
    """Another recipe or format for the layers whose name matches `pattern`, for one role or for all.

    `pattern` is a glob over the module's name, as in "blocks.*.fc2"; `*` also matches dots. Of several overrides that
    match a layer and role, the last one that sets a thing wins.
    """

    pattern: str
    role: Role | str | None = None
    recipe: Recipe | None = None
    fmt: Fp8Format | None = None

    def __post_init__(self) -> None:
        if self.recipe is None and self.fmt is None:
            raise ValueError(f"override of {self.pattern!r} changes nothing; give it recipe= or fmt=")

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that it applies to."""
        return tuple(Role) if self.role is None else (parse_role(self.role),)


def convert_to_fp8(
    model: nn.Module,
    *,
    recipe: Recipe | None = None,
    formats: FormatPair = HYBRID,
    module_filter_fn: ModuleFilter | None = None,
    overrides: Sequence[Override] = (),
) -> nn.Module:
    """`model` with every `nn.Linear` for which `module_filter_fn(module, name)` is true turned into an `Fp8Linear`.

    The modules change their class and stay the same objects: parameters, hooks, tied weights and references to them
    are kept. A filter is how the output head stays in high precision: `lambda module, name: name != "lm_head"`.
    Subclasses of `nn.Linear` with a forward of their own are left alone; an `Fp8Linear` starts anew with the new
    recipe. The default recipe is `AmaxScaling()`. Warns if there is nothing to convert, and for a pattern of
    `overrides` that matches no converted layer.

    Raises:
        TypeError: a layer's weight is not bfloat16, float16 or float32. No layer has been converted then.
    """
    recipe = AmaxScaling() if recipe is None else recipe
    layers = linear_layers(model, module_filter_fn)
    if not layers:
        warnings.warn(f"convert_to_fp8: no nn.Linear to convert in {type(model).__name__}", stacklevel=2)
    for override in overrides:
        _warn_if_unmatched(override.pattern, list(layers))
    for name, module in layers.items():
        matching = [override for override in overrides if fnmatchcase(name, override.pattern)]
        _become_fp8(module).set_recipe(
            recipe,
            formats,
            role_recipes={role: each.recipe for each in matching for role in each.roles if each.recipe is not None},
            role_formats={role: each.fmt for each in matching for role in each.roles if each.fmt is not None},
        )
    return model


def linear_layers(model: nn.Module, module_filter_fn: ModuleFilter | None) -> dict[str, nn.Linear]:
    """The linear layers of `model` by name: those whose forward is nn.Linear's or Fp8Linear's, parametrized or not.

    Raises:
        TypeError: a layer's weight is not bfloat16, float16 or float32.
    """
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or type(module).forward not in (nn.Linear.forward, Fp8Linear.forward):
            continue
        if module_filter_fn is None or module_filter_fn(module, name):
            _require_castable_weight(module, name)
            layers[name] = module
    return layers


def _require_castable_weight(module: nn.Linear, name: str) -> None:
    dtype = module.weight.dtype
    if dtype not in INPUT_DTYPES:
        raise TypeError(
            f"layer {name!r} has {dtype} weights; FP8 is cast from bfloat16, float16 or float32. "
            f"Exclude it with module_filter_fn=lambda module, name: name != {name!r}"
        )


def _warn_if_unmatched(pattern: str, names: list[str]) -> None:
    if any(fnmatchcase(name, pattern) for name in names):
        return
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
    hint = f"near names: {', '.join(near)}" if near else f"there are {len(names)} converted layers"
    # 3: the caller of convert_to_fp8.
    warnings.warn(f"convert_to_fp8: override {pattern!r} matches no converted layer; {hint}", stacklevel=3)


def _become_fp8(module: nn.Linear) -> Fp8Linear:
    if not isinstance(module, Fp8Linear):
        if parametrize.is_parametrized(module):
            # A parametrized module has a class of its own, which holds the parameters' properties.
            module.__class__ = type(f"Parametrized{Fp8Linear.__name__}", (Fp8Linear,), dict(vars(type(module))))
        else:
            module.__class__ = Fp8Linear
    assert isinstance(module, Fp8Linear)
    return module
