"""From an amax to a scale on the device: `fp8core.scaling`'s results bit for bit, without asking the host.

Each function takes and returns 0-d float32 tensors and runs on any device, `meta` included. Two traps are avoided
here once for all: `448.0 / tensor` is `tensor.reciprocal() * 448.0` in torch and one ulp off in 27 % of cases, so the
maximum becomes a tensor first; and powers of two are assembled from their bits, because exp2 and pow need not be
exact on a device.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from fp8core.formats import Fp8Format
from fp8core.recipes import AmaxScaling, ConstantScaling, CurrentScaling, DelayedScaling, Recipe
from fp8core.records import Role
from fp8core.scaling import FLOAT32_MAX


def amax_scale(amax: Tensor, fmt: Fp8Format, margin: int, clamp: int) -> Tensor:
    """The scale of `AmaxScaling`: 2**scale_exp2_from_amax(amax).

    A difference of float64 bit patterns, shifted by the mantissa, is the difference of the exponents less one where
    amax's mantissa is the larger one: what the reference does with frexp, in two operations. (float64, because
    float32's subnormals are normal there.)
    """
    exp2 = (_float64_bits(math.ldexp(fmt.max, -margin)) - amax.double().view(torch.int64)) >> 52
    return power_of_two(torch.where(_usable(amax), exp2.clamp(-clamp, clamp), 0))


def power_of_two(exp2: Tensor) -> Tensor:
    """2**exp2 as float32, for integers from -126 to 127."""
    return ((exp2 + 127) << 23).int().view(torch.float32)


def _float64_bits(value: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def current_scale(amax: Tensor, fmt: Fp8Format, *, margin: int = 0, round_down: bool = False) -> Tensor:
    """The scale of `CurrentScaling`: max / 2**margin / amax; `round_down` to a power of two."""
    scale = (torch.full_like(amax, math.ldexp(fmt.max, -margin)) / amax).clamp(max=FLOAT32_MAX)
    if round_down:
        scale = (scale.view(torch.int32) & ~0x007FFFFF).view(torch.float32)
    return torch.where(_usable(amax), scale, 1.0)


def _usable(amax: Tensor) -> Tensor:
    return (amax > 0) & (amax <= FLOAT32_MAX)


def new_state(recipe: DelayedScaling, device: torch.device | str | None = None) -> Tensor:
    """The state of one tensor under delayed scaling before its first cast, int32 [2 + history_len].

    The words are float32 bit patterns, so that `module.to(dtype)` leaves them alone. Word 0 is the scale of the next
    cast, word 1 that of the last one (a recomputed forward repeats it), the rest the amaxes seen, newest first.
    """
    state = torch.zeros(2 + recipe.history_len, dtype=torch.float32, device=device)
    state[:2] = 1.0
    return state.view(torch.int32)


def next_scale(state: Tensor) -> Tensor:
    """The scale of the next cast."""
    return state[0].view(torch.float32)


def last_scale(state: Tensor) -> Tensor:
    """The scale of the last cast."""
    return state[1].view(torch.float32)


def delayed_update(state: Tensor, amax: Tensor, fmt: Fp8Format, recipe: DelayedScaling) -> Tensor:
    """`state` after a cast whose amax was `amax`; the rules of `scaling.delayed_update`."""
    words = state.view(torch.float32)
    scale, history = words[0], words[2:]
    rolled = torch.cat([amax.reshape(1), history[:-1]])
    reference = amax if recipe.algo == "most_recent" else torch.where(rolled.isnan(), 0.0, rolled).amax()
    fresh = current_scale(reference, fmt, margin=recipe.margin_bits, round_down=recipe.power_of_two)
    scale_after = torch.where(_usable(reference) & (amax != 0), fresh, scale)
    history_after = torch.where(amax == 0, history, rolled)
    return torch.cat([scale_after.reshape(1), scale.reshape(1), history_after]).view(torch.int32)


def just_in_time_scale(recipe: Recipe, role: Role, amax: Tensor, fmt: Fp8Format) -> Tensor:
    """The scale of a tensor whose `amax` is known, under a recipe that looks at it."""
    if isinstance(recipe, AmaxScaling):
        return amax_scale(amax, fmt, recipe.margin(role), recipe.clamp)
    assert isinstance(recipe, CurrentScaling)
    return current_scale(amax, fmt, round_down=recipe.power_of_two)


def constant_scale(recipe: ConstantScaling, role: Role, device: torch.device) -> Tensor:
    """The scale of `role` under constant scaling."""
    return torch.full((), math.ldexp(1.0, recipe.exponent(role)), dtype=torch.float32, device=device)
