"""A small OpenID Connect provider on the loopback: whoever is `user` is signed in without being asked."""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT_ID, CLIENT_SECRET = "fp8scope", "a-secret-of-the-test"


class Provider:
    """Authorisation code flow with discovery, RS256 and PKCE, as much as a relying party checks."""

    def __init__(self) -> None:
        self.user: dict[str, Any] = {"sub": "1", "email": "ada@example.org", "email_verified": True}
        self.redirects: list[str] = []
        self._key = RSAKey.generate_key(2048, {"kid": "test", "use": "sig", "alg": "RS256"})
        self._nonces: dict[str, str | None] = {}
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(path.query).items()}
                if path.path == "/.well-known/openid-configuration":
                    self._json(provider._metadata())
                elif path.path == "/jwks":
                    self._json({"keys": [provider._key.as_dict(private=False)]})
                elif path.path == "/authorize":
                    self.send_response(302)
                    self.send_header("Location", provider._authorize(query))
                    self.end_headers()
                else:
                    self.send_error(404)

            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                basic = self.headers.get("Authorization", "").removeprefix("Basic ")
                if base64.b64decode(basic).decode() != f"{CLIENT_ID}:{CLIENT_SECRET}":
                    self.send_error(401)
                    return
                self._json(provider._token(form["code"][0]))

            def log_message(self, *_: object) -> None:
                return

            def _json(self, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _metadata(self) -> dict[str, Any]:
        return {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/jwks",
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "code_challenge_methods_supported": ["S256"],
        }

    def _authorize(self, query: dict[str, str]) -> str:
        assert query["client_id"] == CLIENT_ID
        assert query["code_challenge_method"] == "S256"
        self.redirects.append(query["redirect_uri"])
        code = secrets.token_urlsafe(16)
        self._nonces[code] = query.get("nonce")
        return f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}"

    def _token(self, code: str) -> dict[str, Any]:
        now = int(time.time())
        claims = {"iss": self.url, "aud": CLIENT_ID, "iat": now, "exp": now + 300, **self.user}
        if (nonce := self._nonces.pop(code)) is not None:
            claims["nonce"] = nonce
        signed = jwt.encode({"alg": "RS256", "kid": "test"}, claims, self._key)
        return {"access_token": secrets.token_urlsafe(16), "token_type": "Bearer", "id_token": signed}
