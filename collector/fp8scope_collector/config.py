"""How `fp8scope serve` was asked to run, checked: addresses, the database, and whether others may reach it."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field

from fp8scope_collector.limits import Limits


class ConfigError(Exception):
    """A setting that cannot be used; the text is for the user."""


@dataclass(frozen=True)
class Address:
    """A host and a port to listen on; port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class ServeConfig:
    """Everything that a collector needs to start."""

    db: str
    grpc: Address
    metrics: Address
    limits: Limits = field(default_factory=Limits)


def serve_config(*, db: str, grpc: str, metrics: str, insecure: bool) -> ServeConfig:
    """The checked settings.

    Raises:
        ConfigError: an address is malformed, or reachable from other machines without `insecure`.
    """
    config = ServeConfig(db=db, grpc=parse_address("--grpc", grpc), metrics=parse_address("--metrics", metrics))
    for option, address in [("--grpc", config.grpc), ("--metrics", config.metrics)]:
        if not insecure and not _is_loopback(address.host):
            raise ConfigError(
                f"{option} {address} can be reached from other machines, and this version has neither TLS nor tokens: "
                "listen on 127.0.0.1, or put the collector into a private network and say --insecure"
            )
    return config


def parse_address(option: str, text: str) -> Address:
    """The address that `text` writes as HOST:PORT or [IPV6]:PORT.

    Raises:
        ConfigError: it does not.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed) or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{option} is {text!r}; expected HOST:PORT, for example 127.0.0.1:4327 or [::1]:4327")
    return Address(host.strip("[]") if bracketed else host, int(port))


def _is_loopback(host: str) -> bool:
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ConfigError(f"host {host!r} is unknown: {error.strerror}") from None
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)
