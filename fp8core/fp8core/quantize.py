"""A tensor into FP8, with its statistics left in the arena: one opaque operation, `torch.ops.fp8core.quantize`.

    q, scale = quantize(x, recipe=AmaxScaling(), role="input", fmt=E4M3FN)      # x ~ q.float() / scale

`torch.ops.fp8core.observe` leaves the same statistics and no payload: for a tensor that somebody else casts, or nobody.

Everything about its form was measured against torch.compile, activation checkpointing, DDP and FSDP2
(docs/adr/0001, 0002):

* It is opaque (`Library.define`), so that a compiler neither fuses nor splits it and all paths give the same bits.
* The arena is an integer handle and the slot a 0-d tensor: no version checks, no recompilation for each block.
* It counts as a side effect, so that a call whose outputs nobody uses stays in the graph.
* The body sees whether it runs inside a backward (`_current_graph_task_id() != -1`). An input or a weight that is
  quantised there is a recomputation (checkpointing of either kind, the compiler's own): its statistics go to nowhere.
* Rows of weights are overwritten, those of inputs and gradients merged over the micro-batches of a step.
* The state of `DelayedScaling` is an argument that the body writes to behind the dispatcher's back (docs/adr/0003).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import has_side_effect

from fp8core import device_scaling
from fp8core.formats import FORMATS, Fp8Format
from fp8core.kernels import kernels_for
from fp8core.ops import define
from fp8core.recipes import AmaxScaling, ConstantScaling, DelayedScaling, Recipe, parse_recipe
from fp8core.records import Role
from fp8core.stats import NO_ARENA, StatsArena, recording_arena

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize(
    x: Tensor,
    *,
    recipe: Recipe | str,
    role: Role | str,
    fmt: Fp8Format | str,
    state: Tensor | None = None,
    arena: int = NO_ARENA,
    slot: Tensor | None = None,
    update_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """The payload of `x` in `fmt`, contiguous and of x's shape, and its scale, float32 0-d; no gradient flows.

    `state` is what delayed scaling keeps of this tensor (`device_scaling.new_state`); the cast replaces it unless
    `update_state` is False. `arena` and `slot` say where the statistics go. In code that torch.compile traces, give
    `recipe` and `fmt` as texts, `repr(recipe)` and `fmt.name`: Dynamo cannot print a dataclass.

    Raises:
        ValueError: delayed scaling without `state`.
        TypeError: x is not bfloat16, float16 or float32.
    """
    recipe_text = recipe if isinstance(recipe, str) else repr(recipe)
    fmt_name = fmt if isinstance(fmt, str) else fmt.name
    q, scale = torch.ops.fp8core.quantize(x, recipe_text, str(role), fmt_name, state, arena, slot, update_state)
    return q, scale


def quantize_body(
    x: Tensor,
    recipe_text: str,
    role_name: str,
    fmt_name: str,
    state: Tensor | None,
    arena_handle: int,
    slot: Tensor | None,
    update_state: bool,
) -> tuple[Tensor, Tensor]:
    """What the operation does, on real tensors of any device; on `meta` by the eager kernels."""
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(f"x is {x.dtype}; FP8 is cast from bfloat16, float16 or float32")
    recipe, role, fmt = parse_recipe(recipe_text), Role(role_name), FORMATS[fmt_name]
    if isinstance(recipe, DelayedScaling) and state is None:
        raise ValueError("DelayedScaling needs state: make one with fp8core.device_scaling.new_state(recipe)")
    recomputing = _recomputing(role)
    # An empty tensor has no statistics: it must not pull scale_min down to the 1.0 that an amax of 0 gives.
    arena = None if recomputing or x.numel() == 0 else recording_arena(arena_handle)
    x = x.detach().contiguous()
    # Where the forward has moved the state on, its recomputation repeats the scale that the forward used.
    scale = _scale(x, recipe, role, fmt, state, repeat=recomputing and update_state)
    q, amax = _cast(x, scale, role, fmt, arena, slot)
    if isinstance(recipe, DelayedScaling) and update_state and not recomputing:
        _data(state).copy_(device_scaling.delayed_update(_data(state), amax, fmt, recipe))
    return q, scale


def observe_body(
    x: Tensor, recipe_text: str, role_name: str, fmt_name: str, state: Tensor | None, arena_handle: int, slot: Tensor
) -> None:
    """Leaves the statistics that a cast of `x` by the recipe would leave.

    The state of delayed scaling moves on at every call, recorded or not, for a pass over the data.
    """
    recipe, role, fmt, margin = _parsed(recipe_text, role_name, fmt_name)
    arena = observing_arena(x, role, arena_handle)
    if arena is not None and isinstance(recipe, AmaxScaling):
        x = x.detach().contiguous()
        _add_histogram(x, role, arena, slot)
        kernels_for(x.device.type).count_by_amax(
            *(x, fmt, margin, recipe.clamp),
            words=arena.words,
            slot=slot,
            overwrite=role is Role.WEIGHT,
            last_scales=arena.last_scales,
        )
        return
    if arena is not None:
        scale = _scale(x.detach().contiguous(), recipe, role, fmt, state)
        amax = observe_cast(x, scale, role, fmt, arena, slot)
    elif isinstance(recipe, DelayedScaling) and _castable(x) and not _recomputing(role):
        amax = kernels_for(x.device.type).amax(x.detach().contiguous())
    else:
        return
    if isinstance(recipe, DelayedScaling):
        _data(state).copy_(device_scaling.delayed_update(_data(state), amax, fmt, recipe))


@functools.cache
def _parsed(recipe_text: str, role_name: str, fmt_name: str) -> tuple[Recipe, Role, Fp8Format, int]:
    """What an operation's texts say, and the margin: some 100 us a call where the caches are cold."""
    recipe, role = parse_recipe(recipe_text), Role(role_name)
    return recipe, role, FORMATS[fmt_name], recipe.margin(role)


def observing_arena(x: Tensor, role: Role, arena_handle: int) -> StatsArena | None:
    """The arena that wants the statistics of `x` now. A guest's question: what cannot be cast is no error."""
    arena = recording_arena(arena_handle)
    wanted = arena is not None and arena.device == x.device and _castable(x) and not _recomputing(role)
    return arena if wanted else None


def observe_cast(x: Tensor, scale: Tensor, role: Role, fmt: Fp8Format, arena: StatsArena, slot: Tensor) -> Tensor:
    """Leaves the statistics of `x` cast with `scale`, float32 0-d, in `arena`; the amax of `x`."""
    x = x.detach().contiguous()
    _add_histogram(x, role, arena, slot)
    kernels = kernels_for(x.device.type)
    return kernels.count(x, scale, fmt, words=arena.words, slot=slot, overwrite=role is Role.WEIGHT)


def _add_histogram(x: Tensor, role: Role, arena: StatsArena, slot: Tensor) -> None:
    if arena.record_histograms:
        counts = kernels_for(x.device.type).exponent_histogram(x)
        arena.add_histogram(slot, counts, overwrite=role is Role.WEIGHT)


def _castable(x: Tensor) -> bool:
    return x.numel() > 0 and x.dtype in INPUT_DTYPES


def _recomputing(role: Role) -> bool:
    return role is not Role.GRAD_OUTPUT and torch._C._current_graph_task_id() != -1


def _scale(
    x: Tensor, recipe: Recipe, role: Role, fmt: Fp8Format, state: Tensor | None, *, repeat: bool = False
) -> Tensor:
    """The scale of `x`; with `repeat` the one that delayed scaling used last."""
    if isinstance(recipe, ConstantScaling):
        return device_scaling.constant_scale(recipe, role, x.device)
    if isinstance(recipe, DelayedScaling):
        known = device_scaling.last_scale if repeat else device_scaling.next_scale
        return known(_data(state)).clone()
    return device_scaling.just_in_time_scale(recipe, role, kernels_for(x.device.type).amax(x), fmt)


def _cast(
    x: Tensor, scale: Tensor, role: Role, fmt: Fp8Format, arena: StatsArena | None, slot: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The payload and the amax of a contiguous `x`; its statistics go to `arena`."""
    kernels = kernels_for(x.device.type)
    if arena is None:
        return kernels.cast(x, scale, fmt)
    assert slot is not None
    _add_histogram(x, role, arena, slot)
    return kernels.cast(x, scale, fmt, words=arena.words, slot=slot, overwrite=role is Role.WEIGHT)


def recast(x: Tensor, scale: Tensor, fmt: Fp8Format | str) -> Tensor:
    """The payload of `x` in `fmt` with a scale that is known already; no statistics, no state, no gradient."""
    q: Tensor = torch.ops.fp8core.recast(x, scale, fmt if isinstance(fmt, str) else fmt.name)
    return q


def recast_body(x: Tensor, scale: Tensor, fmt_name: str) -> Tensor:
    """What `recast` does, on real tensors of any device."""
    q, _ = kernels_for(x.device.type).cast(x.detach().contiguous(), scale, FORMATS[fmt_name])
    return q


def _data(state: Tensor | None) -> Tensor:
    """`state` as autograd does not see it: it may have been saved for a backward still to come."""
    assert state is not None
    return state.data


def _on_meta(
    x: Tensor,
    recipe: str,
    role: str,
    fmt: str,
    state: Tensor | None,
    arena: int,
    slot: Tensor | None,
    update_state: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes only for the compiler's fake tensors; the real body for tensors that are on meta themselves."""
    if isinstance(x, FakeTensor):
        return x.new_empty(x.shape, dtype=getattr(torch, FORMATS[fmt].torch_dtype)), x.new_empty((), dtype=torch.float)
    return quantize_body(x, recipe, role, fmt, state, arena, slot, update_state)


define(
    "quantize(Tensor x, str recipe, str role, str fmt, Tensor? state, int arena, Tensor? slot, bool update_state)"
    " -> (Tensor, Tensor)",
    quantize_body,
    _on_meta,
)
define(
    "observe(Tensor x, str recipe, str role, str fmt, Tensor? state, int arena, Tensor slot) -> ()",
    observe_body,
    lambda *arguments: None if isinstance(arguments[0], FakeTensor) else observe_body(*arguments),
)
define(
    "recast(Tensor x, Tensor scale, str fmt) -> Tensor",
    recast_body,
    lambda x, scale, fmt: x.new_empty(x.shape, dtype=getattr(torch, FORMATS[fmt].torch_dtype)),
)
has_side_effect(torch.ops.fp8core.quantize.default)
has_side_effect(torch.ops.fp8core.observe.default)
