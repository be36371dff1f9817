"""Scaling recipes: by what rule a tensor gets the scale that it is cast to FP8 with.

A recipe is a frozen value that prints itself; `parse_recipe` reads that text back, and the text is what travels:
through the compiled graph, the run's catalogue and the database. The arithmetic is in `fp8core.scaling` (exact
reference, no torch) and in `fp8core.device_scaling` (the same on the device). This module imports no torch.

| recipe          | scale                              | from               | source                      |
|-----------------|------------------------------------|--------------------|-----------------------------|
| AmaxScaling     | 2**(floor(log2(max/amax)) - margin) | this tensor       | FP8-AMAX, arXiv 2309.17224  |
| ConstantScaling | 2**scale_exp2                      | nothing            | FP8-CSCALE, same paper      |
| CurrentScaling  | max / amax                         | this tensor        | Transformer Engine, torchao |
| DelayedScaling  | max / 2**margin / max(amaxes)      | the tensors before | Transformer Engine          |

`amax` is the largest *finite* magnitude, so NaN and Inf among the elements never reach a rule; they are counted as
`nonfinite`. What the rules themselves make of an amax of zero, Inf or NaN is in `fp8core.scaling`.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from typing import Literal

from fp8core.records import Role, parse_role

# Both 2**126 and its inverse are normal float32 numbers; 2**127 has a subnormal inverse.
MAX_SCALE_EXP2 = 126


def _require_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected an integer from {low} to {high}")


@dataclass(frozen=True)
class AmaxScaling:
    """FP8-AMAX: just in time, per tensor, a power of two; arXiv 2309.17224, section 2.3.

    scale_exp2 = floor(log2(fmt.max / amax)) - margin, then clamped to [-clamp, clamp]. The paper contradicts itself
    about the margin: its text and its code take 3 off the gradient only (the default here), its figure 1 takes 3 off
    everything (`paper_fig1`). Its code clamps to +-31, a limit of its hardware: `clamp=31` does the same.
    """

    margin_input: int = 0
    margin_weight: int = 0
    margin_grad_output: int = 3
    clamp: int = MAX_SCALE_EXP2

    def __post_init__(self) -> None:
        for role in Role:
            _require_int(f"margin_{role}", self.margin(role), -64, 64)
        _require_int("clamp", self.clamp, 0, MAX_SCALE_EXP2)

    @classmethod
    def paper_fig1(cls) -> AmaxScaling:
        """The paper's figure 1: a margin of 3 for every role."""
        return cls(margin_input=3, margin_weight=3, margin_grad_output=3)

    def margin(self, role: Role | str) -> int:
        """The binary orders of magnitude that `role`'s scale stays below the largest possible one."""
        return {
            Role.INPUT: self.margin_input,
            Role.WEIGHT: self.margin_weight,
            Role.GRAD_OUTPUT: self.margin_grad_output,
        }[parse_role(role)]

    @property
    def power_of_two(self) -> bool:
        """Whether every scale is a power of two."""
        return True


@dataclass(frozen=True)
class ConstantScaling:
    """FP8-CSCALE: the scale 2**scale_exp2 for every tensor of the run; arXiv 2309.17224.

    `input`, `weight` and `grad_output` replace `scale_exp2` for their role. No amax is needed before the cast: one
    pass over the data. Values beyond the range clip (`overflow`), small ones vanish (`underflow`).
    """

    scale_exp2: int = 0
    input: int | None = None
    weight: int | None = None
    grad_output: int | None = None

    def __post_init__(self) -> None:
        _require_int("scale_exp2", self.scale_exp2, -MAX_SCALE_EXP2, MAX_SCALE_EXP2)
        for role in Role:
            _require_int(role.value, self.exponent(role), -MAX_SCALE_EXP2, MAX_SCALE_EXP2)

    def exponent(self, role: Role | str) -> int:
        """The scale_exp2 of `role`."""
        own = {Role.INPUT: self.input, Role.WEIGHT: self.weight, Role.GRAD_OUTPUT: self.grad_output}[parse_role(role)]
        return self.scale_exp2 if own is None else own

    def margin(self, role: Role | str) -> int:
        """0: a constant keeps no margin to an amax it does not look at."""
        return 0

    @property
    def power_of_two(self) -> bool:
        """Whether every scale is a power of two."""
        return True


@dataclass(frozen=True)
class CurrentScaling:
    """Transformer Engine's current scaling and torchao's tensorwise one: scale = max / amax in float32, just in time.

    With `power_of_two` the scale's mantissa is cleared, which rounds it down (Transformer Engine's rule).
    """

    power_of_two: bool = False

    def margin(self, role: Role | str) -> int:
        """0: the largest element lands on the format's maximum."""
        return 0


@dataclass(frozen=True)
class DelayedScaling:
    """Transformer Engine's delayed scaling: the scale comes from the amaxes of the last `history_len` casts.

    A cast uses the scale that the casts before it left, and then leaves one itself: max / 2**margin / amax, where amax
    is the largest of the history (`algo="max"`) or its newest entry (`"most_recent"`). The first scale is 1. The state
    lives in buffers of the module. One pass over the data; a tensor larger than its history clips.
    """

    history_len: int = 1024
    algo: Literal["max", "most_recent"] = "max"
    margin_bits: int = 0
    power_of_two: bool = False

    def __post_init__(self) -> None:
        _require_int("history_len", self.history_len, 1, 1 << 20)
        _require_int("margin_bits", self.margin_bits, -64, 64)
        if self.algo not in ("max", "most_recent"):
            raise ValueError(f"algo is {self.algo!r}; choose 'max' or 'most_recent'")

    def margin(self, role: Role | str) -> int:
        """`margin_bits`, the same for every role."""
        return self.margin_bits


Recipe = AmaxScaling | ConstantScaling | CurrentScaling | DelayedScaling
RECIPES: dict[str, type[Recipe]] = {
    recipe.__name__: recipe for recipe in (AmaxScaling, ConstantScaling, CurrentScaling, DelayedScaling)
}


@functools.lru_cache(maxsize=256)
def parse_recipe(text: str) -> Recipe:
    """The recipe that prints itself as `text`.

    Raises:
        ValueError: `text` is not the name of a recipe followed by its arguments.
    """
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not a call with named arguments")
        kind = RECIPES[call.func.id]
        return kind(**{str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords})
    except (SyntaxError, KeyError, TypeError, ValueError) as error:
        example = repr(AmaxScaling())
        raise ValueError(
            f"recipe {text!r} cannot be read ({error}); expected {', '.join(RECIPES)} and its arguments: {example}"
        ) from None
