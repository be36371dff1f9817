"""Damage to bytes, as networks, disks and people who try do it: for fuzzing what parses them."""

from __future__ import annotations

import random
from collections.abc import Sequence

_NUMBERS = (
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x80\x80\x80\x80\x08",
    b"\x00",
    b"\x7f",
    b"\xff\xff\xff\xff\x0f",
)


def mutated(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """`data` with one to four changes: flipped bits, other bytes, pieces cut, doubled or taken from `others`."""
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        place = chance.randrange(len(damaged) + 1)
        length = min(len(damaged) - place, int(chance.expovariate(0.1)))
        match chance.randrange(7):
            case 0 if damaged:
                damaged[place % len(damaged)] ^= 1 << chance.randrange(8)
            case 1 if damaged:
                damaged[place % len(damaged)] = chance.randrange(256)
            case 2:
                del damaged[place : place + length + 1]
            case 3:
                damaged[place:place] = damaged[place : place + length]
            case 4:
                del damaged[place:]  # cut short
            case 5:
                damaged[place : place + chance.randrange(3)] = chance.choice(_NUMBERS)  # lengths and numbers
            case _:
                other = chance.choice(others)
                start = chance.randrange(len(other) + 1)
                damaged[place:place] = other[start : start + length]
    return bytes(damaged)
