"""How often a just-in-time scale has to be computed anew: flip rates, and what a stale scale would clip, by role.

From the amaxes of a recorded run. FP8-AMAX's scale of each step is known exactly; a flip is a step whose scale differs
from the one before. Had the scale been computed every `interval` steps and kept in between, a tensor clips at a step
where amax * scale rounds beyond the format's range. A margin, as gradients have, is room for that.

The advice for a role is the longest interval, a power of two, at which at most CLIPPED_STEPS of its tensors' steps
clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fp8core.records import Role
from fp8core.scaling import scale_exp2_from_amax
from fp8scope_collector.advisers.history import TensorHistory

INTERVALS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CLIPPED_STEPS = 0.001
_FIRST_STEPS = 50

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RefreshAdvice:
    """What the scales of a role did, and how long one may be kept.

    `flips_per_step` is the mean over tensors; `drift` the median change from the mode of the first 50 steps to that of
    the last 50; `clipped_steps` the part of tensors' steps that would clip, by interval. Intervals longer than half of
    the run are left out.
    """

    role: Role
    tensors: int
    flips_per_step: float
    drift: float
    clipped_steps: Mapping[int, float]
    interval: int


def advise_refresh(tensors: Sequence[TensorHistory]) -> list[RefreshAdvice]:
    """The advice for each role with a tensor that was recorded at two steps or more."""
    usable = [tensor for tensor in tensors if tensor.steps.size >= 2]
    by_role = [(role, [tensor for tensor in usable if tensor.role is role]) for role in Role]
    return [_advise(role, own) for role, own in by_role if own]


def amax_exponents(tensor: TensorHistory) -> Ints:
    """The scale_exp2 that FP8-AMAX has at each step, with the tensor's margin."""
    amaxes = tensor.amax.tolist()
    return np.array([scale_exp2_from_amax(amax, tensor.fmt, margin=tensor.margin) for amax in amaxes], dtype=np.int64)


def _advise(role: Role, tensors: Sequence[TensorHistory]) -> RefreshAdvice:
    exponents = [amax_exponents(tensor) for tensor in tensors]
    longest = max(each.size for each in exponents) // 2
    clipped = {
        interval: _clipped_steps(tensors, exponents, interval) for interval in INTERVALS if interval <= max(1, longest)
    }
    kept = [interval for interval, part in clipped.items() if part <= CLIPPED_STEPS]
    return RefreshAdvice(
        role=role,
        tensors=len(tensors),
        flips_per_step=float(np.mean([np.mean(np.diff(each) != 0) for each in exponents])),
        drift=float(np.median([_mode(each[-_FIRST_STEPS:]) - _mode(each[:_FIRST_STEPS]) for each in exponents])),
        clipped_steps=clipped,
        interval=max(kept, default=1),
    )


def _clipped_steps(tensors: Sequence[TensorHistory], exponents: Sequence[Ints], interval: int) -> float:
    clipped = steps = 0
    for tensor, exponent in zip(tensors, exponents, strict=True):
        stale = exponent[np.arange(exponent.size) // interval * interval]
        scaled = np.ldexp(tensor.amax, stale)
        limit = tensor.fmt.overflow_limit
        clipped += int((scaled >= limit if tensor.fmt.ties_overflow else scaled > limit).sum())
        steps += exponent.size
    return clipped / steps


def _mode(values: Ints) -> int:
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()])
