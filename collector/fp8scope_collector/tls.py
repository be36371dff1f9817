"""The server's certificate: read, checked, and read again when its files change, for gRPC and for /metrics.

Certificates are renewed while collectors run. Each new connection looks whether the files are other ones, and takes
them if they are complete and fit together; else the old certificate stays, and the log says why, once.
"""

from __future__ import annotations

import re
import ssl
import threading
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog

from fp8scope_collector.config import ConfigError, TlsFiles

log = structlog.get_logger()


class Certificate:
    """The newest good content of `files`; usable from any thread.

    Raises:
        ConfigError: a file is missing, is not what it should be, or the key is another certificate's.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._stamp = _stamp(files)
        self._grpc, self._http = _load(files)
        self._given = self._grpc

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """What gRPC listens with; it asks for news at each connection."""
        mutual = self._files.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(self._grpc, self._news, mutual)  # type: ignore[arg-type]  # None: as before

    def http_context(self) -> ssl.SSLContext:
        """What to wrap a new HTTPS connection in."""
        with self._lock:
            self._look()
            return self._http

    def _news(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            self._look()
            if self._grpc is self._given:
                return None
            self._given = self._grpc
            return self._given

    def _look(self) -> None:
        stamp = _stamp(self._files)  # before reading: what changes meanwhile is seen the next time
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._grpc, self._http = _load(self._files)
        except ConfigError as error:
            log.error("the new certificate is unusable, the old one stays", reason=str(error))
        else:
            log.info("certificate replaced", cert=str(self._files.cert))


def expires_unix_ns(path: Path) -> int:
    """When the first certificate in the file expires.

    A certificate's validity is the only place where two times follow each other, so it is found without a library that
    reads all of X.509.

    Raises:
        ConfigError: there is none.
    """
    time_ = rb"(?:\x17\x0d([0-9]{12})Z|\x18\x0f([0-9]{14})Z)"  # UTCTime (two digits of a year), GeneralizedTime
    found = re.search(rb"\x30[\x1e-\x22]" + time_ + time_, ssl.PEM_cert_to_DER_cert(first_pem(path)))
    if not found:
        raise ConfigError(f"there is no time of expiry in {str(path)!r}; expected an X.509 certificate")
    text = (found[3] or found[4]).decode()
    if found[3]:
        text = ("19" if int(text[:2]) >= 50 else "20") + text
    return int(datetime.strptime(text, "%Y%m%d%H%M%S").replace(tzinfo=UTC).timestamp()) * 10**9


def first_pem(path: Path) -> str:
    """The first certificate in the file, as PEM.

    Raises:
        ConfigError: there is none, or the file cannot be read.
    """
    text = _read(path, "certificate").decode("ascii", "replace")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    if begin not in text or end not in text:
        raise ConfigError(f"there is no certificate in {str(path)!r}; expected a PEM file")
    return text[text.index(begin) : text.index(end) + len(end)]


def _stamp(files: TlsFiles) -> tuple[tuple[int, int, int] | None, ...]:
    """What changes when one of the files does."""
    stamps: list[tuple[int, int, int] | None] = []
    for path in (files.cert, files.key, files.client_ca):
        try:
            found = path.stat() if path else None
        except OSError:
            found = None
        stamps.append((found.st_ino, found.st_size, found.st_mtime_ns) if found else None)
    return tuple(stamps)


def _load(files: TlsFiles) -> tuple[grpc.ServerCertificateConfiguration, ssl.SSLContext]:
    cert = _read(files.cert, "certificate")
    key = _read(files.key, "private key")
    client_ca = _read(files.client_ca, "certificate") if files.client_ca else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.cert, files.key, password="")  # an encrypted key is an error, not a question
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"the key in {str(files.key)!r} belongs to another certificate than the one in {str(files.cert)!r}"
            ) from None
        raise ConfigError(
            f"{str(files.cert)!r} and {str(files.key)!r} cannot be used ({error.reason or error}); expected PEM files, "
            "the key without a password"
        ) from None
    if files.client_ca:
        try:
            context.load_verify_locations(files.client_ca)  # a check only: /metrics asks for a token instead
        except ssl.SSLError as error:
            raise ConfigError(f"{str(files.client_ca)!r} cannot be used ({error.reason or error})") from None
    return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca), context


def _read(path: Path, what: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}") from None
    if f"{what.upper()}-----".encode() not in content:
        raise ConfigError(f"there is no {what} in {str(path)!r}; expected a PEM file")
    return content
