"""Signing in, in a real browser with a real provider: strangers see nothing, and a deep link survives the sign-in."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from fp8scope_collector.storage import schema
from fp8scope_collector.storage.engine import migrate, open_engine
from oidc import CLIENT_ID, CLIENT_SECRET, Provider
from programs import environment

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SECRET_RUN = "the-run-nobody-may-see"


@dataclass(frozen=True)
class Dashboard:
    url: str
    provider: Provider


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """A dashboard that asks for a login, with one run."""
    folder = tmp_path_factory.mktemp("login")
    database = f"sqlite:///{folder / 'runs.db'}"
    engine = open_engine(database)
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(schema.run.insert().values(name=SECRET_RUN, created_unix_ns=time.time_ns()))
    engine.dispose()
    provider = Provider()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "login.toml").write_text(f"""
        allow = ["ada@example.org", "@lab.example.org"]
        [auth]
        redirect_uri = "http://127.0.0.1:{port}/oauth2callback"
        cookie_secret = "{"0123456789abcdef" * 2}"
        client_id = "{CLIENT_ID}"
        client_secret = "{CLIENT_SECRET}"
        server_metadata_url = "{provider.url}/.well-known/openid-configuration"
    """)
    command = [sys.executable, "-m", "fp8scope_dashboard", "--db", database, "--listen", f"127.0.0.1:{port}"]
    process = subprocess.Popen(
        [*command, "--login", str(folder / "login.toml")],
        stdout=subprocess.PIPE,
        stderr=(folder / "log").open("wb"),
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("fp8scope dashboard: "), (folder / "log").read_text()
        yield Dashboard(f"http://127.0.0.1:{port}", provider)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=10)
        provider.close()


@pytest.fixture(scope="module")
def browser(require_binary: Callable[[str], Path]) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require_binary("chromium"), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a new profile: no cookies."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(30_000)
    yield page
    context.close()


def sign_in(page: Page, dashboard: Dashboard, address: str, **claims: Any) -> None:
    dashboard.provider.user = {"sub": address, "email": address, "email_verified": True, **claims}
    page.get_by_role("button", name="Sign in").click()


def get(dashboard: Dashboard, path: str, cookie: str = "") -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(dashboard.url).netloc, timeout=10)
    connection.request("GET", path, headers={"Cookie": cookie} if cookie else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


def test_a_deep_link_opened_before_the_login_arrives_at_its_view_after_it(page: Page, dashboard: Dashboard) -> None:
    page.goto(f"{dashboard.url}/?run={SECRET_RUN}&quantity=overflow")
    expect(page.get_by_text("Sign in to see")).to_be_visible()
    assert "no rows yet" not in page.content()

    sign_in(page, dashboard, "ada@example.org")

    expect(page.get_by_text("no rows yet")).to_be_visible()
    assert urlsplit(page.url).query == f"run={SECRET_RUN}&quantity=overflow"
    assert dashboard.provider.redirects[-1] == f"{dashboard.url}/oauth2callback"


def test_nobody_sees_a_run_before_the_login_and_somebody_of_an_allowed_domain_does_after_it(
    page: Page, dashboard: Dashboard
) -> None:
    frames: list[str] = []
    page.on("websocket", lambda ws: ws.on("framereceived", lambda data: frames.append(str(data))))
    page.goto(dashboard.url)
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    assert SECRET_RUN not in page.content()
    assert not [frame for frame in frames if SECRET_RUN in frame]

    sign_in(page, dashboard, "Grace@Lab.Example.org")

    expect(page.get_by_text(SECRET_RUN)).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    page.wait_for_load_state("networkidle")  # signing out leads through pages that have the button, too
    assert SECRET_RUN not in page.content()


@pytest.mark.parametrize(
    ("address", "claims", "said"),
    [
        ("eve@example.com", {}, "eve@example.com is not on the list"),
        ("eve@evil-lab.example.org", {}, "eve@evil-lab.example.org is not on the list"),
        ("ada@example.org", {"email_verified": False}, "ada@example.org is not verified"),
    ],
)
def test_a_login_outside_the_allow_list_gives_no_data(
    page: Page, dashboard: Dashboard, address: str, claims: dict[str, Any], said: str
) -> None:
    page.goto(f"{dashboard.url}/?run={SECRET_RUN}")

    sign_in(page, dashboard, address, **claims)

    expect(page.get_by_text(said)).to_be_visible()
    assert "no rows yet" not in page.content()
    cookies = "; ".join(f"{c['name']}={c['value']}" for c in page.context.cookies())
    assert get(dashboard, "/media/x.csv", cookies)[0] == 401


def test_what_is_not_the_sign_in_page_is_closed_to_strangers(dashboard: Dashboard) -> None:
    assert get(dashboard, "/media/0123456789abcdef.csv") == (401, "sign in at / to see this")
    assert get(dashboard, "/download?run=x")[0] == 401
    assert get(dashboard, "/media/x.csv", '_streamlit_user="forged"')[0] == 401
    assert get(dashboard, "/")[0] == 200
    assert get(dashboard, "/_stcore/health")[0] == 200


def test_a_remembered_address_leads_nowhere_else(page: Page, dashboard: Dashboard) -> None:
    page.goto(dashboard.url)
    evil = "//evil.example.com/%3Frun%3Dx"
    page.context.add_cookies([{"name": "fp8scope_asked_for", "value": evil, "url": dashboard.url}])

    sign_in(page, dashboard, "ada@example.org")

    expect(page.get_by_text(SECRET_RUN)).to_be_visible()
    assert page.url.startswith(dashboard.url)
