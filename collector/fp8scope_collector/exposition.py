"""The HTTP side: /metrics for Prometheus and /healthz for whoever restarts or routes to this process.

Where a guard is given it speaks TLS, and /metrics asks for a token; /healthz tells little and asks nobody.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from fp8scope_collector.decode import RefusedError


@dataclass(frozen=True)
class Guard:
    """What protects the server from other machines."""

    tls: Callable[[], ssl.SSLContext]  # called for each connection
    check: Callable[[Sequence[str]], None]  # raises RefusedError for values of Authorization that may not read


class MetricsServer:
    """Serves until `close`. `unready` says why not ready, or nothing: then /healthz is 200.

    Raises:
        OSError: nobody may listen there.
    """

    def __init__(
        self, host: str, port: int, collector: Collector, unready: Callable[[], str], guard: Guard | None = None
    ) -> None:
        registry = CollectorRegistry()
        registry.register(collector)

        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # seconds that a client may take for its request

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    if not self._may_read():
                        return
                    encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                    self._answer(200, content_type, encode(registry))
                elif path == "/healthz":
                    reason = unready()
                    self._answer(503 if reason else 200, "text/plain; charset=utf-8", f"{reason or 'ok'}\n".encode())
                else:
                    self._answer(404, "text/plain; charset=utf-8", b"here are /metrics and /healthz\n")

            def _may_read(self) -> bool:
                """Whether the client may see metrics; one that may not is told."""
                try:
                    if guard:
                        guard.check(self.headers.get_all("Authorization", []))
                except RefusedError as refused:
                    status = 401 if refused.code is grpc.StatusCode.UNAUTHENTICATED else 403
                    self._answer(status, "text/plain; charset=utf-8", f"{refused}\n".encode())
                    return False
                return True

            def _answer(self, status: int, content_type: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Scrapes are not worth a line each."""

        self._server = _Server((host, port), Handler, guard)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="fp8scope-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], guard: Guard | None = None
    ) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._guard = guard
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """A new connection; its handshake is left to its own thread, where it holds up nobody."""
        connection, address = super().get_request()
        if self._guard:
            context = self._guard.tls()
            connection = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in the middle is its own affair."""
