"""The command `fp8scope advise`: what a stored run says about constant scales and stale ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from fp8scope_collector.advisers.constant_scale import ConstantAdvice, advise_constant
from fp8scope_collector.advisers.history import histories
from fp8scope_collector.advisers.refresh import RefreshAdvice, advise_refresh
from fp8scope_collector.config import ConfigError
from fp8scope_collector.storage.reader import Reader


def advice_of(url: str, ref: str, *, as_json: bool) -> Iterator[str]:
    """The lines to print.

    Raises:
        ConfigError: the run has no rows that say how large its tensors were.
        StorageError, RunNotFound: as `Reader`.
    """
    reader = Reader(url)
    run = reader.run(ref)
    tensors = histories(reader, run.id)
    constant, refresh = advise_constant(tensors), advise_refresh(tensors)
    if not constant:
        raise ConfigError(f"run {ref!r} has no rows with amax, numel and sum_sq; there is nothing to advise on")
    if as_json:
        advice = {
            "constant": list(map(dataclasses.asdict, constant)),
            "refresh": list(map(dataclasses.asdict, refresh)),
        }
        yield json.dumps({"run": run.ref, **advice}, indent=2)
        return
    steps = max(tensor.steps.size for tensor in tensors)
    yield f"{run.ref}: {len(tensors)} tensors, {steps} recorded steps"
    yield ""
    yield "A constant scale (ConstantScaling), as scale_exp2:"
    yield from map(_constant_line, constant)
    if refresh:
        yield ""
        yield "A scale that is kept for several steps:"
        yield from map(_refresh_line, refresh)


def _constant_line(advice: ConstantAdvice) -> str:
    who = "all roles" if advice.role is None else str(advice.role)
    lower, upper = advice.lower, advice.upper
    if advice.empty:
        return f"  {who:<12} none: {lower.tensor} needs {lower.scale_exp2}, {upper.tensor} bears {upper.scale_exp2}"
    return (
        f"  {who:<12} {lower.scale_exp2} to {upper.scale_exp2}  (above, {upper.tensor} clips; below, {lower.tensor} "
        f"vanishes; nothing at all clips up to {advice.never_clips.scale_exp2})"
    )


def _refresh_line(advice: RefreshAdvice) -> str:
    longer = next((interval for interval in advice.clipped_steps if interval > advice.interval), None)
    beyond = "" if longer is None else f"; every {longer}: {advice.clipped_steps[longer]:.2%} of its steps would clip"
    return (
        f"  {advice.role!s:<12} every {advice.interval} steps  ({advice.flips_per_step:.3f} flips a step, drift "
        f"{advice.drift:+.0f} bits{beyond})"
    )
