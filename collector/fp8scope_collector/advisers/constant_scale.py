"""Which constants would do for `ConstantScaling`: the interval of scale_exp2, by role and for all, and what binds it.

From one run of any recipe. With the scale 2**n a tensor clips above max / 2**n and loses precision, then elements,
below smallest_normal / 2**n. Three numbers come of that for each tensor:

* `never_clips`: the largest n at which no step of the run would have clipped, amax * 2**n <= max. It is what FP8-AMAX
  would have used at its tightest step, and what arXiv 2309.17224 found to be the upper limit of a constant.
* `upper`: the largest n at which only what lies beyond CLIPPED_ABOVE root mean squares clips, at the worst step but a
  few. That does no harm: of a normal distribution the clipping then costs as much precision as rounding to E4M3 does
  anyway. The measured limit of training and of inference lies one above `never_clips`, or two (docs/study.md).
* `lower`: the smallest n that keeps the root mean square among the normal numbers, at the worst step but a few. Of a
  normal distribution 1/16 of a root mean square is then flushed or less, 5 % of the elements. Precision is lost from
  there on; how much of that a model bears differs by far more than at the upper end.

Above `upper` training falls off a cliff, below `lower` it slides down a slope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fp8core.records import Role
from fp8core.scaling import scale_exp2_from_amax
from fp8scope_collector.advisers.history import TensorHistory

CLIPPED_ABOVE = 2.8  # root mean squares: 0.5 % of a normal distribution, at 31 dB
WORST_BUT = 0.01  # part of the steps that may be worse: the first ones, a spike


@dataclass(frozen=True)
class Bound:
    """One end of an interval and the tensor that sets it."""

    scale_exp2: int
    tensor: str


@dataclass(frozen=True)
class ConstantAdvice:
    """The constants expected to work for `role`, or for all roles where it is None: lower to upper, both included.

    The interval is empty where `lower` is above `upper`: no constant serves all these tensors.
    """

    role: Role | None
    lower: Bound
    upper: Bound
    never_clips: Bound

    @property
    def empty(self) -> bool:
        """Whether no constant is expected to work."""
        return self.lower.scale_exp2 > self.upper.scale_exp2


def advise_constant(tensors: Sequence[TensorHistory]) -> list[ConstantAdvice]:
    """The advice for each role that has a tensor with a finite non-zero step, and last that for all roles."""
    seen = [tensor for tensor in tensors if (tensor.amax > 0).any()]
    if not seen:
        return []
    by_role = [(role, [tensor for tensor in seen if tensor.role is role]) for role in Role]
    return [*(_advise(role, own) for role, own in by_role if own), _advise(None, seen)]


def _advise(role: Role | None, tensors: Sequence[TensorHistory]) -> ConstantAdvice:
    return ConstantAdvice(
        role=role,
        lower=max((Bound(_lower(each), each.name) for each in tensors), key=lambda bound: bound.scale_exp2),
        upper=min((Bound(_upper(each), each.name) for each in tensors), key=lambda bound: bound.scale_exp2),
        never_clips=min((Bound(_never_clips(each), each.name) for each in tensors), key=lambda bound: bound.scale_exp2),
    )


def _never_clips(tensor: TensorHistory) -> int:
    return scale_exp2_from_amax(float(tensor.amax.max()), tensor.fmt)


def _upper(tensor: TensorHistory) -> int:
    largest = float(np.quantile(tensor.rms[tensor.amax > 0], 1 - WORST_BUT, method="higher"))
    tail = math.floor(math.log2(tensor.fmt.max / (CLIPPED_ABOVE * largest)))
    return max(tail, _never_clips(tensor))


def _lower(tensor: TensorHistory) -> int:
    smallest = float(np.quantile(tensor.rms[tensor.amax > 0], WORST_BUT, method="lower"))
    return math.ceil(math.log2(tensor.fmt.smallest_normal / smallest))
