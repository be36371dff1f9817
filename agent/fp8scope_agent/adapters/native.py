"""fp8core's own `Fp8Linear`: its layers write their statistics themselves, here they are told where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fp8core import Fp8Linear, StatsArena
from fp8core.records import Role

from .tap import Cast


def find(name: str, module: nn.Module) -> NativeLayer | None:
    """The layer, if `module` is an Fp8Linear."""
    return NativeLayer(module) if isinstance(module, Fp8Linear) else None


@dataclass(frozen=True)
class NativeLayer:
    """An Fp8Linear."""

    module: Fp8Linear

    @property
    def module_class(self) -> str:
        """Fp8Linear, or the name of a class made of it."""
        return type(self.module).__name__

    def cast(self, role: Role) -> Cast:
        """As its recipe says."""
        format_name, margin = self.module.stats_spec(role)
        return Cast(format_name, str(self.module.recipe_by_role[role]), margin)

    def bind(self, arena: StatsArena, rows: Mapping[Role, int]) -> None:
        """Its casts write there."""
        self.module.bind_stats(arena, rows)

    def release(self, arena: StatsArena) -> None:
        """Nothing: the handle of a closed arena writes to nowhere, and taking it away would compile anew."""
