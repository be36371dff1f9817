"""The web application: streamlit running app.py, the files that our component needs, and who may ask for them."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

logging.getLogger("streamlit.runtime.caching.cache_data_api").setLevel(logging.ERROR)  # it warns of the early import
from fp8scope_dashboard import download, login  # noqa: E402
from fp8scope_dashboard.component import assets  # noqa: E402


def create_app() -> st.App:
    """The application, for any ASGI server; what the first browser would wait for is done before it comes."""
    importlib.import_module("fp8scope_dashboard.charts.tensor")  # and with it numpy, pyarrow, SQLAlchemy
    assets.prepare()
    asked = login.required()
    return st.App(
        Path(__file__).with_name("app.py"),
        routes=[Route(f"/{assets.FOLDER}/{{digest}}/{{name}}", _asset), *download.routes()],
        secrets={"auth": dict(asked.auth)} if asked else None,
        middleware=[Middleware(login.Gatekeeper, asked)] if asked else None,
    )


async def _asset(request: Request) -> Response:
    found = assets.content(request.path_params["name"])
    if found is None:
        return Response("not found", status_code=404)
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "Content-Encoding": "gzip"}
    return Response(found[0], media_type=found[1], headers=headers)
