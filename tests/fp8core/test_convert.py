"""convert_to_fp8 turns nn.Linear into Fp8Linear in place, and overrides change single layers and roles."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fp8core import (
    E4M3FN,
    E5M2,
    GRAPHCORE,
    AmaxScaling,
    ConstantScaling,
    CurrentScaling,
    Fp8Linear,
    Override,
    StatsArena,
    convert_to_fp8,
)
from fp8core.records import Role


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, 2 * d)
        self.fc2 = nn.Linear(2 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.fc2(self.fc1(x).relu())
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 16)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x)
        return out


def fp8_layers(model: nn.Module) -> dict[str, Fp8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}


def test_layers_become_fp8_in_place_and_keep_parameters_and_hooks() -> None:
    model = Net()
    before = dict(model.named_parameters())
    fc1, calls = model.blocks[0].fc1, []
    fc1.register_forward_hook(lambda *_: calls.append(1))

    assert convert_to_fp8(model) is model

    model(torch.zeros(2, dtype=torch.long))
    assert list(fp8_layers(model)) == ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "head"]
    assert model.blocks[0].fc1 is fc1
    assert calls == [1]
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_the_filter_keeps_layers_in_high_precision() -> None:
    model = convert_to_fp8(Net(), module_filter_fn=lambda module, name: name != "head")

    assert "head" not in fp8_layers(model)
    assert type(model.head) is nn.Linear


def test_tied_weights_stay_tied_and_collect_both_gradients() -> None:
    model = convert_to_fp8(Net())
    model(torch.tensor([1, 2])).sum().backward()

    assert model.head.weight is model.embed.weight
    assert model.embed.weight.grad is not None


def test_state_dict_of_a_converted_model_loads_into_the_plain_one_and_back() -> None:
    plain, model = Net(), convert_to_fp8(Net())

    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())


def test_recipe_and_formats_reach_every_layer_and_print() -> None:
    model = convert_to_fp8(Net(), recipe=CurrentScaling(), formats=GRAPHCORE)

    assert {layer.stats_spec(Role.GRAD_OUTPUT) for layer in fp8_layers(model).values()} == {("E5M2FNUZ", 0)}
    assert "recipe=CurrentScaling(power_of_two=False), formats=GRAPHCORE" in repr(model)


def test_overrides_change_recipe_or_format_of_a_layer_or_role_and_the_last_wins() -> None:
    overrides = [
        Override("blocks.0.*", recipe=CurrentScaling()),
        Override("*.fc2", role="gradient", fmt=E4M3FN),
        Override("blocks.0.fc2", role="weight", recipe=ConstantScaling(2), fmt=E5M2),
    ]

    layers = fp8_layers(convert_to_fp8(Net(), overrides=overrides))

    first, second = layers["blocks.0.fc2"], layers["blocks.1.fc2"]
    assert [first.recipe_by_role[role] for role in Role] == [CurrentScaling(), ConstantScaling(2), CurrentScaling()]
    assert [first.format_by_role[role] for role in Role] == [E4M3FN, E5M2, E4M3FN]
    assert [second.recipe_by_role[role] for role in Role] == [AmaxScaling()] * 3
    assert [second.format_by_role[role] for role in Role] == [E4M3FN] * 3
    assert "formats=HYBRID, weight: ConstantScaling(" in repr(first).replace(
        "input: CurrentScaling(power_of_two=False), ", ""
    )
    assert [layers["blocks.1.fc1"].format_by_role[role] for role in Role] == [E4M3FN, E4M3FN, E5M2]


def test_a_pattern_that_matches_nothing_warns_with_the_near_names() -> None:
    with pytest.warns(UserWarning, match=r"'block.0.fc1' matches no converted layer; near names: blocks.0.fc1"):
        convert_to_fp8(Net(), overrides=[Override("block.0.fc1", recipe=CurrentScaling())])


def test_an_override_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="changes nothing; give it recipe= or fmt="):
        Override("*")


def test_a_model_without_linear_layers_warns() -> None:
    with pytest.warns(UserWarning, match=r"no nn\.Linear to convert in ReLU"):
        convert_to_fp8(nn.ReLU())


def test_a_linear_layer_alone_is_a_model_too() -> None:
    assert isinstance(convert_to_fp8(nn.Linear(4, 4)), Fp8Linear)


def test_subclasses_with_their_own_forward_are_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4))

    convert_to_fp8(model)

    assert type(model[0]) is Scaled


def test_float64_layers_are_named_and_nothing_is_converted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())

    with pytest.raises(TypeError, match=r"layer '1' has torch.float64 weights.*Exclude it with module_filter_fn"):
        convert_to_fp8(model)

    assert not fp8_layers(model)


def test_converting_again_changes_the_recipe() -> None:
    model = convert_to_fp8(convert_to_fp8(Net()), recipe=CurrentScaling())

    assert fp8_layers(model)["head"].recipe == CurrentScaling()


class Double(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 2 * w


@pytest.mark.parametrize("order", ["convert first", "parametrize first"])
def test_parametrized_weights_are_cast_as_the_parametrization_gives_them(order: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(16, 16, bias=False)
    doubled = convert_to_fp8(copy.deepcopy(module))
    with torch.no_grad():
        doubled.weight.mul_(2)
    x = torch.randn(4, 16)

    if order == "convert first":
        convert_to_fp8(module)
        parametrize.register_parametrization(module, "weight", Double())
    else:
        parametrize.register_parametrization(module, "weight", Double())
        convert_to_fp8(module)
    y = module(x)
    y.sum().backward()

    assert isinstance(module, Fp8Linear)
    assert torch.equal(y, doubled(x))
    assert module.parametrizations.weight.original.grad is not None


def test_a_module_used_twice_writes_two_inputs_into_its_row_and_its_weight_once() -> None:
    module = convert_to_fp8(nn.Linear(16, 16))
    assert isinstance(module, Fp8Linear)
    arena = StatsArena(3)
    module.bind_stats(arena, {role: slot for slot, role in enumerate(Role)})

    module(module(torch.randn(4, 16))).sum().backward()

    assert arena.words[:, 0].tolist() == [2, 1, 2]


def test_conversion_of_a_clean_model_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_to_fp8(Net(), overrides=[Override("blocks.*", fmt=E5M2)])
