"""What the slots of a source are: which layer and tensor each number means, and how it is quantised."""

from __future__ import annotations

from dataclasses import dataclass

from fp8core.records import Role
from fp8scope_protos.v1 import telemetry_pb2 as pb

_ROLES = {
    Role.INPUT: pb.ROLE_INPUT,
    Role.WEIGHT: pb.ROLE_WEIGHT,
    Role.GRAD_OUTPUT: pb.ROLE_GRAD_OUTPUT,
}


@dataclass(frozen=True)
class SlotInfo:
    """One slot. `format` is the name of an fp8core format, `margin` the bits of headroom that the recipe leaves."""

    slot: int
    layer: str
    role: Role
    format: str
    recipe: str
    margin: int
    module_class: str
    in_features: int
    out_features: int

    def to_message(self) -> pb.Slot:
        """This slot as the wire has it."""
        return pb.Slot(
            slot=self.slot,
            layer=self.layer,
            role=_ROLES[self.role],
            format=self.format,
            recipe=self.recipe,
            margin=self.margin,
            module_class=self.module_class,
            in_features=self.in_features,
            out_features=self.out_features,
        )
