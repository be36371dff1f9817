"""The web application: streamlit running app.py, and the plotly.js of the installed plotly for our component."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

import plotly
import streamlit as st
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fp8scope_dashboard.component.panel import PLOTLY_URL


def create_app() -> st.App:
    """The application, for any ASGI server."""
    return st.App(Path(__file__).with_name("app.py"), routes=[Route(f"/{PLOTLY_URL}", _plotly)])


async def _plotly(request: Request) -> Response:
    """plotly.js, compressed once; a browser keeps it."""
    headers = {"Cache-Control": "public, max-age=86400", "Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
    return Response(_compressed_plotly(), media_type="text/javascript", headers=headers)


@functools.cache
def _compressed_plotly() -> bytes:
    return gzip.compress((Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_bytes(), 5)
