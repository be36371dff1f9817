"""Recipes are values that print themselves, read themselves back and refuse what makes no sense."""

from __future__ import annotations

import dataclasses

import pytest

from fp8core.recipes import AmaxScaling, ConstantScaling, CurrentScaling, DelayedScaling, Recipe, parse_recipe
from fp8core.records import Role

EXAMPLES: list[Recipe] = [
    AmaxScaling(),
    AmaxScaling(margin_input=1, margin_weight=-2, clamp=31),
    AmaxScaling.paper_fig1(),
    ConstantScaling(4),
    ConstantScaling(input=1, grad_output=-7),
    CurrentScaling(),
    CurrentScaling(power_of_two=True),
    DelayedScaling(),
    DelayedScaling(16, "most_recent", margin_bits=2, power_of_two=True),
]


@pytest.mark.parametrize("recipe", EXAMPLES, ids=repr)
def test_a_recipe_reads_itself_back_from_its_text(recipe: Recipe) -> None:
    assert parse_recipe(repr(recipe)) == recipe
    assert str(recipe) == repr(recipe)


@pytest.mark.parametrize("recipe", EXAMPLES, ids=repr)
def test_a_recipe_is_frozen_and_hashable(recipe: Recipe) -> None:
    assert {recipe: 1}[recipe] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.margin_input = 1  # type: ignore[misc, union-attr]  # what must fail


def test_default_margin_is_three_for_gradients_only() -> None:
    assert [AmaxScaling().margin(role) for role in Role] == [0, 0, 3]
    assert [AmaxScaling.paper_fig1().margin(role) for role in Role] == [3, 3, 3]
    assert AmaxScaling().margin("gradient") == 3


def test_constant_exponents_of_roles_replace_the_common_one() -> None:
    recipe = ConstantScaling(4, weight=0, grad_output=20)

    assert [recipe.exponent(role) for role in Role] == [4, 0, 20]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AmaxScaling(clamp=127), "clamp is 127; expected an integer from 0 to 126"),
        (lambda: AmaxScaling(margin_input=1.5), "margin_input is 1.5"),  # type: ignore[arg-type]  # what must fail
        (lambda: ConstantScaling(200), "scale_exp2 is 200"),
        (lambda: ConstantScaling(weight=-127), "weight is -127"),
        (lambda: DelayedScaling(history_len=0), "history_len is 0"),
        (lambda: DelayedScaling(algo="mean"), "choose 'max' or 'most_recent'"),  # type: ignore[arg-type]  # the same
    ],
)
def test_impossible_settings_are_refused_with_what_came_and_what_was_expected(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]  # a lambda


@pytest.mark.parametrize("text", ["AmaxScaling", "Amax()", "AmaxScaling(3)", "AmaxScaling(clamp=999)", "f(x=", ""])
def test_text_that_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        parse_recipe(text)
