"""Real FP8 training of a tiny GPT with one thing broken at a known step, recorded as a diagnosis `Window`.

`record(...)` trains the model of examples/train_gpt.py in this process and reads its rows straight from the statistics
arena. The faults are those of examples/inject_fault.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fp8core
import train_gpt
from fp8core import Fp8Linear, Override, StatsArena
from fp8core.recipes import Recipe
from fp8core.records import Role, decode_arena
from fp8scope_agent.adapters.shadow import Shadow, ShadowLayer
from fp8scope_collector.diagnosis.window import FIELDS_READ, ScalarSeries, Window
from fp8scope_collector.storage.readmodels import Slot
from inject_fault import (
    Fault,
    Killed,
    SwiGlu,
    alternating_input,
    changed_weight_of_a_rank,
    corrupted_weight_row,
    dead_layer,
    frozen_state,
    higher_learning_rate,
    nan_in_a_batch,
    scaled_gradients,
    spike_in_one_step,
)

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 2, 32, 2, 32, 4

__all__ = [
    "alternating_input",
    "changed_weight_of_a_rank",
    "corrupted_weight_row",
    "dead_layer",
    "frozen_state",
    "higher_learning_rate",
    "nan_in_a_batch",
    "scaled_gradients",
    "spike_in_one_step",
]


class Training:
    """A tiny GPT in training; faults reach into it."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        seed: int = 0,
        data_seed: int | None = None,
        overrides: Sequence[Override] = (),
        swiglu: bool = False,
        shadow: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = train_gpt.Gpt(LAYERS, WIDTH, HEADS, CONTEXT)
        if swiglu:
            for block in self.model.get_submodule("blocks").children():
                block.add_module("mlp", SwiGlu(WIDTH))
        if not shadow:
            fp8core.convert_to_fp8(
                self.model, recipe=recipe, overrides=overrides, module_filter_fn=lambda _, name: "blocks." in name
            )
        linears = {n: m for n, m in self.model.get_submodule("blocks").named_modules() if isinstance(m, nn.Linear)}
        self.layers = {f"blocks.{name}": module for name, module in linears.items()}
        casts = {
            name: ShadowLayer(module, Shadow(recipe)) if shadow else module for name, module in self.layers.items()
        }
        self.slots = tuple(
            Slot(3 * i + j, name, role, "Linear", layer.in_features, layer.out_features, *_cast(casts[name], role))
            for i, (name, layer) in enumerate(self.layers.items())
            for j, role in enumerate(Role)
        )
        self.arena = StatsArena(len(self.slots))
        for i, cast in enumerate(casts.values()):
            rows = {role: 3 * i + j for j, role in enumerate(Role)}
            if isinstance(cast, ShadowLayer):
                cast.bind(self.arena, rows)
            elif isinstance(cast, Fp8Linear):
                cast.bind_stats(self.arena, rows)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 20))
        data_seed = seed if data_seed is None else data_seed
        self.data = train_gpt.batches(_text(), BATCH, CONTEXT, data_seed, torch.device("cpu"))
        self.killed = False

    def backward(self) -> float:
        """Forward and backward of one batch; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = self.model(*next(self.data))
        torch.autograd.backward(loss)
        return float(loss.detach())

    def update(self) -> None:
        """The optimizer's step."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()


def record(
    recipe: Recipe, fault: Fault | None = None, *, steps: int = 24, seed: int = 0, ranks: int = 1, **options: Any
) -> Window:
    """The rows and losses of a training with `ranks` replicas that average their gradients; the last has the fault."""
    torch.set_num_threads(1)
    replicas = [Training(recipe, seed=seed, data_seed=seed + rank, **options) for rank in range(ranks)]
    slots = replicas[0].slots
    fields = {name: np.full((ranks, steps, len(slots)), np.nan) for name in FIELDS_READ}
    losses = np.empty(steps)
    for step in range(steps):
        for rank, training in enumerate(replicas):
            training.arena.reset()
            try:
                if fault is not None and rank == ranks - 1:
                    fault(training, step)
            except Killed:
                training.killed = True
            if training.killed:
                continue
            loss = training.backward()
            losses[step] = loss if rank == 0 else losses[step]
            rows = decode_arena(training.arena.words.numpy().copy())
            for name in FIELDS_READ:
                fields[name][rank, step, rows.slot] = rows.columns[name]
        alive = [training for training in replicas if not training.killed]
        _average_gradients(alive)
        for training in alive:
            training.update()
    at = np.arange(steps)
    return Window(at, tuple(range(ranks)), slots, fields, {"loss": ScalarSeries(at, losses)})


def _cast(layer: ShadowLayer | nn.Module, role: Role) -> tuple[str, str, int]:
    """Format, recipe and margin of a layer's tensor."""
    if isinstance(layer, ShadowLayer):
        cast = layer.cast(role)
        return cast.format, cast.recipe, cast.margin
    assert isinstance(layer, Fp8Linear)
    fmt, margin = layer.stats_spec(role)
    return fmt, repr(layer.recipe_by_role[role]), margin


def _average_gradients(replicas: Sequence[Training]) -> None:
    if len(replicas) == 1:
        return
    for parameters in zip(*(training.model.parameters() for training in replicas), strict=True):
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            average = torch.stack(gradients).mean(dim=0)
            for parameter in parameters:
                parameter.grad = average.clone()


@cache
def _text() -> Tensor:
    text: Tensor = train_gpt.standard_library_bytes()[0]
    return text
