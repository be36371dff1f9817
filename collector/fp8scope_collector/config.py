"""How `fp8scope serve` was asked to run, checked: addresses, the database, and who may reach it.

Other machines reach a collector by TLS and with a token, or because somebody said `--insecure`.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from fp8scope_collector.diagnosis.settings import Settings, Webhook
from fp8scope_collector.limits import Limits

DIAGNOSE_EVERY_S = 2.0


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
class TlsFiles:
    """PEM files. With `client_ca` agents have to show a certificate that it signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class ServeConfig:
    """Everything that a collector needs to start."""

    db: str
    grpc: Address
    metrics: Address
    tokens: bool = False  # agents have to show one
    tls: TlsFiles | None = None  # agents have to use TLS
    guard_metrics: bool = False  # /metrics too is for TLS and tokens only
    retention_s: int | None = None  # age at which raw rows are deleted
    diagnosis: Settings | None = None  # None: runs are not diagnosed while they go on
    limits: Limits = field(default_factory=Limits)


def serve_config(
    *,
    db: str,
    grpc: str,
    metrics: str,
    auth: Literal["tokens", "none"] | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    tls_client_ca: Path | None = None,
    insecure: bool = False,
    insecure_metrics: bool = False,
    retention_s: int | None = None,
    diagnosis: bool = True,
    notify: str = "",
    notify_form: Literal["json", "slack"] = "json",
    notify_severity: Literal["info", "warning", "critical"] = "warning",
    dashboard_url: str = "",
) -> ServeConfig:
    """The checked settings. Agents need tokens where `auth` says so, or else where other machines can reach `grpc`.

    Raises:
        ConfigError: an address is malformed, or reachable from other machines without TLS and tokens although
            nobody said that it may be; or TLS lacks a file.
    """
    grpc_address, metrics_address = parse_address("--grpc", grpc), parse_address("--metrics", metrics)
    tls = _tls_files(tls_cert, tls_key, tls_client_ca)
    exposed = not insecure and not _is_loopback(grpc_address.host)
    metrics_exposed = not insecure and not insecure_metrics and not _is_loopback(metrics_address.host)
    reachable = "can be reached from other machines"
    if exposed and tls is None:
        raise ConfigError(
            f"--grpc {grpc_address} {reachable}: encrypt it with --tls-cert and --tls-key, listen on 127.0.0.1, or put "
            "the collector into a private network and say --insecure"
        )
    if exposed and auth == "none":
        raise ConfigError(
            f"--grpc {grpc_address} {reachable}, and --auth none lets everybody in: leave it out, listen on 127.0.0.1, "
            "or put the collector into a private network and say --insecure"
        )
    if metrics_exposed and tls is None:
        raise ConfigError(
            f"--metrics {metrics_address} {reachable}: encrypt it with --tls-cert and --tls-key, listen on 127.0.0.1, "
            "or put it into a private network and say --insecure-metrics"
        )
    return ServeConfig(
        db=db,
        grpc=grpc_address,
        metrics=metrics_address,
        tokens=auth == "tokens" or exposed,
        tls=tls,
        guard_metrics=metrics_exposed,
        retention_s=retention_s,
        diagnosis=Settings(
            db=db,
            every_s=DIAGNOSE_EVERY_S,
            webhook=Webhook(
                url=_web_address("--notify", notify),
                form=notify_form,
                severity=notify_severity,
                dashboard=_web_address("--dashboard-url", dashboard_url).rstrip("/") if dashboard_url else "",
            )
            if notify
            else None,
        )
        if diagnosis
        else None,
    )


def _web_address(option: str, text: str) -> str:
    """The URL, of a kind that we can send to; what is wrong is said without it, as it may hold a secret."""
    try:
        parts = urlsplit(text)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fine = False
    if not fine:
        raise ConfigError(f"{option} is no web address; expected https://HOST/PATH or http://HOST:PORT/PATH")
    return text


def _tls_files(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise ConfigError("TLS needs both --tls-cert and --tls-key")
    return TlsFiles(cert, key, client_ca)


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
