"""From a model to its slots: finds the layers that an adapter knows, numbers their tensors, gives them rows.

One arena per device holds the slots of the layers on it. The slots of the whole model are numbered in its order,
input, weight and grad_output of each layer, so that all ranks of a job and all its resumes number them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fp8core import StatsArena
from fp8core.records import Role

from ..catalogue import SlotInfo

# What torch.compile, activation checkpointing and FSDP1 put into a module's path: the layer is the same without.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class Cast:
    """How a layer casts one of its tensors: the name of the format, the recipe as it prints itself, its margin."""

    format: str
    recipe: str
    margin: int


class Layer(Protocol):
    """A linear layer that can be told where its statistics go."""

    @property
    def module(self) -> nn.Linear:
        """The module itself."""
        ...

    @property
    def module_class(self) -> str:
        """What the user knows the layer as."""
        ...

    def cast(self, role: Role) -> Cast:
        """How `role` is cast."""
        ...

    def bind(self, arena: StatsArena, rows: Mapping[Role, int]) -> None:
        """Write into these rows of `arena` from now on."""
        ...

    def release(self, arena: StatsArena) -> None:
        """Be as before `bind`, unless a later arena has taken the layer over. `arena` is closed already."""
        ...


# (name, module) -> the layer; or why a layer that the adapter knows is left alone; or None.
Finder = Callable[[str, nn.Module], Layer | str | None]


@dataclass(frozen=True)
class Tap:
    """A model whose layers are bound: its slots, and the arenas that hold them.

    `slots_of[i][row]` is the slot whose statistics stand in that row of `arenas[i]`; `left_alone` are the names of
    layers that are not recorded, by the reason.
    """

    slots: tuple[SlotInfo, ...]
    arenas: tuple[StatsArena, ...]
    slots_of: tuple[npt.NDArray[np.int64], ...]
    bound: tuple[tuple[Layer, StatsArena], ...]
    left_alone: Mapping[str, tuple[str, ...]]

    def silence(self) -> None:
        """From now on the layers write to nowhere. They stay as they are: a compiled model is not compiled anew."""
        for arena in self.arenas:
            arena.close()

    def release(self) -> None:
        """Silence, and every layer as it was before, unless a later tap has it."""
        self.silence()
        for layer, arena in self.bound:
            layer.release(arena)


def bind(model: nn.Module, finders: Sequence[Finder]) -> Tap:
    """Let every layer of `model` that one of `finders` knows, the first one first, write into an arena.

    Raises:
        ValueError: a layer has no device yet.
    """
    rows: dict[torch.device, list[int]] = {}
    found: list[tuple[Layer, torch.device, dict[Role, int]]] = []
    slots: list[SlotInfo] = []
    left_alone: dict[str, tuple[str, ...]] = {}
    for path, module in _unwrapped(model).named_modules():
        parts = [part for part in path.split(".") if part not in _WRAPPERS]
        name = ".".join(parts) or type(module).__name__  # the model itself
        layer = next((layer for find in finders if (layer := find(name, module)) is not None), None)
        if layer is None:
            continue
        if isinstance(layer, str):
            left_alone[layer] = (*left_alone.get(layer, ()), name)
            continue
        device = stored(layer.module).device
        if device.type == "meta":
            raise ValueError(f"layer {name!r} is on the meta device; attach after the model has its real weights")
        on_device = rows.setdefault(device, [])
        row_of = {}
        for role in Role:
            row_of[role] = len(on_device)
            on_device.append(len(slots))
            slots.append(_describe(len(slots), name, layer, role))
        found.append((layer, device, row_of))
    arenas = {device: StatsArena(len(on_device), device) for device, on_device in rows.items()}
    for layer, device, row_of in found:
        layer.bind(arenas[device], row_of)
    return Tap(
        slots=tuple(slots),
        arenas=tuple(arenas.values()),
        slots_of=tuple(np.array(on_device, dtype=np.int64) for on_device in rows.values()),
        bound=tuple((layer, arenas[device]) for layer, device, _ in found),
        left_alone=left_alone,
    )


def stored(module: nn.Linear) -> nn.Parameter:
    """A parameter, for its device and dtype. Asking for `.weight` would compute a parametrized one, which may change it
    (spectral_norm)."""
    return next(module.parameters())


def _unwrapped(model: nn.Module) -> nn.Module:
    return _unwrapped(model.module) if isinstance(model, DistributedDataParallel) else model


def _describe(slot: int, name: str, layer: Layer, role: Role) -> SlotInfo:
    cast = layer.cast(role)
    return SlotInfo(
        slot=slot,
        layer=name,
        role=role,
        format=cast.format,
        recipe=cast.recipe,
        margin=cast.margin,
        module_class=layer.module_class,
        in_features=layer.module.in_features,
        out_features=layer.module.out_features,
    )
