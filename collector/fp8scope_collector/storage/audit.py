"""Who wrote and deleted what: one row for each source that opened, each deletion, each token made or revoked.

Entries are written in the transaction of what they are about, so there is none without the other, and they outlive it.
They hold names, never a secret. Nothing in the program changes or deletes them.
"""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from fp8scope_collector.storage import schema

Action = Literal["open", "prune", "delete", "token create", "token revoke"]


@dataclass(frozen=True)
class Entry:
    """One thing that somebody did. `subject` is a run (project/name) or a token's name."""

    at_unix_ns: int
    actor: str
    action: Action
    subject: str
    detail: Mapping[str, Any]


def record(
    connection: sa.Connection, *, at_unix_ns: int, actor: str, action: Action, subject: str, **detail: Any
) -> None:
    """Adds an entry, within the caller's transaction."""
    values = {"at_unix_ns": at_unix_ns, "actor": actor, "action": action, "subject": subject}
    connection.execute(sa.insert(schema.audit).values(**values, detail_json=json.dumps(detail)))


def entries(engine: sa.Engine, *, subject: str | None = None, limit: int = 100) -> list[Entry]:
    """The newest entries, the newest last; with `subject` those about this run or token only."""
    table = schema.audit
    newest = sa.select(table).order_by(table.c.id.desc()).limit(limit)
    if subject is not None:
        newest = newest.where(table.c.subject == subject)
    with engine.connect() as connection:
        rows = connection.execute(newest).all()
    return [
        Entry(row.at_unix_ns, row.actor, row.action, row.subject, json.loads(row.detail_json)) for row in rows[::-1]
    ]


def this_user() -> str:
    """The actor of a command: USER@HOST."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
