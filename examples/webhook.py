"""A webhook that prints what `fp8scope serve --notify` and Alertmanager send: the beginning of one of your own.

python examples/webhook.py --port 9999
fp8scope serve --notify http://127.0.0.1:9999/hook
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

LARGEST_BYTES = 1 << 20


def lines(message: dict[str, Any]) -> list[str]:
    """A message in words: one line for each finding, or for each of Alertmanager's alerts."""
    if "alerts" in message:
        return [f"{alert['status']}: {alert['annotations'].get('summary', '')}" for alert in message["alerts"]]
    found = []
    for finding in message["findings"]:
        tensor = f"{finding['role']} of {finding['layer']}" if finding["layer"] else "the run"
        what = f"{finding['rule']} since step {finding['first_step']}: {finding['evidence']}"
        found.append(f"{message['status']}: {message['run']}: {tensor}: {what}")
    return found + ([f"... and {message['more']} more"] if message["more"] else [])


class Hook(BaseHTTPRequestHandler):
    """Answers 204, or 400 to what is no message."""

    def do_POST(self) -> None:
        try:
            size = min(int(self.headers["Content-Length"]), LARGEST_BYTES)
            print("\n".join(lines(json.loads(self.rfile.read(size)))), flush=True)
            self.send_response(204)
        except (KeyError, TypeError, ValueError):
            self.send_response(400)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing of each request."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print what fp8scope and Alertmanager send.")
    parser.add_argument("--port", type=int, default=9999)
    HTTPServer(("127.0.0.1", parser.parse_args().port), Hook).serve_forever()
