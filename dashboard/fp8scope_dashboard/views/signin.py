"""What strangers see instead of a view: the way in, or the sentence that they are not on the list."""

from __future__ import annotations

import streamlit as st

from fp8scope_dashboard import login
from fp8scope_dashboard.component import panel
from fp8scope_dashboard.views import shell


def permitted() -> bool:
    """Whether this viewer may see data; where not, the page says what to do."""
    asked = login.required()
    user = st.user.to_dict() if asked else {}
    if asked is None or asked.admits(user):
        return True
    panel.header("header", crumbs=[{"text": "fp8scope", "to": None}])
    if not user.get("is_logged_in"):
        st.markdown("Sign in to see the training runs of this dashboard.")
        st.button("Sign in", type="primary", on_click=st.login)
        return False
    address = user.get("email")
    known = shell.escaped(str(address)) if address else "without an e-mail address"
    reason = "is not verified by the provider" if user.get("email_verified") is False else "is not on the list"
    st.warning(f"You are signed in, but {known} {reason}. Whoever runs this dashboard can add it to `allow`.")
    st.button("Sign out", on_click=st.logout)
    return False


def footer() -> None:
    """Who is signed in, and the way out."""
    if login.required():
        with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="right"):
            st.caption(shell.escaped(str(st.user.to_dict().get("email"))))
            st.button("Sign out", type="tertiary", on_click=st.logout)
