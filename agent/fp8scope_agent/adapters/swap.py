"""A tap in a module that is not ours: its class becomes a subclass with a forward of our own, until it is released.

The class, because torch.compile traces it (it ignores hooks that come later), and because the module stays the same
object: parameters, names, hooks and references to it are kept. What a tap needs to know is in one plain attribute, no
buffer: it is in no state_dict, and no list of buffers (DDP's, an averaged model's) changes. A copy of the module, by
deepcopy or pickle, is of the class before, and records nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType
from torch.distributed.tensor import DTensor

from fp8core import StatsArena
from fp8core.device_scaling import new_state
from fp8core.quantize import observe_body
from fp8core.recipes import DelayedScaling, parse_recipe
from fp8core.records import Role

from .tap import Cast

_WIRES = "_fp8scope_wires"
_ORDINARY = (Tensor, nn.Parameter)
_tapped_classes: dict[tuple[type, type], type] = {}


class Wire(NamedTuple):
    """The arguments of `fp8core::observe` for one role, as a compiler can carry them."""

    recipe: str
    role: str
    fmt: str
    state: Tensor | None
    arena: int
    slot: Tensor

    def observe(self, x: Tensor) -> None:
        """Leave the statistics of `x` as the recipe would cast it.

        An ordinary tensor goes to the operation's body at once: through the dispatcher the call takes 70 us more when
        the caches are full of the model's data, as they are between two layers. Within torch.func.vmap nothing is
        observed, since the operation has no rule for it and would raise.
        """
        if torch.compiler.is_compiling() or type(x) not in _ORDINARY:
            torch.ops.fp8core.observe(x, *self)
        elif torch._C._functorch.peek_interpreter_stack() is None:
            observe_body(x, *self)
        elif all(level.key() != TransformType.Vmap for level in torch._C._functorch.get_interpreter_stack() or ()):
            torch.ops.fp8core.observe(x, *self)


class TappedLinear(nn.Linear):
    """A linear layer whose class was changed by `tap`."""

    untapped: ClassVar[type[nn.Linear]]
    _fp8scope_wires: dict[Role, Wire]

    def __deepcopy__(self, memo: dict[int, Any]) -> object:
        return copy.deepcopy(_untapped_twin(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Not __newobj__, for which pickle wants the object's own class.
        return object.__new__, (self.untapped,), _untapped_twin(self).__reduce_ex__(protocol)[2]


def tap(
    module: nn.Linear,
    mixin: type[TappedLinear],
    casts: Mapping[Role, Cast],
    arena: StatsArena,
    rows: Mapping[Role, int],
) -> None:
    """Let `mixin`'s forward run in `module`, with wires into these rows of `arena`."""
    wires = {}
    for role, row in rows.items():
        recipe = parse_recipe(casts[role].recipe)
        state = new_state(recipe, arena.device) if isinstance(recipe, DelayedScaling) else None
        slot = torch.full((), row, dtype=torch.int64, device=arena.device)
        wires[role] = Wire(casts[role].recipe, role.value, casts[role].format, state, arena.handle, slot)
    vars(module)[_WIRES] = wires
    if not isinstance(module, mixin):
        module.__class__ = _tapped_class(mixin, type(module))


def untap(module: nn.Linear, arena: StatsArena) -> None:
    """Undo `tap`, if it was the last one and nobody has changed the class since (FSDP2 does)."""
    wires = vars(module).get(_WIRES)
    if wires is None or any(wire.arena != arena.handle for wire in wires.values()):
        return
    tapped: Any = type(module)
    if isinstance(module, TappedLinear) and tapped is _tapped_class(tapped.__bases__[0], tapped.untapped):
        module.__class__ = tapped.untapped
        del vars(module)[_WIRES]


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor that tensor parallelism has split: no operation of ours takes the whole."""
    return x.to_local() if isinstance(x, DTensor) else x


def _tapped_class(mixin: Any, untapped: Any) -> Any:
    """One class for each pair: a compiler takes modules of different classes for different code."""
    key = (mixin, untapped)
    if key not in _tapped_classes:
        _tapped_classes[key] = type(f"{mixin.__name__}Of{untapped.__name__}", key, {"untapped": untapped})
    return _tapped_classes[key]


def _untapped_twin(module: TappedLinear) -> nn.Linear:
    """A module of the class before that shares everything with `module` but the wires."""
    twin: nn.Linear = object.__new__(module.untapped)
    vars(twin).update((name, value) for name, value in vars(module).items() if name != _WIRES)
    return twin
