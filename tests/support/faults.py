"""Real FP8 training of a tiny GPT with one thing broken at a known step, recorded as a diagnosis `Window`.

`record(...)` trains the model of examples/train_gpt.py in this process and reads its rows straight from the statistics
arena. A fault is a function called at each step before the forward pass, which breaks what it is about to break.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fp8core
from fp8core import Fp8Linear, Override, StatsArena
from fp8core.recipes import Recipe
from fp8core.records import Role, decode_arena
from fp8scope_collector.diagnosis.window import FIELDS_READ, ScalarSeries, Window
from fp8scope_collector.storage.readmodels import Slot

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 2, 32, 2, 32, 4

Fault = Callable[["Training", int], None]


class Training:
    """A tiny GPT in training; faults reach into it."""

    def __init__(
        self, recipe: Recipe, *, seed: int = 0, data_seed: int | None = None, overrides: Sequence[Override] = ()
    ) -> None:
        torch.manual_seed(seed)
        gpt = _train_gpt()
        self.model: nn.Module = gpt.Gpt(LAYERS, WIDTH, HEADS, CONTEXT)
        fp8core.convert_to_fp8(
            self.model, recipe=recipe, overrides=overrides, module_filter_fn=lambda _, name: name.startswith("blocks.")
        )
        self.layers = {name: module for name, module in self.model.named_modules() if isinstance(module, Fp8Linear)}
        self.slots = tuple(
            Slot(3 * i + j, name, role, "Fp8Linear", layer.in_features, layer.out_features, fmt, text, margin)
            for i, (name, layer) in enumerate(self.layers.items())
            for j, role in enumerate(Role)
            for (fmt, margin), text in [(layer.stats_spec(role), repr(layer.recipe_by_role[role]))]
        )
        self.arena = StatsArena(len(self.slots))
        for i, layer in enumerate(self.layers.values()):
            layer.bind_stats(self.arena, {role: 3 * i + j for j, role in enumerate(Role)})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        self.warmup = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 20))
        self.gradient_factor = 1.0
        text = _text()
        self.data = gpt.batches(text, BATCH, CONTEXT, seed if data_seed is None else data_seed, torch.device("cpu"))

    def backward(self) -> float:
        """Forward and backward of one batch; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = self.model(*next(self.data))
        torch.autograd.backward(loss * self.gradient_factor)
        return float(loss.detach())

    def update(self) -> None:
        """The optimizer's step."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.warmup.step()


def record(
    recipe: Recipe, fault: Fault | None = None, *, steps: int = 24, seed: int = 0, ranks: int = 1, **options: Any
) -> Window:
    """The rows and losses of a training with `ranks` replicas that average their gradients."""
    torch.set_num_threads(1)
    replicas = [Training(recipe, seed=seed, data_seed=seed + rank, **options) for rank in range(ranks)]
    slots = replicas[0].slots
    fields = {name: np.full((ranks, steps, len(slots)), np.nan) for name in FIELDS_READ}
    losses = np.empty(steps)
    for step in range(steps):
        for rank, training in enumerate(replicas):
            training.arena.reset()
            if fault is not None and rank == ranks - 1:
                fault(training, step)
            loss = training.backward()
            losses[step] = loss if rank == 0 else losses[step]
            rows = decode_arena(training.arena.words.numpy().copy())
            for name in FIELDS_READ:
                fields[name][rank, step, rows.slot] = rows.columns[name]
        _average_gradients(replicas)
        for training in replicas:
            training.update()
    at = np.arange(steps)
    return Window(at, tuple(range(ranks)), slots, fields, {"loss": ScalarSeries(at, losses)})


# Faults: each breaks the last replica from step `at` on, or in that step alone ---------------------------------------


def higher_learning_rate(at: int, factor: float = 30.0) -> Fault:
    def fault(training: Training, step: int) -> None:
        if step == at:
            training.warmup.base_lrs = [rate * factor for rate in training.warmup.base_lrs]
            for group in training.optimizer.param_groups:
                group["lr"] *= factor

    return fault


def corrupted_weight_row(at: int, layer: str, factor: float = 2.0**8) -> Fault:
    def fault(training: Training, step: int) -> None:
        if step == at:
            with torch.no_grad():
                training.layers[layer].weight[3] *= factor

    return fault


def scaled_gradients(at: int, factor: float) -> Fault:
    def fault(training: Training, step: int) -> None:
        if step == at:
            training.gradient_factor = factor

    return fault


def nan_in_a_batch(at: int) -> Fault:
    """One embedded token is NaN in one step, as a bad sample makes it; the gradients make the weights NaN."""

    def fault(training: Training, step: int) -> None:
        if step == at:
            handle: Any = None

            def poison(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
                handle.remove()
                poisoned = embedded.clone()
                poisoned[0, 5] = torch.nan
                return poisoned

            handle = training.model.get_submodule("token").register_forward_hook(poison)

    return fault


def frozen_state(at: int, layer: str, role: Role) -> Fault:
    """The delayed scale of one tensor is put back before each step, as by a wrapper that loses the update."""
    kept: list[Tensor] = []

    def fault(training: Training, step: int) -> None:
        if step >= at:
            state = training.layers[layer].get_buffer(f"fp8_state_{role}")
            if not kept:
                kept.append(state.clone())
            state.copy_(kept[0])

    return fault


def spike_in_one_step(at: int, layer: str, factor: float = 2.0**10) -> Fault:
    """One element of a layer's input is very large in one step."""

    def fault(training: Training, step: int) -> None:
        if step == at:
            handle: Any = None

            def raise_one(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                handle.remove()
                raised = args[0].clone()
                raised.view(-1)[7] = factor * args[0].detach().abs().max()
                return (raised,)

            handle = training.layers[layer].register_forward_pre_hook(raise_one)

    return fault


def dead_layer(at: int, layer: str) -> Fault:
    """What comes after the layer multiplies its output by zero from step `at` on."""

    def fault(training: Training, step: int) -> None:
        if step == at:
            training.layers[layer].register_forward_hook(lambda _, __, y: y * 0)

    return fault


def changed_weight_of_a_rank(at: int, layer: str) -> Fault:
    def fault(training: Training, step: int) -> None:
        if step == at:
            with torch.no_grad():
                training.layers[layer].weight *= 1.01

    return fault


def alternating_input(at: int, layer: str, factor: float = 32.0) -> Fault:
    """A layer's input is larger at every second step, as with two kinds of batch in turn."""

    def fault(training: Training, step: int) -> None:
        if step == at:
            calls = iter(range(1 << 30))
            training.layers[layer].register_forward_pre_hook(
                lambda _, args: (args[0] * (factor if next(calls) % 2 else 1.0),)
            )

    return fault


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
def _train_gpt() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "train_gpt.py"
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    sys.modules["train_gpt"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@cache
def _text() -> Tensor:
    text: Tensor = _train_gpt().standard_library_bytes()[0]
    return text
