"""The dashboard's entry: one page whose address says which view it shows. Run by `python -m fp8scope_dashboard`."""

from __future__ import annotations

import streamlit as st

from fp8scope_dashboard.component import panel
from fp8scope_dashboard.views import compare, findings, run, runs, scales, settings, shell, signin, system, tensor

VIEWS = {
    "scales": scales.view,
    "compare": compare.view,
    "findings": findings.view,
    "system": system.view,
    "settings": settings.view,
}


def page() -> None:
    """The view that the address names, for those who may see it."""
    if not signin.permitted():
        return
    panel.forget()
    where = shell.here()
    view = VIEWS.get(where.view) or (tensor.view if where.layer else run.view if where.run else runs.view)
    shell.guarded(view)()
    signin.footer()


st.set_page_config(page_title="fp8scope", layout="wide")
st.navigation([st.Page(page, title="fp8scope", default=True)], position="hidden").run()
