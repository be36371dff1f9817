"""TLS to the collector: which files the variables name, and what is wrong where no connection comes about.

FP8SCOPE_TLS_CA turns it on. The files are read at each connection, as certificates get renewed while a job runs. Of
most failed handshakes gRPC says only that the socket closed; `trouble` makes one more with Python's own library, to be
able to say why. The training process imports this to check its variables, so nothing here imports gRPC.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_CONNECT_S = 2.0
_FIRST_BYTE_S = 1.0  # a server that likes us greets at once, one that refuses our certificate hangs up


@dataclass(frozen=True)
class Tls:
    """PEM files: whom to trust, and what to show where the collector asks for a client certificate."""

    ca: Path
    cert: Path | None = None
    key: Path | None = None

    def read(self) -> tuple[bytes, bytes | None, bytes | None]:
        """The files as gRPC takes them: roots, private key, certificate chain.

        Raises:
            ValueError: one cannot be read or used.
        """
        self.context()
        try:
            return (
                self.ca.read_bytes(),
                self.key.read_bytes() if self.key else None,
                self.cert.read_bytes() if self.cert else None,
            )
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be read ({error.strerror})") from None

    def context(self) -> ssl.SSLContext:
        """The same for Python's library.

        Raises:
            ValueError: a file cannot be read or used.
        """
        named = f"FP8SCOPE_TLS_CA {self.ca}"
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert and self.key:
                named = f"FP8SCOPE_TLS_CLIENT_CERT {self.cert} with FP8SCOPE_TLS_CLIENT_KEY {self.key}"
                context.load_cert_chain(self.cert, self.key, password="")  # an encrypted key is an error, no question
        except ssl.SSLError as error:
            raise ValueError(
                f"{named} cannot be used ({error.reason or 'no PEM file'}); expected PEM files that belong together"
            ) from None
        except OSError as error:
            raise ValueError(f"{named} cannot be read ({error.strerror})") from None
        context.set_alpn_protocols(["h2"])
        return context


@dataclass(frozen=True)
class Trouble:
    """Why TLS fails: tls_wanted, tls_not_spoken, certificate (the collector's) or client_certificate (ours)."""

    cause: str
    detail: str = ""


def tls_settings(environ: Mapping[str, str]) -> Tls | None:
    """What the FP8SCOPE_TLS_* variables say; None: no TLS.

    Raises:
        ValueError: a file cannot be used, or one without another.
    """
    ca, cert, key = (environ.get(f"FP8SCOPE_TLS_{name}") for name in ("CA", "CLIENT_CERT", "CLIENT_KEY"))
    if not ca:
        if cert or key:
            raise ValueError(
                "FP8SCOPE_TLS_CLIENT_CERT or FP8SCOPE_TLS_CLIENT_KEY is set without FP8SCOPE_TLS_CA, the PEM file of "
                "the certificates to trust, which turns TLS on"
            )
        return None
    if bool(cert) != bool(key):
        raise ValueError("a client certificate needs both FP8SCOPE_TLS_CLIENT_CERT and FP8SCOPE_TLS_CLIENT_KEY")
    tls = Tls(Path(ca), Path(cert) if cert else None, Path(key) if key else None)
    tls.context()
    return tls


def trouble(address: str, tls: Tls | None) -> Trouble | None:
    """What is wrong about TLS at `address`, found by one handshake of at most some seconds; None: nothing that shows.

    Raises:
        ValueError: a file cannot be used.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_S) as plain:
            with (tls.context() if tls else _trusting()).wrap_socket(plain, server_hostname=host) as secured:
                if tls is None:
                    return Trouble("tls_wanted")
                secured.settimeout(_FIRST_BYTE_S)
                if not secured.recv(1):
                    return _hung_up(tls)
    except ssl.SSLCertVerificationError as error:
        return Trouble("certificate", error.verify_message)
    except ssl.SSLError as error:
        reason = error.reason or ""
        if reason == "WRONG_VERSION_NUMBER":
            return Trouble("tls_not_spoken") if tls else None
        if tls and ("ALERT" in reason or "EOF" in reason):
            return _hung_up(tls)
        if "ALERT" in reason:
            return Trouble("tls_wanted")
    except OSError:
        pass  # nobody there, or gone in between: no matter of TLS
    return None


def _hung_up(tls: Tls) -> Trouble:
    """Whose certificate we trust, and who leaves before a word: it wants to know us."""
    return Trouble("client_certificate", f"it was shown {tls.cert}" if tls.cert else "it was shown none")


def _trusting() -> ssl.SSLContext:
    """To find out whether somebody speaks TLS; nothing is sent over it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
