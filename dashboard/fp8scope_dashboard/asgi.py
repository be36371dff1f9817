"""The web application: streamlit running app.py, the files that our component needs, and who may ask for them."""

from __future__ import annotations

import gc
import importlib
import logging
from pathlib import Path

import streamlit as st
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logging.getLogger("streamlit.runtime.caching.cache_data_api").setLevel(logging.ERROR)  # it warns of the early import
from fp8scope_dashboard import download, login  # noqa: E402
from fp8scope_dashboard.component import assets  # noqa: E402


def create_app() -> st.App:
    """The application, for any ASGI server; what the first browser would wait for is done before it comes."""
    for view in ("compare", "findings", "runs", "scales", "settings", "system", "tensor"):
        importlib.import_module(f"fp8scope_dashboard.views.{view}")  # and with them numpy, pyarrow, SQLAlchemy
    assets.prepare()
    gc.collect()
    gc.freeze()  # modules stay: no later collection walks them
    asked = login.required()
    return st.App(
        Path(__file__).with_name("app.py"),
        routes=[Route(f"/{assets.FOLDER}/{{digest}}/{{name}}", _asset), *download.routes()],
        secrets={"auth": dict(asked.auth)} if asked else None,
        middleware=[Middleware(Preload), *([Middleware(login.Gatekeeper, asked)] if asked else [])],
    )


class Preload:
    """ASGI middleware: the page names our files in a header, so that they are fetched while Streamlit's own start."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def amended(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("content-type", "").startswith("text/html"):
                    headers.append("link", assets.preload())
            await send(message)

        page = scope["type"] == "http" and scope["path"] == "/"
        await self._app(scope, receive, amended if page else send)


async def _asset(request: Request) -> Response:
    found = assets.content(request.path_params["name"])
    if found is None:
        return Response("not found", status_code=404)
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "Content-Encoding": "gzip"}
    return Response(found[0], media_type=found[1], headers=headers)
