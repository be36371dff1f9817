"""A small GPT trains in FP8 as it does in high precision, and its rows are exact at every step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fp8core import (
    GRAPHCORE,
    HYBRID,
    AmaxScaling,
    CurrentScaling,
    DelayedScaling,
    Fp8Linear,
    StatsArena,
    convert_to_fp8,
)
from fp8core.formats import FormatPair
from fp8core.recipes import Recipe
from fp8core.records import Role, decode_arena
from fp8core.scaling import scale_exp2_from_amax

STEPS = 30
MakeGpt = Callable[[], nn.Module]


def train(model: nn.Module, after_step: Callable[[], None] = lambda: None) -> float:
    """The mean loss of the last five of STEPS steps on sequences that count upwards."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        start = torch.randint(64, (8, 1), generator=generator)
        tokens = (start + torch.arange(17)) % 64
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after_step()
    return sum(losses[-5:]) / 5


def watched(model: nn.Module) -> tuple[list[Fp8Linear], StatsArena]:
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    arena = StatsArena(3 * len(layers))
    for index, layer in enumerate(layers):
        layer.bind_stats(arena, {role: 3 * index + offset for offset, role in enumerate(Role)})
    return layers, arena


@pytest.mark.parametrize(
    ("recipe", "formats"),
    [
        (AmaxScaling(), HYBRID),
        (AmaxScaling(), GRAPHCORE),
        (AmaxScaling.paper_fig1(), GRAPHCORE),
        (CurrentScaling(), HYBRID),
        (DelayedScaling(history_len=16), HYBRID),
    ],
    ids=lambda value: str(value),
)
def test_the_loss_falls_as_in_high_precision(recipe: Recipe, formats: FormatPair, gpt: MakeGpt) -> None:
    plain = train(gpt())

    fp8 = train(convert_to_fp8(gpt(), recipe=recipe, formats=formats, module_filter_fn=lambda _, name: name != "head"))

    assert plain < 2.0  # from log(64) = 4.2
    assert fp8 == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("formats", [HYBRID, GRAPHCORE], ids=str)
def test_every_row_of_amax_scaling_has_the_exact_scale_and_no_overflow(formats: FormatPair, gpt: MakeGpt) -> None:
    recipe, checked = AmaxScaling(), []
    model = convert_to_fp8(gpt(), recipe=recipe, formats=formats)
    layers, arena = watched(model)

    def check() -> None:
        rows = decode_arena(arena.words.numpy())
        for position, slot in enumerate(rows.slot.tolist()):
            role = list(Role)[slot % 3]
            amax = float(rows.columns["amax"][position])
            exp2 = scale_exp2_from_amax(amax, formats.fmt(role), margin=recipe.margin(role))
            checked.append(rows.columns["scale_min"][position] == rows.columns["scale_max"][position] == 2.0**exp2)
            checked.append(rows.columns["overflow"][position] == 0)
        arena.reset()

    train(model, after_step=check)

    assert len(checked) == 2 * STEPS * 3 * len(layers)
    assert all(checked)
