"""Gives memory back that a collector holds and does not use: on Linux with glibc."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from pathlib import Path

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8  # of glibc's malloc.h
_MADV_DONTNEED = 4  # of Linux' mman.h
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-[x-]p \S+ \S+ \S+ +/")


def keep_one_heap() -> None:
    """Makes all threads allocate from one heap, and arrays of more than 1 MiB from the kernel.

    What one thread makes here another frees: heaps of their own kept 170 MiB. Without a threshold of ours glibc raises
    its own to the largest array that it has seen freed, and small objects then lie between those in the heap.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 << 20)


def share_heap_with_arrow() -> None:
    """Makes Arrow allocate as everything else does: an allocator of its own keeps 20 MiB of what it has freed."""
    import pyarrow as pa  # starts a thread with a heap of its own, where that may still be

    pa.set_memory_pool(pa.system_memory_pool())


def forget_start() -> None:
    """Lets go of code and constants of libraries that only the start has used: of chDB's alone 120 MiB.

    They are still in the kernel's file cache, and what is needed comes back, sixteen pages at a time, when it is
    touched. Pages that this process has written are left alone: those come from no file. Objects that the start has
    made, which are modules for the most part, stay for good, and are not looked through for garbage again.
    """
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start, size in clean_mappings(Path("/proc/self/smaps").read_text()):
            libc.madvise(start, size, _MADV_DONTNEED)


def clean_mappings(smaps: str) -> list[tuple[int, int]]:
    """Address and size of each read-only mapping of a file that has none but the file's own pages."""
    found: list[tuple[int, int]] = []
    mapping: re.Match[str] | None = None
    for line in smaps.splitlines():
        if line.startswith("Anonymous:"):
            if mapping and line.split()[1] == "0":
                start, end = int(mapping[1], 16), int(mapping[2], 16)
                found.append((start, end - start))
            mapping = None
        elif new := _MAPPING.match(line):
            mapping = new
    return found
