"""From an amax to a scale, exactly: the reference in plain Python and numpy that every device path is tested against.

`scale` always multiplies into FP8. What zero, Inf and NaN give, by rule:

| amax           | AmaxScaling | CurrentScaling          | DelayedScaling                   |
|----------------|-------------|-------------------------|----------------------------------|
| 0, Inf, NaN    | 1.0         | 1.0                     | the scale stays as it was        |
| so small that max/amax overflows float32 | clamped | float32's largest | float32's largest   |

These are Transformer Engine's outcomes; torchao differs outside finite amax >= 1e-12 (it gives 4.48e14 for 0 and NaN
for Inf). This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fp8core.formats import Fp8Format
from fp8core.recipes import MAX_SCALE_EXP2, DelayedScaling

FLOAT32_MAX = float(np.finfo(np.float32).max)


def scale_exp2_from_amax(amax: float, fmt: Fp8Format, *, margin: int = 0, clamp: int = MAX_SCALE_EXP2) -> int:
    """The largest n - margin with amax * 2**n <= fmt.max, within [-clamp, clamp]: FP8-AMAX's scaling bias.

    Computed from the mantissas: a floating log2 rounds up for an amax one ulp above max * 2**k and gives a scale that
    clips. An amax of 0, Inf or NaN gives 0, that is the scale 1.

    Raises:
        ValueError: `amax` is negative.
    """
    if amax < 0:
        raise ValueError(f"amax is {amax}; expected the largest magnitude, which is not negative")
    if amax == 0 or not math.isfinite(amax):
        return 0
    amax_mantissa, amax_exponent = math.frexp(amax)
    max_mantissa, max_exponent = math.frexp(fmt.max)
    scale_exp2 = max_exponent - amax_exponent - (amax_mantissa > max_mantissa) - margin
    return max(-clamp, min(clamp, scale_exp2))


def current_scale(amax: float, fmt: Fp8Format, *, margin: int = 0, power_of_two: bool = False) -> float:
    """fmt.max / 2**margin / amax, divided in float32 and rounded to nearest, as Transformer Engine does.

    `power_of_two` clears the mantissa. An amax of 0, Inf or NaN gives 1.
    """
    if amax == 0 or not math.isfinite(amax):
        return 1.0
    with np.errstate(over="ignore"):
        scale = np.float32(math.ldexp(fmt.max, -margin)) / np.float32(amax)
    scale = min(scale, np.float32(FLOAT32_MAX))
    if power_of_two:
        scale = (scale.view(np.uint32) & np.uint32(0xFF800000)).view(np.float32)
    return float(scale)


@dataclass(frozen=True)
class DelayedState:
    """What delayed scaling knows of one tensor: the scale of its next cast, and the amaxes seen, newest first."""

    scale: float = 1.0
    history: tuple[float, ...] = ()


def delayed_update(state: DelayedState, amax: float, fmt: Fp8Format, recipe: DelayedScaling) -> DelayedState:
    """The state after a cast whose amax was `amax`.

    An amax of 0 changes nothing, neither history nor scale. Under "max" a NaN in the history is passed over; where
    what is left is 0, Inf or NaN the scale stays as it was. (The rules of Transformer Engine's fused kernel.)
    """
    if amax == 0:
        return state
    history = (amax, *state.history)[: recipe.history_len]
    reference = amax if recipe.algo == "most_recent" else _largest(history)
    if reference == 0 or not math.isfinite(reference):
        return DelayedState(state.scale, history)
    scale = current_scale(reference, fmt, margin=recipe.margin_bits, power_of_two=recipe.power_of_two)
    return DelayedState(scale, history)


def _largest(values: Sequence[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)
