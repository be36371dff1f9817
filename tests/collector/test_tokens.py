"""Tokens: how they are made, stored, listed and revoked, and who gets through the gate with one."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from fp8scope_collector import auth
from fp8scope_collector.auth import Gate
from fp8scope_collector.decode import RefusedError, decode_open
from fp8scope_collector.limits import Limits
from fp8scope_collector.storage.engine import migrate, open_engine, upgrade
from fp8scope_collector.storage.tokens import Token, create, digest, find, note_used, read_all, revoke

DAY_NS = 86400 * 10**9
Run = Callable[..., Any]


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/test.db"


def test_a_database_of_the_first_version_gets_its_table_and_keeps_its_rows(database_url: str) -> None:
    engine = open_engine(database_url)
    with engine.begin() as connection:
        upgrade(connection, "0001")
        connection.exec_driver_sql("INSERT INTO run (id, name, created_unix_ns) VALUES (7, 'kept', 1)")
        connection.exec_driver_sql("INSERT INTO stats (source_id, step, slot, amax) VALUES (1, 2, 3, 0.5)")
        assert "token" not in sa.inspect(connection).get_table_names()

    migrate(engine)

    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT id, name FROM run").all() == [(7, "kept")]
        assert connection.exec_driver_sql("SELECT source_id, step, slot, amax FROM stats").all() == [(1, 2, 3, 0.5)]
    assert read_all(engine) == ()
    engine.dispose()


def test_what_is_stored_of_a_token_comes_back_and_its_secret_does_not(database_url: str) -> None:
    engine = open_engine(database_url)
    migrate(engine)

    secret = create(
        engine, name="node", scope="ingest", project="", run="r", expires_unix_ns=5 * DAY_NS, now_unix_ns=DAY_NS
    )

    (token,) = read_all(engine)
    assert re.fullmatch(r"fp8s_[A-Za-z0-9_-]{43}", secret)
    assert (token.name, token.scope, token.project, token.run) == ("node", "ingest", "", "r")
    assert (token.created_unix_ns, token.expires_unix_ns) == (DAY_NS, 5 * DAY_NS)
    assert token.secret_sha256 == digest(secret)
    assert token.secret_sha256 not in repr(token)
    with engine.connect() as connection:
        row = connection.exec_driver_sql("SELECT * FROM token").one()
    assert secret.removeprefix("fp8s_") not in str(tuple(row))

    note_used(engine, {token.id: 3 * DAY_NS})
    assert find(engine, "node").state(5 * DAY_NS - 1) == "active"
    assert find(engine, "node").state(5 * DAY_NS) == "expired"
    revoke(engine, token.id, now_unix_ns=2 * DAY_NS)
    revoke(engine, token.id, now_unix_ns=4 * DAY_NS)
    revoked = find(engine, str(token.id))
    assert (revoked.last_used_unix_ns, revoked.revoked_unix_ns) == (3 * DAY_NS, 2 * DAY_NS)
    assert revoked.state(3 * DAY_NS) == "revoked"
    engine.dispose()


# the command


def test_create_prints_the_secret_alone_and_once(database: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8SCOPE_DB", database)

    made = run("token", "create", "--name", "node", "--project", "team", "--expires", "30d")

    secret = made.stdout.strip()
    assert re.fullmatch(r"fp8s_[A-Za-z0-9_-]{43}\n", made.stdout)
    assert secret not in made.stderr
    listed = json.loads(run("token", "list", "--json").stdout)
    assert [(token["name"], token["scope"], token["project"], token["run"], token["state"]) for token in listed] == [
        ("node", "ingest", "team", None, "active")
    ]
    assert listed[0]["expires_unix_ns"] - listed[0]["created_unix_ns"] == 30 * DAY_NS
    table = run("token", "list").stdout
    assert table.splitlines()[1].split()[:6] == ["1", "node", "ingest", "'team'", "any", "active"]
    for shown in (table, json.dumps(listed)):
        assert secret not in shown
        assert digest(secret) not in shown


@pytest.mark.parametrize("ref", ["node", "1"])
def test_revoke_takes_a_name_or_an_id(database: str, run: Run, ref: str) -> None:
    run("token", "create", "--name", "node", "--scope", "read", "--db", database)

    assert run("token", "revoke", ref, "--db", database).stderr == "token 'node' is revoked\n"

    assert json.loads(run("token", "list", "--json", "--db", database).stdout)[0]["state"] == "revoked"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["create", "--name", "there"], "there is a token 'there' already, maybe a revoked one; choose another name"),
        (["create", "--name", "7"], "--name is '7'; expected a word, as numbers are the tokens' ids"),
        (["create", "--name", "a\nb"], r"--name is 'a\nb'; expected at most 256 printable characters"),
        (["create", "--name", "a", "--run", " "], "--run is ' '; expected at most 256"),
        (["create", "--name", "a", "--expires", "30"], "--expires is '30'; expected 90m, 12h or 30d, at most 3650d"),
        (["create", "--name", "a", "--expires", "0d"], "--expires is '0d'; expected"),
        (["create", "--name", "a", "--expires", "999999d"], "--expires is '999999d'; expected"),
        (["create", "--name", "a", "--scope", "read", "--run", "r"], "--project and --run restrict what a token of"),
        (["revoke", "three"], "token 'three' is unknown; there are: there"),
    ],
)
def test_what_cannot_be_is_a_sentence(database: str, run: Run, arguments: list[str], sentence: str) -> None:
    run("token", "create", "--name", "there", "--db", database)

    failed = run("token", *arguments, "--db", database, fails=True)

    assert failed.stderr.startswith(f"fp8scope: {sentence}")
    assert "fp8s_" not in failed.stdout


# the gate


def token(number: int = 1, **fields: Any) -> Token:
    """A token whose secret is `secret-<number>`."""
    plain: dict[str, Any] = dict.fromkeys(("project", "run", "expires_unix_ns", "revoked_unix_ns", "last_used_unix_ns"))
    named = {"id": number, "name": f"t{number}", "scope": "ingest", "created_unix_ns": 0, **plain, **fields}
    return Token(**named, secret_sha256=digest(f"secret-{number}"))


def refusal(known: Token, shown: list[str], opening: Any, now: int = 100) -> tuple[str, str]:
    """The status and sentence that an agent gets, ("OK", "") where it may send."""

    async def ask() -> tuple[str, str]:
        gate = Gate(lambda: [token(9, scope="admin"), known], lambda *_: None, lambda: now)
        try:
            gate.admit(await gate.identify(shown), decode_open(opening, Limits()))
        except RefusedError as refused:
            return refused.code.name, str(refused)
        finally:
            gate.close()
        return "OK", ""

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({}, "OK", ""),
        ({"scope": "admin"}, "OK", ""),
        ({"project": "team"}, "OK", ""),
        ({"project": "team", "run": "gpt"}, "OK", ""),
        ({"run": "gpt"}, "OK", ""),
        ({"expires_unix_ns": 101}, "OK", ""),
        ({"scope": "read"}, "PERMISSION_DENIED", "token 't1' has scope read; sending needs scope ingest"),
        ({"project": "other"}, "PERMISSION_DENIED", "token 't1' is for project 'other'; this run is of 'team'"),
        ({"project": ""}, "PERMISSION_DENIED", "token 't1' is for project ''; this run is of 'team'"),
        ({"run": "gp"}, "PERMISSION_DENIED", "token 't1' is for run 'gp'; this is run 'gpt'"),
        ({"project": "team", "run": "x"}, "PERMISSION_DENIED", "is for run 'x'"),
        ({"project": "x", "run": "gpt"}, "PERMISSION_DENIED", "is for project 'x'"),
        ({"expires_unix_ns": 100}, "UNAUTHENTICATED", "token 't1' expired on 1970-01-01 00:00:00 UTC"),
        ({"revoked_unix_ns": 5}, "UNAUTHENTICATED", "token 't1' was revoked on 1970-01-01 00:00:00 UTC"),
        ({"scope": "admin", "revoked_unix_ns": 5}, "UNAUTHENTICATED", "was revoked"),
    ],
)
def test_a_token_opens_what_it_is_for_and_nothing_else(
    wire: Any, fields: dict[str, Any], status: str, words: str
) -> None:
    got = refusal(token(**fields), ["Bearer secret-1"], wire.open("gpt", project="team"))

    assert got[0] == status
    assert words in got[1]
    assert status == "OK" or "`fp8scope token create` makes one" in got[1]


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ([], "no token came"),
        (["Bearer secret-2"], "the token is not known to this collector"),
        (["Bearer secret-"], "the token is not known"),
        (["Bearer " + digest("secret-1")], "the token is not known"),
        (["secret-1"], "is not 'Bearer TOKEN'"),
        (["Basic secret-1"], "is not 'Bearer TOKEN'"),
        (["Bearer "], "is not 'Bearer TOKEN'"),
        (["Bearer secret-1", "Bearer secret-1"], "is not 'Bearer TOKEN'"),
    ],
)
def test_what_is_no_known_token_is_told_without_repeating_it(
    wire: Any, monkeypatch: pytest.MonkeyPatch, shown: list[str], words: str
) -> None:
    monkeypatch.setattr(auth, "REFRESH_S", 0.01)

    status, sentence = refusal(token(), shown, wire.open("gpt"))

    assert status == "UNAUTHENTICATED"
    assert words in sentence
    assert "secret" not in sentence


def test_a_token_made_a_moment_ago_is_good_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "REFRESH_S", 0.05)
    stored: list[Token] = []

    async def ask() -> Token:
        gate = Gate(lambda: list(stored), lambda *_: None)
        stored.append(token())
        try:
            return await gate.identify(["Bearer secret-1"])
        finally:
            gate.close()

    assert asyncio.run(ask()) == token()


def test_a_database_that_is_away_locks_nobody_out_and_refuses_nobody_for_good(
    wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "REFRESH_S", 0.02)
    answers: list[list[Token]] = [[token()]]
    clock = [100]

    async def ask() -> RefusedError:
        gate = Gate(lambda: answers.pop(), lambda *_: None, lambda: clock[0])
        await asyncio.sleep(0.1)
        try:
            gate.admit(await gate.identify(["Bearer secret-1"]), decode_open(wire.open("gpt"), Limits()))
            with pytest.raises(RefusedError) as refused:
                await gate.identify(["Bearer secret-2"])
        finally:
            gate.close()
        return refused.value

    refused = asyncio.run(ask())

    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert "the database with the tokens does not answer; try again later" in str(refused)


def test_metrics_are_for_tokens_that_may_read() -> None:
    known = [token(1), token(2, scope="read"), token(3, scope="admin"), token(4, scope="read", revoked_unix_ns=1)]

    async def ask() -> list[str]:
        gate = Gate(lambda: known, lambda *_: None)
        answers = []
        for number in range(1, 6):
            try:
                await asyncio.to_thread(gate.check_reader, [f"Bearer secret-{number}"])
                answers.append("OK")
            except RefusedError as refused:
                answers.append(refused.code.name)
        gate.close()
        return answers

    assert asyncio.run(ask()) == ["PERMISSION_DENIED", "OK", "OK", "UNAUTHENTICATED", "UNAUTHENTICATED"]
