"""What every script here needs to say a figure: on which machine it was measured, and how far it spread."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np


def machine(*packages: str) -> str:
    """The cores that we may use, the processor, Python's version and those of `packages`.

    With the processor's family and model: a virtual machine may call any generation "AMD EPYC".
    """
    cpuinfo = Path("/proc/cpuinfo")
    said = cpuinfo.read_text() if cpuinfo.exists() else ""
    known = dict(re.findall(r"(?m)^(model name|cpu family|model)\s*:\s*(.+)$", said))
    processor = platform.machine()
    if "model name" in known:
        processor = f"{known['model name']} (family {known.get('cpu family')}, model {known.get('model')})"
    versions = (f"Python {platform.python_version()}", *(f"{package} {version(package)}" for package in packages))
    return f"{len(os.sched_getaffinity(0))} cores of {processor}, {', '.join(versions)}"


def cell(seconds: Sequence[float]) -> str:
    """The median and the quartiles, in ms."""
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]) * 1e3
    return f"{median:.3g} ({low:.3g}-{high:.3g})"


def keep_freed_memory() -> None:
    """glibc's malloc neither maps large blocks by themselves nor gives memory back from now on: no page faults."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h's names for them
    for option in (trim_threshold, mmap_threshold):
        ctypes.CDLL(None).mallopt(option, 1 << 30)
