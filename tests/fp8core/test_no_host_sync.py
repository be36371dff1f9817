"""A training step never makes the host wait: run on meta with the eager kernels, where asking for a value is an error.

On meta a compiled kernel could hide a wait inside an operation; so the bodies of our operations run here themselves,
under a mode that looks at every call they make.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fp8core.kernels
from fp8core import AmaxScaling, ConstantScaling, CurrentScaling, DelayedScaling, Fp8Linear, StatsArena, convert_to_fp8
from fp8core.matmul import bfloat16_mm, emulated_mm, float32_mm
from fp8core.quantize import quantize_body, recast_body
from fp8core.recipes import Recipe
from fp8core.records import Role

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "_unique2"}


def emulated_mm_body(a: Any, b: Any, scale_a: Any, scale_b: Any, out_dtype: Any, power_of_two: Any, _: Any) -> Any:
    mm = bfloat16_mm if power_of_two and out_dtype == torch.bfloat16 else float32_mm
    return emulated_mm(a, b, scale_a, scale_b, out_dtype, mm)


BODIES = {"quantize": quantize_body, "recast": recast_body, "scaled_mm": emulated_mm_body}


class NoWaiting(TorchDispatchMode):
    """Notes operations that would wait for, or copy to or from, the meta device; runs our bodies under itself."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.bodies: set[str] = set()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "fp8core":
            self.bodies.add(name)
            with self:
                return BODIES[name](*args, **(kwargs or {}))
        self.seen.add(name)
        on_meta = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_meta]
        if on_meta and name in WAITING:
            self.waits.append(name)
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and isinstance(result, torch.Tensor):
            devices = {arg.device for arg in (*args, result) if isinstance(arg, torch.Tensor)}
            if len(devices) > 1:
                self.waits.append(f"{name} between {devices}")
        return result


@pytest.mark.parametrize(
    "recipe",
    [AmaxScaling(), CurrentScaling(power_of_two=True), DelayedScaling(history_len=4), ConstantScaling(3)],
    ids=repr,
)
def test_a_training_step_on_meta_never_asks_the_device_for_a_value(
    recipe: Recipe, gpt: Callable[[], nn.Module]
) -> None:
    with torch.device("meta"):
        model = convert_to_fp8(gpt(), recipe=recipe).bfloat16()
        tokens = torch.zeros(2, 8, dtype=torch.int64)
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    arena = StatsArena(3 * len(layers), "meta")
    for index, layer in enumerate(layers):
        layer.bind_stats(arena, {role: 3 * index + offset for offset, role in enumerate(Role)})
    arena.record_histograms = True
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    with NoWaiting() as mode:
        for _ in range(2):
            logits = model(tokens)
            F.cross_entropy(logits.view(-1, 64), tokens.view(-1)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            arena.reset()

    assert mode.bodies == {"quantize", "recast", "scaled_mm"}
    assert "index_copy_" in mode.seen  # the bodies' own operations were looked at
    assert mode.waits == []


def test_the_mode_notices_a_wait() -> None:
    # The test above must be able to fail: a body that reads its scale on the host.
    x = torch.zeros(4, device="meta")

    with pytest.raises(RuntimeError, match="meta"), NoWaiting():
        x.abs().max().item()


FORBIDDEN = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize"}


@pytest.mark.parametrize("module", ["eager", "triton"])
def test_kernels_for_devices_have_no_call_that_waits(module: str) -> None:
    path = Path(inspect.getfile(fp8core.kernels)).with_name(f"{module}.py")
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]

    waiting = {node.func.attr for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN}
    assert not waiting
