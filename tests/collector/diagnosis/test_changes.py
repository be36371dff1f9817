"""What a rule suggests as code runs on a real model, and changes the tensor that it names and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fp8core
from fp8core import CurrentScaling, DelayedScaling, Fp8Linear, Override, convert_to_fp8
from fp8core.formats import E5M2
from fp8core.recipes import AmaxScaling, ConstantScaling, Recipe
from fp8core.records import Role
from fp8scope_collector.diagnosis.catalogue import RULES
from fp8scope_collector.storage.readmodels import Slot

LAYER = "blocks.1.fc'2"
RECIPES: list[Recipe] = [AmaxScaling(), ConstantScaling(input=4), CurrentScaling(), DelayedScaling()]


class Tiny(nn.Module):
    """Two layers, one of them with a name that has to be quoted."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module(), nn.Module()])
        self.blocks[0].add_module("fc", nn.Linear(16, 16))
        self.blocks[1].add_module("fc'2", nn.Linear(16, 16))


def slot(role: Role, recipe: Recipe) -> Slot:
    return Slot(3, LAYER, role, "Fp8Linear", 16, 16, "E4M3FN", repr(recipe), 0)


CONVERSIONS = sorted(
    {
        (rule.name, rule.change(slot(role, recipe)), role, repr(recipe))
        for rule in RULES
        for role in Role
        for recipe in RECIPES
        if rule.change(slot(role, recipe)).startswith("convert_to_fp8")
        and (rule.name not in ("history-pinned", "headroom-wasted") or isinstance(recipe, DelayedScaling))
    }
)


@pytest.mark.parametrize(("rule", "code", "role", "recipe"), CONVERSIONS)
def test_a_conversion_changes_the_named_tensor_and_no_other(rule: str, code: str, role: Role, recipe: str) -> None:
    model = Tiny()

    names = {**vars(fp8core), "E5M2": E5M2, "Override": Override, "convert_to_fp8": convert_to_fp8, "model": model}
    names |= {type(each).__name__: type(each) for each in RECIPES}
    eval(code, names)

    before = convert_to_fp8(Tiny(), recipe=eval(recipe, names))
    changed = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        was: Any = before.get_submodule(name)
        for each in Role:
            if not isinstance(module, Fp8Linear) or (module.stats_spec(each), module.recipe_by_role[each]) != (
                was.stats_spec(each),
                was.recipe_by_role[each],
            ):
                changed.add((name, each))
    has_it_already = (rule == "underflow" and role == Role.GRAD_OUTPUT) or rule == "scale-clamped"
    of_layer = {(LAYER, each) for each in Role}
    assert changed in [{(LAYER, role)}, of_layer] or (has_it_already and not changed)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_what_is_no_conversion_is_python_or_a_command(rule: Any) -> None:
    for text in rule.changes.values():
        code = text.format(layer=LAYER, role="input", recipe="AmaxScaling()")
        if not code.startswith("fp8scope-agent "):
            compile(f"for _ in range(1):\n    {code}", "change", "exec")


def test_the_loss_that_is_not_finite_is_skipped() -> None:
    code = next(rule.change(None) for rule in RULES if rule.name == "loss-nonfinite")
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones(1)

    exec(
        f"for loss in losses:\n    {code}\n    seen.append(loss)",
        {
            "torch": torch,
            "optimizer": optimizer,
            "seen": (seen := []),
            "losses": [torch.tensor(1.0), torch.tensor(torch.nan)],
        },
    )

    assert [float(loss) for loss in seen] == [1.0]
    assert parameter.grad is None
