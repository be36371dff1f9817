"""Where the collectors are: `HOST:PORT`, several with commas, for trainer, sender and command line alike."""

from __future__ import annotations

import re

DEFAULT_COLLECTOR = "127.0.0.1:4327"

_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):(?P<port>[0-9]{1,5})")


def parse_addresses(text: str) -> tuple[str, ...]:
    """The addresses in `text`, in the order in which they are tried.

    Raises:
        ValueError: one of them is no HOST:PORT.
    """
    addresses = tuple(part.strip() for part in text.split(",") if part.strip())
    if not addresses:
        raise ValueError("collector is empty; expected HOST:PORT[,HOST:PORT], for example 127.0.0.1:4327")
    for address in addresses:
        match = _ADDRESS.fullmatch(address)
        if match is None or not 0 < int(match["port"]) < 65536:
            raise ValueError(
                f"collector address {address!r} is no HOST:PORT; write for example 127.0.0.1:4327 or [::1]:4327, "
                "without http://, several separated by commas"
            )
    return addresses
