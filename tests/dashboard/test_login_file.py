"""The login file: what it must say, the sentences about what it does not, and whom it admits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fp8scope_dashboard.login import Login, read

GOOD = {
    "redirect_uri": "https://fp8scope.example.org/oauth2callback",
    "cookie_secret": "0123456789abcdef0123456789abcdef",
    "client_id": "fp8scope",
    "client_secret": "s3cret",
    "server_metadata_url": "https://login.example.org/.well-known/openid-configuration",
}
ALLOW = 'allow = ["Ada@example.org", "@lab.example.org"]'


def written(folder: Path, text: str) -> Path:
    path = folder / "login.toml"
    path.write_text(text)
    return path


def table(**changes: str | None) -> str:
    entries = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    return "\n".join(["[auth]", *(f'{key} = "{value}"' for key, value in entries.items())])


def test_a_complete_file_is_read_and_prints_without_its_secrets(tmp_path: Path) -> None:
    login = read(written(tmp_path, f"{ALLOW}\n{table()}"))

    assert login.origin == "https://fp8scope.example.org"
    assert login.allow == {"ada@example.org", "@lab.example.org"}
    assert "s3cret" not in repr(login)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("allow = [", "is not TOML"),
        (table(), "allows nobody: allow is None"),
        (f"allow = []\n{table()}", "allows nobody"),
        (f'allow = "ada@example.org"\n{table()}', "expected a list of addresses"),
        (f'allow = ["ada"]\n{table()}', "allow has 'ada'"),
        (ALLOW, "has no table [auth]"),
        (f"{ALLOW}\n{table(client_id=None)}", "[auth] client_id is missing"),
        (f"{ALLOW}\n{table(client_secret='')}", "[auth] client_secret is empty"),
        (f"{ALLOW}\n{table(cookie_secret='short')}", "has 5 characters; expected at least 32"),
        (f"{ALLOW}\n{table(redirect_uri='https://fp8scope.example.org/')}", "with the path /oauth2callback"),
        (f"{ALLOW}\nallow_all = true\n{table()}", "has 'allow_all'"),
    ],
)
def test_what_is_wrong_with_a_file_is_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match="login file") as caught:
        read(written(tmp_path, text))

    assert said in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("claims", "admitted"),
    [
        ({"email": "ada@example.org"}, True),
        ({"email": "ADA@Example.org", "email_verified": True}, True),
        ({"email": "grace@lab.example.org"}, True),
        ({"email": "ada@example.org", "email_verified": False}, False),
        ({"email": "ada@example.org", "is_logged_in": False}, False),
        ({"email": "eve@example.org"}, False),
        ({"email": "eve@sub.lab.example.org"}, False),
        ({"email": "eve@lab.example.org.example.com"}, False),
        ({"email": "@lab.example.org@example.com"}, False),
        ({"email": None}, False),
        ({"email": ["ada@example.org"]}, False),
        ({}, False),
    ],
)
def test_only_signed_in_and_verified_addresses_of_the_list_are_admitted(claims: dict[str, Any], admitted: bool) -> None:
    login = Login(auth={}, allow=frozenset({"ada@example.org", "@lab.example.org"}))

    assert login.admits({"is_logged_in": True, **claims}) is admitted
