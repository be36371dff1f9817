"""The dashboard's entry: one page, three views, told apart by the address. Run by `python -m fp8scope_dashboard`."""

from __future__ import annotations

import streamlit as st

from fp8scope_dashboard.views import run, runs, shell, signin, tensor


def page() -> None:
    """The view that the address names, for those who may see it."""
    if not signin.permitted():
        return
    where = shell.here()
    view = tensor.view if where.layer else run.view if where.run else runs.view
    shell.guarded(view)()
    signin.footer()


st.set_page_config(page_title="fp8scope", layout="wide")
st.navigation([st.Page(page, title="fp8scope", default=True)], position="hidden").run()
