"""Tokens in the database: made, listed, revoked, and read by the collector that checks them.

A secret is 256 random bits, shown once by `create` and stored as its SHA-256 only: a hash that is slow on purpose
protects secrets that people choose, and nobody guesses these. Revoked and expired tokens stay in the table, so that
whoever still uses one can be told what happened to it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import sqlalchemy as sa

from fp8scope_collector.storage import audit, schema

PREFIX = "fp8s_"  # by which people and secret scanners recognise one
Scope = Literal["ingest", "read", "admin"]
State = Literal["active", "expired", "revoked"]


class TokenError(Exception):
    """A token that cannot be made or found; the text is for the user."""


@dataclass(frozen=True)
class Token:
    """One token. `project` and `run` say which runs it may send, None: every one."""

    id: int
    name: str
    scope: Scope
    project: str | None
    run: str | None
    created_unix_ns: int
    expires_unix_ns: int | None
    revoked_unix_ns: int | None
    last_used_unix_ns: int | None
    secret_sha256: str = field(repr=False)
    max_rows_per_s: int | None = None
    max_streams: int | None = None
    max_runs: int | None = None

    def state(self, now_unix_ns: int) -> State:
        """Whether it is good at that time."""
        if self.revoked_unix_ns is not None:
            return "revoked"
        expired = self.expires_unix_ns is not None and self.expires_unix_ns <= now_unix_ns
        return "expired" if expired else "active"


def digest(secret: str) -> str:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create(
    engine: sa.Engine,
    *,
    name: str,
    scope: Scope,
    project: str | None,
    run: str | None,
    expires_unix_ns: int | None,
    now_unix_ns: int,
    actor: str = "unknown",
    max_rows_per_s: int | None = None,
    max_streams: int | None = None,
    max_runs: int | None = None,
) -> str:
    """The secret of a new token: nobody can have it a second time.

    Raises:
        TokenError: another token has that name.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    values = {
        "name": name,
        "secret_sha256": digest(secret),
        "scope": scope,
        "project": project,
        "run": run,
        "created_unix_ns": now_unix_ns,
        "expires_unix_ns": expires_unix_ns,
        "max_rows_per_s": max_rows_per_s,
        "max_streams": max_streams,
        "max_runs": max_runs,
    }
    try:
        with engine.begin() as connection:
            connection.execute(sa.insert(schema.token).values(values))
            audit.record(
                connection, at_unix_ns=now_unix_ns, actor=actor, action="token create", subject=name, scope=scope
            )
    except sa.exc.IntegrityError:
        raise TokenError(f"there is a token {name!r} already, maybe a revoked one; choose another name") from None
    return secret


def read_all(engine: sa.Engine) -> tuple[Token, ...]:
    """Every token there ever was, the oldest first."""
    with engine.connect() as connection:
        rows = connection.execute(sa.select(schema.token).order_by(schema.token.c.id))
        return tuple(Token(**row) for row in rows.mappings())


def find(engine: sa.Engine, ref: str) -> Token:
    """The token with that name, or that id.

    Raises:
        TokenError: there is none.
    """
    tokens = read_all(engine)
    for token in tokens:
        if ref in (token.name, str(token.id)):
            return token
    names = ", ".join(token.name for token in tokens) or "none"
    raise TokenError(f"token {ref!r} is unknown; there are: {names}")


def revoke(engine: sa.Engine, token_id: int, *, now_unix_ns: int, actor: str = "unknown") -> None:
    """Makes the token worthless from now on; one that was revoked before keeps its time."""
    table = schema.token
    with engine.begin() as connection:
        name = connection.execute(
            sa.update(table)
            .where(table.c.id == token_id, table.c.revoked_unix_ns.is_(None))
            .values(revoked_unix_ns=now_unix_ns)
            .returning(table.c.name)
        ).scalar_one_or_none()
        if name is not None:
            audit.record(connection, at_unix_ns=now_unix_ns, actor=actor, action="token revoke", subject=name)


def note_used(engine: sa.Engine, used: Mapping[int, int]) -> None:
    """Records when tokens were used last: Unix nanoseconds by id."""
    table = schema.token
    now = sa.bindparam("now", type_=sa.BigInteger)
    with engine.begin() as connection:
        connection.execute(
            sa.update(table).where(table.c.id == sa.bindparam("token_id")).values(last_used_unix_ns=now),
            [{"token_id": token_id, "now": unix_ns} for token_id, unix_ns in sorted(used.items())],
        )
