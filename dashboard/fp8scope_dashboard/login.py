"""Who may look: signing in by OpenID Connect, and the allow-list of addresses.

`fp8scope dashboard --login FILE` reads both from one TOML file, whose table [auth] is what Streamlit's `st.login`
takes. Streamlit does the conversation with the provider; here is what it leaves to the application:

* `Gatekeeper`, in front of every HTTP request: without a permitted user only what the sign-in page is made of is
  served, and no path is open because somebody forgot to close it. It also remembers the address that was asked for
  before the sign-in, which Streamlit forgets: a deep link arrives at its view.
* `Login.admits`, asked by every run of the page: being signed in is not enough, the allow-list has the last word.
"""

from __future__ import annotations

import functools
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fp8scope_dashboard import links
from fp8scope_dashboard.component import assets

VARIABLE = "FP8SCOPE_LOGIN"
CALLBACK = "/oauth2callback"
_AUTH_KEYS = ("redirect_uri", "cookie_secret", "client_id", "client_secret", "server_metadata_url")
_SHORTEST_SECRET = 32
_ADDRESS = re.compile(r"[^@\s]*@[^@\s]+")

_ASKED_FOR = "fp8scope_asked_for"
_REMEMBERED_S = 600
_LONGEST_QUERY = 2000
# What the sign-in page needs, and nothing that a database was asked for.
_OPEN = ("/static/", "/_stcore/", f"/{assets.FOLDER}/", "/auth/")
_OPEN_EXACTLY = ("/", "/index.html", "/favicon.png", CALLBACK)


@dataclass(frozen=True)
class Login:
    """A checked login file: Streamlit's [auth] table, and who may look."""

    auth: Mapping[str, Any] = field(repr=False)
    allow: frozenset[str]

    @property
    def origin(self) -> str:
        """Scheme, host and port under which browsers reach the dashboard."""
        parts = urlsplit(str(self.auth["redirect_uri"]))
        return f"{parts.scheme}://{parts.netloc}"

    def admits(self, user: Mapping[str, Any]) -> bool:
        """Whether the claims are those of somebody on the list; an address called unverified is not."""
        address = user.get("email")
        if not isinstance(address, str) or not user.get("is_logged_in") or user.get("email_verified") is False:
            return False
        address = address.strip().lower()
        return address in self.allow or f"@{address.rpartition('@')[2]}" in self.allow


def read(path: Path) -> Login:
    """The login that a file describes.

    Raises:
        ValueError: it cannot be read, or something in it is missing or no possible value.
    """
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"login file {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"login file {str(path)!r} is not TOML: {error}") from None
    if unknown := sorted(set(found) - {"auth", "allow"}):
        raise ValueError(f"login file {str(path)!r} has {unknown[0]!r}; expected the table [auth] and the list allow")
    auth, allow = found.get("auth"), found.get("allow")
    if not isinstance(auth, dict):
        raise ValueError(f"login file {str(path)!r} has no table [auth]; expected one with {', '.join(_AUTH_KEYS)}")
    for key in _AUTH_KEYS:
        if not isinstance(auth.get(key), str) or not auth[key]:
            raise ValueError(f"login file {str(path)!r}: [auth] {key} is {'empty' if key in auth else 'missing'}")
    if len(auth["cookie_secret"]) < _SHORTEST_SECRET:
        raise ValueError(
            f"login file {str(path)!r}: cookie_secret has {len(auth['cookie_secret'])} characters; expected at least "
            f"{_SHORTEST_SECRET} random ones, such as `openssl rand -hex 32` prints"
        )
    redirect = urlsplit(auth["redirect_uri"])
    if redirect.scheme not in ("http", "https") or not redirect.netloc or redirect.path != CALLBACK:
        raise ValueError(
            f"login file {str(path)!r}: redirect_uri is {auth['redirect_uri']!r}; expected the address under which "
            f"browsers reach the dashboard, with the path {CALLBACK}: https://fp8scope.example.org{CALLBACK}"
        )
    return Login(auth=auth, allow=_allowed(path, allow))


def _allowed(path: Path, allow: object) -> frozenset[str]:
    expected = 'expected a list of addresses and domains: allow = ["ada@example.org", "@lab.example.org"]'
    if not isinstance(allow, list) or not allow:
        raise ValueError(f"login file {str(path)!r} allows nobody: allow is {allow!r}; {expected}")
    for entry in allow:
        if not isinstance(entry, str) or not _ADDRESS.fullmatch(entry):
            raise ValueError(f"login file {str(path)!r}: allow has {entry!r}; {expected}")
    return frozenset(entry.lower() for entry in allow)


@functools.cache
def required() -> Login | None:
    """The login that this dashboard asks for; None: it asks nobody."""
    path = os.environ.get(VARIABLE)
    return read(Path(path)) if path else None


class Gatekeeper:
    """ASGI middleware: answers 401 to whatever a stranger asks for that is not open, and keeps deep links.

    WebSockets pass: a page's script runs for strangers too, and shows them `permitted`'s answer.
    """

    def __init__(self, app: ASGIApp, login: Login) -> None:
        self._app = app
        self._login = login
        self._secure = "; Secure" if login.origin.startswith("https:") else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        path = request.url.path
        if not (path in _OPEN_EXACTLY or path.startswith(_OPEN)) and not self._login.admits(self._user(request)):
            refusal = PlainTextResponse("sign in at / to see this", status_code=401)
            await refusal(scope, receive, send)
            return
        cookie, location = None, None
        if path == "/" and 0 < len(request.url.query) <= _LONGEST_QUERY and request.method == "GET":
            cookie = self._cookie(quote(request.url.query, safe=""), _REMEMBERED_S)
        elif path == CALLBACK and (asked_for := request.cookies.get(_ASKED_FOR)):
            cookie, location = self._cookie("", 0), _address(unquote(asked_for))

        async def amended(message: Message) -> None:
            if message["type"] == "http.response.start" and cookie:
                headers = MutableHeaders(scope=message)
                headers.append("set-cookie", cookie)
                if location and headers.get("location") == "/":
                    headers["location"] = location
            await send(message)

        await self._app(scope, receive, amended)

    def _cookie(self, value: str, max_age_s: int) -> str:
        return f"{_ASKED_FOR}={value}; Path=/; Max-Age={max_age_s}; HttpOnly; SameSite=Lax{self._secure}"

    def _user(self, request: Request) -> Mapping[str, Any]:
        """The claims in Streamlit's signed cookie; none where it is missing, forged or of another origin."""
        # Streamlit offers its user to scripts only, not to routes, so its own reading of its own cookie is borrowed.
        from streamlit.web.server.starlette import starlette_websocket
        from streamlit.web.server.starlette.starlette_server_config import USER_COOKIE_NAME

        claims = starlette_websocket._get_signed_cookie_with_chunks(request.cookies, USER_COOKIE_NAME)
        if claims is None:
            return {}
        return starlette_websocket._parse_decoded_user_cookie(claims, self._login.origin)


def _address(query: str) -> str:
    """Where a remembered query leads: always a view of ours, whatever the cookie says."""
    return f"/?{urlencode(links.parse(dict(parse_qsl(query))).params())}"
