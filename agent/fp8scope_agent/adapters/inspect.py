"""Transformer Engine's statistics, by a logger for nvdlfw-inspect, the library that its debug features log through.

    logger = InspectLogger()
    debug_api.initialize(config_file="debug.yaml", feature_dirs=[...], statistics_logger=logger)
    debug_api.infer_and_assign_layer_names(model)
    with fp8scope.attach(model, run="te", inspect=logger) as monitor:
        ...  # the loop: debug_api.step() and monitor.step() after the optimizer's

What is logged carries the number of its iteration, which is its step here. Values are tensors on the device: they are
kept as they are, and copied with the monitor's next step. Nothing here waits for the device.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

from nvdlfw_inspect.logging import BaseLogger
from torch import Tensor, nn

from fp8core.formats import HYBRID
from fp8core.records import Role

from ..catalogue import SlotInfo
from ..notices import Drops, Notices
from ..ring import Report

MAX_WAITING = 1 << 16  # values between two steps: 1,680 slots with 39 each
_LONGEST_NAME = 200

# The tensors that it names, each in the row of the slot that it belongs to, with this before the statistic's name.
_TENSORS = {
    "activation": (Role.INPUT, ""),
    "weight": (Role.WEIGHT, ""),
    "gradient": (Role.GRAD_OUTPUT, ""),
    "output": (Role.GRAD_OUTPUT, "output_"),  # y: of dy's shape
    "wgrad": (Role.WEIGHT, "wgrad_"),
    "dgrad": (Role.INPUT, "dgrad_"),
}
# "_" is in layers, tensors and statistics alike: the last tensor in the name is the one that is meant.
_NAME = re.compile(rf"(?P<layer>.+)_(?P<tensor>{'|'.join(_TENSORS)})_(?P<statistic>.+)")


class InspectLogger(BaseLogger):  # type: ignore[misc]  # nvdlfw_inspect is not typed
    """Give it to `nvdlfw_inspect.api.initialize`, and to `attach(inspect=...)` once the layers have names."""

    def __init__(self) -> None:
        super().__init__()
        self._slot_of: dict[tuple[str, Role], int] = {}
        self._known: dict[str, tuple[int, str] | None] = {}
        self._waiting: deque[Report] = deque()
        self._drops = Drops()
        self._notices = Notices()

    def connect(self, slots: tuple[SlotInfo, ...], drops: Drops, notices: Notices) -> None:
        """From now on what is logged about these slots is kept for `take`."""
        self._slot_of = {(slot.layer, slot.role): slot.slot for slot in slots}
        self._known.clear()
        self._waiting.clear()
        self._drops, self._notices = drops, notices

    def disconnect(self) -> None:
        """What is logged from now on goes to nowhere."""
        self.connect((), self._drops, self._notices)

    def log_scalar(self, name: str, value: float | Tensor, iteration: int, **kwargs: object) -> None:
        """Keep one number, whose name is {layer}_{tensor}_{statistic}."""
        if not self._slot_of:
            return
        if name not in self._known:
            self._known[name] = self._parse(name)
        known = self._known[name]
        if known is None:
            return
        if len(self._waiting) == MAX_WAITING:
            self._waiting.popleft()
            self._drops.add("inspect_full", 1)
            self._notices.warn(
                "inspect_full",
                f"{MAX_WAITING} statistics of nvdlfw-inspect wait for a step: the oldest are dropped, and counted. Is "
                "monitor.step() called after each optimizer step?",
            )
        slot, statistic = known
        self._waiting.append(Report(int(iteration), slot, statistic, value))

    def take(self) -> list[Report]:
        """What was logged since the last call."""
        taken = list(self._waiting)
        self._waiting.clear()
        return taken

    def _parse(self, name: str) -> tuple[int, str] | None:
        match = _NAME.fullmatch(name)
        if match is not None and len(name) <= _LONGEST_NAME:
            role, prefix = _TENSORS[match["tensor"]]
            slot = self._slot_of.get((match["layer"], role))
            if slot is not None:
                return slot, prefix + match["statistic"]
        self._notices.warn(
            "inspect_unknown",
            f"nvdlfw-inspect logged {name[:_LONGEST_NAME]!r}, which belongs to no layer that the model had when it was "
            "attached: such statistics are not recorded. Call infer_and_assign_layer_names(model) before attach.",
        )
        return None


def slots_of(model: nn.Module, wanted: Callable[[str], bool], first: int) -> list[SlotInfo]:
    """The slots of the wanted layers that have a name for nvdlfw-inspect, from `first` on; LayerNormMLP has two layers.

    What the recipe is, Transformer Engine decides in each forward; the formats are those of its default.
    """
    slots: list[SlotInfo] = []
    for module in model.modules():
        own = getattr(module, "name", None)
        if not isinstance(own, str) or not own:
            continue
        for name, in_features, out_features in _layers(module, own):
            for role in Role if wanted(name) else ():
                slots.append(
                    SlotInfo(
                        slot=first + len(slots),
                        layer=name,
                        role=role,
                        format=HYBRID.fmt(role).name,
                        recipe="transformer_engine",
                        margin=0,
                        module_class=type(module).__name__,
                        in_features=in_features,
                        out_features=out_features,
                    )
                )
    return slots


def _layers(module: nn.Module, name: str) -> list[tuple[str, int, int]]:
    """(name, in_features, out_features) of the linear layers that `module` is."""
    sizes = [getattr(module, attribute, None) for attribute in ("in_features", "out_features")]
    if all(isinstance(size, int) for size in sizes):
        return [(name, *sizes)]  # type: ignore[list-item]  # both are int
    weights = [getattr(module, attribute, None) for attribute in ("fc1_weight", "fc2_weight")]
    return [
        (f"{name}.fc{number}", weight.shape[-1], weight.shape[0])
        for number, weight in enumerate(weights, start=1)
        if isinstance(weight, Tensor)
    ]
