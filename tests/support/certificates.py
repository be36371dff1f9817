"""Certificates made for a test by openssl: an authority, and what it signs."""

from __future__ import annotations

import subprocess
from pathlib import Path

_CURVE = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


class Authority:
    """A certificate authority in `folder`; `ca` is its certificate."""

    def __init__(self, openssl: Path, folder: Path, name: str = "authority") -> None:
        self._openssl = openssl
        self._folder = folder
        self._name = name
        self.ca = folder / f"{name}.pem"
        self._key = folder / f"{name}.key"
        self._run("req", "-x509", *_CURVE, "-days", "30", "-subj", f"/CN={name}", "-keyout", self._key, "-out", self.ca)

    def issue(self, name: str, *, names: str = "DNS:localhost,IP:127.0.0.1", days: int = 10) -> tuple[Path, Path]:
        """The files of a new certificate and its key; one of -1 days has expired."""
        cert, key, request = (self._folder / f"{self._name}-{name}.{ending}" for ending in ("pem", "key", "csr"))
        extensions = self._folder / f"{self._name}-{name}.ext"
        extensions.write_text(f"subjectAltName={names}\n")
        self._run("req", *_CURVE, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        signer = ["-CA", self.ca, "-CAkey", self._key, "-CAcreateserial"]
        self._run("x509", "-req", "-in", request, *signer, "-days", days, "-extfile", extensions, "-out", cert)
        return cert, key

    def _run(self, *arguments: object) -> None:
        subprocess.run([self._openssl, *map(str, arguments)], check=True, capture_output=True, timeout=30)
