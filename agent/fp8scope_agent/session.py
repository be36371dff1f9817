"""`attach`: the wiring of the agent's parts, and nothing else.

model ─ adapters ─ arenas ─ ring ─ drain ─ recorder ─ spool ─ (process) sender ─ stream ─ collector
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fp8core.recipes import Recipe
from fp8scope_protos.v1 import telemetry_pb2 as pb

from . import __version__
from . import config as configuration
from .adapters import native
from .adapters.tap import Finder, Tap, bind
from .drain import Drain
from .environment import describe
from .monitor import Monitor
from .notices import Drops, Notices
from .recorder import Recorder
from .ring import Ring
from .sampling import Sampler
from .snapshot import Summary

if TYPE_CHECKING:
    from .adapters.inspect import InspectLogger
    from .adapters.shadow import Shadow


def attach(
    model: nn.Module,
    *,
    run: str,
    project: str | None = None,
    collector: str | None = None,
    spool_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    config: object = None,
    tags: Sequence[str] | None = None,
    notes: str | None = None,
    preset: str | None = None,
    every: int | None = None,
    histogram_every: int | None = None,
    burst: int | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    settings: str | os.PathLike[str] | None = None,
    shadow: Recipe | Shadow | None = None,
    inspect: InspectLogger | None = None,
) -> Monitor:
    """A monitor that records every FP8 linear layer of `model` from now on; docs/agent.md explains each argument.

    Call it once the model is converted and on its device, in every rank; then `Monitor.step` after each optimizer
    step. With `every=N` the statistics of every N-th step are recorded, and only those are computed; scalars always
    are. It needs no collector: what is recorded waits on disk. What is no argument here comes from FP8SCOPE_*
    variables, then from the YAML file `settings`.

    With `shadow=AmaxScaling()` plain `nn.Linear`s are recorded, too, as if that recipe cast them: what they compute
    does not change by a bit. `Shadow(...)` says formats and which layers.

    Raises:
        ValueError: an argument, a variable or a setting has no possible value.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    resolved = configuration.resolve(
        run=run,
        project=project,
        collector=collector,
        spool_dir=spool_dir,
        token=token,
        rank=rank,
        world_size=world_size,
        config=config,
        tags=tags,
        notes=notes,
        preset=preset,
        every=every,
        histogram_every=histogram_every,
        burst=burst,
        include=include,
        exclude=exclude,
        settings=settings,
        distributed=_process_group(),
    )
    notices, drops = Notices(), Drops()
    tap = bind(model, [_where(resolved.wants, find) for find in _finders(shadow)])
    if inspect is not None:
        tap = _with_named_layers(tap, model, inspect, resolved.wants, drops, notices)
    if not tap.slots:
        notices.warn(
            "no slots",
            f"{type(model).__name__} has no FP8 linear layer: only scalars are recorded. Convert it first, with "
            "fp8core.convert_to_fp8(model), and attach to what that returns; or see what FP8 would do, with "
            "attach(model, shadow=fp8core.AmaxScaling()).",
        )
    for reason, names in tap.left_alone.items():
        notices.warn(reason, f"{len(names)} layers are not recorded, {names[0]!r} is the first: {reason}")
    recorder = Recorder(
        resolved.spool_dir,
        _open_message(resolved, tap, model),
        max_bytes=resolved.spool_bytes,
        drops=drops,
        notices=notices,
    )
    ring = Ring(tap.arenas)
    sampler = Sampler(resolved.sampling, [slot.layer for slot in tap.slots])
    drain = Drain(ring, recorder, tap.slots_of, Summary(tap.slots), sampler, resolved, drops, notices)
    return Monitor(
        tap,
        ring,
        drain,
        sampler=sampler,
        addresses=resolved.addresses,
        drops=drops,
        notices=notices,
        configured=resolved.config_json,
        inspect=inspect,
    )


def _with_named_layers(
    tap: Tap,
    model: nn.Module,
    inspect: InspectLogger,
    wanted: Callable[[str], bool],
    drops: Drops,
    notices: Notices,
) -> Tap:
    """`tap` and the slots whose statistics come by nvdlfw-inspect, which have no rows in an arena."""
    from .adapters.inspect import slots_of

    named = tuple(slots_of(model, wanted, first=len(tap.slots)))
    inspect.connect(named, drops, notices)
    return dataclasses.replace(tap, slots=tap.slots + named)


def _where(wanted: Callable[[str], bool], find: Finder) -> Finder:
    """`find`, for the layers whose names are wanted."""
    return lambda name, module: find(name, module) if wanted(name) else None


def _finders(shadow: Recipe | Shadow | None) -> list[Finder]:
    finders: list[Finder] = [native.find]
    if "torchao.float8.float8_linear" in sys.modules:  # else the model has none of its layers
        finders.append(_torchao_finder())
    if shadow is not None:
        from .adapters import shadow as shadowing  # loads torch.distributed.tensor

        finders.append(shadowing.finder(shadow if isinstance(shadow, shadowing.Shadow) else shadowing.Shadow(shadow)))
    return finders


def _torchao_finder() -> Finder:
    try:
        from .adapters import torchao
    except ImportError as error:
        why = f"this torchao is not one that the agent knows ({error})"
        return lambda name, module: why if type(module).__name__ == "Float8Linear" else None
    return torchao.find


def _open_message(settings: configuration.Settings, tap: Tap, model: nn.Module) -> pb.Open:
    return pb.Open(
        run=settings.run,
        project=settings.project,
        rank=settings.rank,
        world_size=settings.world_size,
        source_uuid=str(uuid.uuid4()),
        started_unix_ns=time.time_ns(),
        agent_version=__version__,
        slots=[slot.to_message() for slot in tap.slots],
        config_json=settings.config_json,
        environment=describe(list(dict.fromkeys(parameter.device for parameter in model.parameters()))),
        tags=settings.tags,
        notes=settings.notes,
    )


def _process_group() -> tuple[int, int] | None:
    """(rank, world size) of this process's torch.distributed group, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return None
