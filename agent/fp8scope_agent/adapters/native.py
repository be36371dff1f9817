"""fp8core's own `Fp8Linear`: its layers write their statistics themselves, here they are told where.

One arena per device holds the slots of the layers on it. The slots of the whole model are numbered in its order,
input, weight and grad_output of each layer, so that all ranks of a job and all its resumes number them alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fp8core import Fp8Linear, StatsArena
from fp8core.records import Role

from ..catalogue import SlotInfo

# What torch.compile, activation checkpointing and FSDP1 put into a module's path: the layer is the same without.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class Tap:
    """A model whose layers are bound: its slots, and the arenas that hold them.

    `slots_of[i][row]` is the slot whose statistics stand in that row of `arenas[i]`.
    """

    slots: tuple[SlotInfo, ...]
    arenas: tuple[StatsArena, ...]
    slots_of: tuple[npt.NDArray[np.int64], ...]

    def release(self) -> None:
        """From now on the layers write to nowhere, at no cost.

        They keep the handle: taking it away would compile a compiled model anew, and a later monitor may have
        bound them to its own arenas.
        """
        for arena in self.arenas:
            arena.close()


def bind(model: nn.Module) -> Tap:
    """Let every Fp8Linear of `model` write into an arena; without one, the tap has no slots.

    Raises:
        ValueError: a layer has no device yet.
    """
    rows: dict[torch.device, list[int]] = {}
    bindings: list[tuple[Fp8Linear, torch.device, dict[Role, int]]] = []
    slots: list[SlotInfo] = []
    for path, layer in _unwrapped(model).named_modules():
        if not isinstance(layer, Fp8Linear):
            continue
        name = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
        device = layer.weight.device
        if device.type == "meta":
            raise ValueError(f"layer {name!r} is on the meta device; attach after the model has its real weights")
        on_device = rows.setdefault(device, [])
        row_of = {}
        for role in Role:
            row_of[role] = len(on_device)
            on_device.append(len(slots))
            slots.append(_describe(len(slots), name, layer, role))
        bindings.append((layer, device, row_of))
    arenas = {device: StatsArena(len(on_device), device) for device, on_device in rows.items()}
    for layer, device, row_of in bindings:
        layer.bind_stats(arenas[device], row_of)
    return Tap(
        slots=tuple(slots),
        arenas=tuple(arenas.values()),
        slots_of=tuple(np.array(on_device, dtype=np.int64) for on_device in rows.values()),
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    return _unwrapped(model.module) if isinstance(model, DistributedDataParallel) else model


def _describe(slot: int, name: str, layer: Fp8Linear, role: Role) -> SlotInfo:
    format_name, margin = layer.stats_spec(role)
    return SlotInfo(
        slot=slot,
        layer=name,
        role=role,
        format=format_name,
        recipe=str(layer.recipe_by_role[role]),
        margin=margin,
        module_class=type(layer).__name__,
        in_features=layer.in_features,
        out_features=layer.out_features,
    )
