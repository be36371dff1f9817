"""A bad network between two network namespaces: packets are late, some are lost, and it can be cut.

`tc netem` does the same where the kernel has it; ours carries the packets itself. Each end is a TUN device, which hands
every IP packet to this process; it delays them, drops some by a seeded chance, and writes the rest to the other end.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import secrets
import selectors
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001


def unavailable() -> str:
    """Why there can be no network namespaces here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path("/dev/net/tun").exists():
        return "/dev/net/tun is missing"
    return ""


class Namespace:
    """A network namespace of its own, with a loopback; `inside` goes before a command that is to run there."""

    def __init__(self) -> None:
        self.name = f"fp8scope-{secrets.token_hex(4)}"
        _ip("netns", "add", self.name)
        _ip("-n", self.name, "link", "set", "lo", "up")

    @property
    def inside(self) -> tuple[str, ...]:
        return "ip", "netns", "exec", self.name

    def remove(self) -> None:
        _ip("netns", "del", self.name)


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Namespace]]:
    """So many namespaces, removed at the end."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            made.append(Namespace())
            stack.callback(made[-1].remove)
        yield made


class LossyLink:
    """Connects two namespaces: `near` has the address `network`.1 there, `far` has `network`.2."""

    def __init__(
        self, near: Namespace, far: Namespace, network: str, *, delay_s: float, loss: float, seed: int
    ) -> None:
        self.cut = False
        self.carried = self.lost = 0
        self._delay_s = delay_s
        self._loss = loss
        self._chance = random.Random(seed)
        self._ends = [_tun(namespace, f"{network}.{host}/24") for host, namespace in enumerate([near, far], start=1)]
        self._closing = False
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        for end in self._ends:
            os.close(end)

    def _carry(self) -> None:
        other = dict(zip(self._ends, reversed(self._ends), strict=True))
        under_way: list[tuple[float, int, int, bytes]] = []
        with selectors.DefaultSelector() as waiting:  # not select(), which knows 1,024 descriptors of a process
            for end in self._ends:
                waiting.register(end, selectors.EVENT_READ, end)
            while not self._closing:
                wait_s = min(0.05, max(0.0, under_way[0][0] - time.monotonic())) if under_way else 0.05
                for ready, _ in waiting.select(wait_s):
                    self._take(ready.data, other[ready.data], under_way)
                while under_way and under_way[0][0] <= time.monotonic():
                    _, _, end, packet = heapq.heappop(under_way)
                    with contextlib.suppress(OSError):  # the namespace goes away while a packet is under way
                        os.write(end, packet)

    def _take(self, end: int, other: int, under_way: list[tuple[float, int, int, bytes]]) -> None:
        packet = os.read(end, 65536)
        if self.cut or self._chance.random() < self._loss:
            self.lost += 1
            return
        self.carried += 1
        heapq.heappush(under_way, (time.monotonic() + self._delay_s, self.carried, other, packet))


def _tun(namespace: Namespace, address: str) -> int:
    """A TUN device in the namespace; the descriptor, which stays here, reads and writes its packets."""
    name = f"f8s{secrets.token_hex(4)}"
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN_NO_PI))
    _ip("link", "set", name, "netns", namespace.name)
    _ip("-n", namespace.name, "address", "add", address, "dev", name)
    _ip("-n", namespace.name, "link", "set", name, "up")
    return descriptor


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)
