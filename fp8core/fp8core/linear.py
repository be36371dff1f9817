"""`Fp8Linear`: an `nn.Linear` whose three GEMMs run in FP8.

Same parameters, same names, same shapes; what it adds are settings, and buffers that do not enter the state_dict
except under `DelayedScaling`, whose amax history belongs to a checkpoint. `convert_to_fp8` makes it out of a module
in place.

Precision: x and w are cast to FP8 from the dtype they come in, whatever autocast says, so that they are rounded once;
the result has autocast's dtype where it is enabled, else x's. Gradients have the dtypes of x and w: with float32 master
weights dw stays the float32 sum that the GEMM computed. A bias is added in the result's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fp8core.autograd import Cast, fp8_matmul
from fp8core.device_scaling import new_state
from fp8core.formats import HYBRID, FormatPair, Fp8Format
from fp8core.quantize import INPUT_DTYPES
from fp8core.recipes import AmaxScaling, DelayedScaling, Recipe
from fp8core.records import Role
from fp8core.stats import NO_ARENA, StatsArena


class Fp8Linear(nn.Linear):
    """y = x @ w.T + b with x, w and dy cast to FP8, each by its recipe and into its format.

    Only a module in training mode writes statistics and moves the state of delayed scaling. Inputs may have any number
    of leading dimensions, none included, and any size of them; in_features and out_features may be any number
    (docs/adr/0005: padded where the hardware wants multiples of 16).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
        formats: FormatPair = HYBRID,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.set_recipe(AmaxScaling() if recipe is None else recipe, formats)

    def set_recipe(
        self,
        recipe: Recipe,
        formats: FormatPair,
        *,
        role_recipes: Mapping[Role, Recipe] | None = None,
        role_formats: Mapping[Role, Fp8Format] | None = None,
    ) -> None:
        """Starts anew with this recipe and these formats, some roles with their own; unbinds the statistics.

        Raises:
            TypeError: the weight is not bfloat16, float16 or float32.
        """
        if self.weight.dtype not in INPUT_DTYPES:
            raise TypeError(f"weight is {self.weight.dtype}; FP8 is cast from bfloat16, float16 or float32")
        self.recipe = recipe
        self.formats = formats
        self.recipe_by_role = {role: (role_recipes or {}).get(role, recipe) for role in Role}
        self.format_by_role = {role: (role_formats or {}).get(role, formats.fmt(role)) for role in Role}
        self.power_of_two = all(own.power_of_two for own in self.recipe_by_role.values())
        # Texts, because Dynamo cannot print a dataclass.
        self._cast_texts = {
            role: (repr(self.recipe_by_role[role]), role.value, self.format_by_role[role].name) for role in Role
        }
        for role in Role:
            own = self.recipe_by_role[role]
            state = new_state(own, self.weight.device) if isinstance(own, DelayedScaling) else None
            self.register_buffer(f"fp8_state_{role}", state)
            slot = torch.zeros((), dtype=torch.int64, device=self.weight.device)
            self.register_buffer(f"fp8_slot_{role}", slot, persistent=False)
        self.unbind_stats()

    def bind_stats(self, arena: StatsArena, slots: Mapping[Role, int]) -> None:
        """From now on the casts of the roles in `slots` write their statistics into these rows of `arena`.

        Raises:
            ValueError: the arena is on another device than the weight, or a slot is not in it.
        """
        if arena.device != self.weight.device:
            raise ValueError(f"the arena is on {arena.device}, the weight on {self.weight.device}; they must be equal")
        outside = {str(role): slot for role, slot in slots.items() if not 0 <= slot < arena.slots}
        if outside:
            raise ValueError(f"slots {outside} are not in the arena, which has {arena.slots}")
        self.unbind_stats()
        for role, slot in slots.items():
            self.get_buffer(f"fp8_slot_{role}").fill_(slot)
            self._arenas[role] = arena.handle

    def unbind_stats(self) -> None:
        """Statistics go to nowhere from now on."""
        self._arenas = dict.fromkeys(Role, NO_ARENA)

    def stats_spec(self, role: Role) -> tuple[str, int]:
        """The name of `role`'s format and its margin."""
        return self.format_by_role[role].name, self.recipe_by_role[role].margin(role)

    def forward(self, x: Tensor) -> Tensor:
        """x @ w.T + b for x [..., in_features].

        Raises:
            ValueError: x has another number of features.
        """
        *leading, features = x.shape
        if features != self.weight.shape[1]:
            raise ValueError(f"x is {list(x.shape)}; expected {self.weight.shape[1]} features in the last dimension")
        out_dtype = result_dtype(x)
        y = fp8_matmul(
            x.reshape(math.prod(leading), features),
            self.weight,
            (self._cast(Role.INPUT), self._cast(Role.WEIGHT), self._cast(Role.GRAD_OUTPUT)),
            out_dtype=out_dtype,
            power_of_two=self.power_of_two,
        ).view(*leading, self.weight.shape[0])
        return y if self.bias is None else y + self.bias.to(out_dtype)

    def _cast(self, role: Role) -> Cast:
        recipe, name, fmt = self._cast_texts[role]
        return Cast(
            recipe=recipe,
            role=name,
            fmt=fmt,
            state=self._buffers[f"fp8_state_{name}"],
            arena=self._arenas[role] if self.training else NO_ARENA,
            slot=self._buffers[f"fp8_slot_{name}"],
            update_state=self.training,
        )

    def extra_repr(self) -> str:
        """`nn.Linear`'s, recipe and formats, and what a role has of its own."""
        parts = [super().extra_repr(), f"recipe={self.recipe!r}", f"formats={self.formats}"]
        for role in Role:
            if self.recipe_by_role[role] != self.recipe:
                parts.append(f"{role}: {self.recipe_by_role[role]!r}")
            if self.format_by_role[role] != self.formats.fmt(role):
                parts.append(f"{role}: {self.format_by_role[role]}")
        return ", ".join(parts)

    def reset_parameters(self) -> None:
        """New random parameters, as `nn.Linear`'s, and no history."""
        super().reset_parameters()
        recipes: dict[Role, Recipe] = getattr(self, "recipe_by_role", {})  # nn.Linear's __init__ comes here first
        for role, own in recipes.items():
            if isinstance(own, DelayedScaling):
                self.get_buffer(f"fp8_state_{role}").copy_(new_state(own))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint of nn.Linear, or of another recipe, has no amax history, or one that is not wanted.
        for role in Role:
            name = f"fp8_state_{role}"
            state = self._buffers[name]
            if state is None:
                state_dict.pop(prefix + name, None)
            else:
                state_dict.setdefault(prefix + name, state)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a module (deepcopy, pickle) is another layer: it must not write into this one's rows.
        return {**self.__dict__, "_arenas": dict.fromkeys(Role, NO_ARENA)}


def result_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is enabled on x's device, else x's."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
