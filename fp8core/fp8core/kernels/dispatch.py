"""Which implementation runs a kernel: Triton on CUDA, C++ on a CPU with a compiler, plain torch elsewhere.

FP8SCOPE_KERNEL=eager, cpu or triton overrides the choice. It is read once per device type.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Protocol, cast

import torch
from torch import Tensor

from fp8core.formats import Fp8Format
from fp8core.kernels import eager

ENV = "FP8SCOPE_KERNEL"
_DEVICES = {"eager": "any device", "cpu": "CPU tensors", "triton": "CUDA tensors"}


class Kernels(Protocol):
    """What each of `eager`, `cpu` and `triton` offers; the contract is in `eager`'s docstrings."""

    __name__: str

    def amax(self, x: Tensor) -> Tensor:
        """See `eager.amax`."""
        ...

    def cast(
        self,
        x: Tensor,
        scale: Tensor,
        fmt: Fp8Format,
        *,
        words: Tensor | None = None,
        slot: Tensor | None = None,
        overwrite: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See `eager.cast`."""
        ...

    def count(
        self, x: Tensor, scale: Tensor, fmt: Fp8Format, *, words: Tensor, slot: Tensor, overwrite: bool
    ) -> Tensor:
        """See `eager.count`."""
        ...

    def count_by_amax(
        self,
        x: Tensor,
        fmt: Fp8Format,
        margin: int,
        clamp: int,
        *,
        words: Tensor,
        slot: Tensor,
        overwrite: bool,
        last_scales: Tensor,
    ) -> None:
        """See `eager.count_by_amax`."""
        ...

    def dequantize(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """See `eager.dequantize`."""
        ...

    def exponent_histogram(self, x: Tensor) -> Tensor:
        """See `eager.exponent_histogram`."""
        ...


@functools.cache
def kernels_for(device_type: str) -> Kernels:
    """The kernels for tensors of a device type ("cpu", "cuda", "meta", ...).

    Raises:
        ValueError: FP8SCOPE_KERNEL names no kernel.
        RuntimeError: it names one that cannot run here.
    """
    return _load(os.environ.get(ENV, ""), device_type)[0]


def why(device_type: str) -> str:
    """The name of the kernels chosen for a device type, and the reason where it is not the fastest one."""
    try:
        kernels, reason = _load(os.environ.get(ENV, ""), device_type)
    except (ValueError, RuntimeError) as error:
        return f"none ({error})"
    return kernels.__name__.rpartition(".")[2] + (f" ({reason})" if reason else "")


def _load(wanted: str, device_type: str) -> tuple[Kernels, str]:
    if wanted not in ("", *_DEVICES):
        raise ValueError(f"{ENV}={wanted!r} is unknown; choose {', '.join(_DEVICES)} or leave it unset")
    best = {"cuda": "triton", "cpu": "cpu"}.get(device_type, "eager")
    if wanted == "eager" or best == "eager":
        # meta tensors have no data: there the eager kernels are the only ones, whatever is asked for.
        if wanted not in ("", "eager") and device_type != "meta":
            raise RuntimeError(
                f"{ENV}={wanted} is for {_DEVICES[wanted]}, but a tensor is on {device_type!r}; unset it"
            )
        return cast(Kernels, eager), f"{ENV}=eager" if wanted else ""
    if wanted not in ("", best):
        raise RuntimeError(f"{ENV}={wanted} is for {_DEVICES[wanted]}, but a tensor is on {device_type!r}; unset it")
    module, reason = _import(best)
    if module is not None:
        return module, ""
    if wanted:
        raise RuntimeError(f"{ENV}={wanted}, but {reason}; unset it to take the best that runs")
    return cast(Kernels, eager), reason


def _import(name: str) -> tuple[Kernels | None, str]:
    """The kernel module, or None and why it cannot run here."""
    try:
        module = importlib.import_module(f"fp8core.kernels.{name}")
    except ImportError as error:
        return None, str(error)
    reason = module.unavailable_reason()
    return (None, reason) if reason else (cast(Kernels, module), "")
