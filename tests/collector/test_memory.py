"""What a collector does not hold on to. Most of it is a process's affair, so it is seen in one of its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import weakref
from typing import Any

import numpy as np
import pytest

from fp8scope_collector.limits import Limits
from fp8scope_collector.memory import clean_mappings
from fp8scope_collector.messages import Batch, Source
from fp8scope_collector.metrics import Metrics
from fp8scope_collector.server import TelemetryService
from fp8scope_collector.turns import Lane
from fp8scope_protos.v1 import telemetry_pb2 as pb

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is asked for in another way")

SMAPS = """\
1000-3000 r-xp 00000000 fe:00 11 /lib/libcode.so
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
3000-4000 r--p 00002000 fe:00 11 /lib/libcode.so
Rss:                   4 kB
Anonymous:             4 kB
4000-6000 rw-p 00003000 fe:00 11 /lib/libcode.so
Anonymous:             0 kB
6000-7000 r--p 00000000 fe:00 12                         /lib/with a space.so
Anonymous:             0 kB
7000-8000 r--s 00000000 fe:00 13                         /data/shared
Anonymous:             0 kB
8000-9000 r-xp 00000000 00:00 0                          [vdso]
Anonymous:             0 kB
9000-a000 r--p 00000000 00:00 0
Anonymous:             0 kB
"""


def test_only_what_a_file_still_has_is_let_go() -> None:
    assert clean_mappings(SMAPS) == [(0x1000, 0x2000), (0x6000, 0x1000)]


@linux
def test_what_only_the_start_has_used_leaves_memory_and_comes_back_when_it_is_used() -> None:
    before, after, total, watched = run("""
        import chdb, gc
        from fp8scope_collector.memory import forget_start
        from pathlib import Path

        def of_files():
            return int(next(line for line in Path("/proc/self/status").open() if "RssFile" in line).split()[1]) // 1024

        ask = chdb.connect(":memory:")
        question = "SELECT sum(number) FROM numbers(1000)"
        ask.query(question)
        print(of_files())
        forget_start()
        print(of_files())
        print(int(str(ask.query(question))))
        print(len(gc.get_objects()))
    """)

    assert after < before / 2
    assert total == 499_500
    assert watched < 1000, "objects of the start are looked through for garbage"


@linux
def test_all_threads_have_one_heap_and_large_arrays_are_not_in_it() -> None:
    with_large, with_small, heaps = run("""
        import ctypes, tempfile, threading
        import numpy as np
        from fp8scope_collector.memory import keep_one_heap

        libc = ctypes.CDLL(None)
        libc.fopen.restype = ctypes.c_void_p
        libc.fclose.argtypes, libc.malloc_info.argtypes = [ctypes.c_void_p], [ctypes.c_int, ctypes.c_void_p]

        def said():
            with tempfile.NamedTemporaryFile("r") as file:
                stream = libc.fopen(file.name.encode(), b"w")
                libc.malloc_info(0, stream)
                libc.fclose(stream)
                return file.read()

        def of_the_kernel():
            return int(said().rpartition('type="mmap" count="')[2].partition('"')[0])

        def work():
            gate.wait()
            kept = [bytes(1000) for _ in range(1000)]
            gate.wait()

        keep_one_heap()
        np.ones(1 << 22, np.uint8)  # is freed at once, from which glibc would learn
        before = of_the_kernel()
        large = np.ones(1 << 21, np.uint8)
        print(of_the_kernel() - before)
        small = np.ones(1 << 18, np.uint8)  # as the columns of a batch are
        print(of_the_kernel() - before)
        gate = threading.Barrier(8)
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(said().count("<heap nr="))
    """)

    assert heaps == 1
    assert (with_large, with_small) == (1, 1)


@linux
def test_what_arrow_has_freed_goes_back_to_the_kernel() -> None:
    peak, kept = run("""
        import numpy as np
        import pyarrow as pa
        from fp8scope_collector.memory import share_heap_with_arrow
        from pathlib import Path

        def resident():
            return int(next(line for line in Path("/proc/self/status").open() if "VmRSS" in line).split()[1]) // 1024

        share_heap_with_arrow()
        ones, before = pa.array(np.ones(1 << 16)), resident()
        arrays = [pa.concat_arrays([ones] * 4) for _ in range(50)]
        print(resident() - before)
        del arrays
        print(resident() - before)
    """)

    assert peak >= 100
    assert kept < 10


def test_a_stream_that_waits_for_its_next_message_holds_nothing_of_the_last(wire: Any) -> None:
    source = Source(1, 1, "run", 0, 1, 0, False, np.arange(6), np.tile(np.arange(3, dtype=np.int8), 2), np.full(6, 8.8))
    held: list[weakref.ref[Batch]] = []

    class Queue:
        async def put(self, batch: Batch, wire_bytes: int, lane: Lane, *, more: bool = False) -> None:
            held.append(weakref.ref(batch))

    class Context:
        async def read(self) -> object:
            if held:
                await asyncio.get_running_loop().create_future()
            return pb.ClientMessage(stats=wire.stats(1, wire.columns(1)))

    async def read_one() -> Batch | None:
        queue: Any = Queue()
        context: Any = Context()
        service = TelemetryService(queue, Metrics("0"), Limits(), 8, None)
        reading = asyncio.create_task(service._read(context, Lane(source), None))
        while not held:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        found = held[0]()
        reading.cancel()
        return found

    assert asyncio.run(read_one()) is None


def run(script: str) -> list[int]:
    """What it prints, a number a line."""
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert said.returncode == 0, said.stderr
    return [int(line) for line in said.stdout.split()]
