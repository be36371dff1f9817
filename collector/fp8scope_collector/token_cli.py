"""`fp8scope token`: make, list and revoke the tokens that agents and Prometheus show to a collector.

A secret is printed once, alone on standard output, so that it can go straight into a file: `(umask 077; fp8scope token
create --name node-7 > token)`. What is said about it goes to standard error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fp8scope_collector.config import ConfigError
from fp8scope_collector.limits import Limits
from fp8scope_collector.options import AsJson, Database, duration_s
from fp8scope_collector.storage import tokens
from fp8scope_collector.storage.audit import this_user
from fp8scope_collector.storage.engine import DEFAULT_URL, display_url, migrate, open_engine

app = typer.Typer(help="Make, list and revoke tokens.", no_args_is_help=True)


@app.command()
def create(
    name: Annotated[str, typer.Option(help="By which you will know it; not a secret.")],
    scope: Annotated[
        tokens.Scope,
        typer.Option(help="ingest: send runs. read: see /metrics. admin: both."),
    ] = "ingest",
    project: Annotated[str | None, typer.Option(help="Send runs of this project only; '' are those without.")] = None,
    run: Annotated[str | None, typer.Option(help="Send runs of this name only.")] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="30d|12h|90m", help="How long it is good; else for ever.")
    ] = None,
    max_rows_per_s: Annotated[int | None, typer.Option(min=1, help="Rows a second; more wait.")] = None,
    max_streams: Annotated[int | None, typer.Option(min=1, help="Ranks connected at once, to each collector.")] = None,
    max_runs: Annotated[int | None, typer.Option(min=1, help="Runs that it may make.")] = None,
    db: Database = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Make a token and print its secret, which is stored nowhere."""
    now = time.time_ns()
    for option, text in [("--name", name), ("--project", project or "-"), ("--run", run or "-")]:
        _check_name(option, text)
    if name.isdecimal():
        raise ConfigError(f"--name is {name!r}; expected a word, as numbers are the tokens' ids")
    if scope != "ingest" and (project is not None or run is not None):
        raise ConfigError(f"--project and --run restrict what a token of scope ingest may send, not scope {scope}")
    expires_unix_ns = now + duration_s("--expires", expires) * 10**9 if expires is not None else None
    engine = open_engine(db)
    migrate(engine)
    secret = tokens.create(
        engine,
        name=name,
        scope=scope,
        project=project,
        run=run,
        expires_unix_ns=expires_unix_ns,
        now_unix_ns=now,
        actor=this_user(),
        max_rows_per_s=max_rows_per_s,
        max_streams=max_streams,
        max_runs=max_runs,
    )
    print(f"token {name!r} is in {display_url(engine.url)}; its secret is shown only now:", file=sys.stderr)
    print(json.dumps({"name": name, "secret": secret}) if as_json else secret, flush=True)


@app.command("list")
def list_tokens(
    db: Database = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List the tokens, the oldest first; never a secret."""
    now = time.time_ns()
    found = tokens.read_all(open_engine(db, read_only=True))
    if as_json:
        typer.echo(json.dumps([_public(token, now) for token in found], indent=2))
    else:
        _print_table(found, now)


@app.command()
def revoke(
    token: Annotated[str, typer.Argument(metavar="NAME|ID", help="A token's name or id.")],
    db: Database = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Make a token worthless; collectors end its streams within two seconds."""
    found = tokens.find(open_engine(db, read_only=True), token)
    tokens.revoke(open_engine(db), found.id, now_unix_ns=time.time_ns(), actor=this_user())
    print(f"token {found.name!r} is revoked", file=sys.stderr)
    if as_json:
        print(json.dumps({"id": found.id, "name": found.name, "state": "revoked"}))


def _check_name(option: str, text: str) -> None:
    longest = Limits().name_chars
    if not text.strip() or len(text) > longest or not text.isprintable():
        raise ConfigError(f"{option} is {text!r}; expected at most {longest} printable characters")


def _public(token: tokens.Token, now_unix_ns: int) -> dict[str, Any]:
    """All that may be shown of a token."""
    return {
        "id": token.id,
        "name": token.name,
        "scope": token.scope,
        "project": token.project,
        "run": token.run,
        "state": token.state(now_unix_ns),
        "created_unix_ns": token.created_unix_ns,
        "expires_unix_ns": token.expires_unix_ns,
        "revoked_unix_ns": token.revoked_unix_ns,
        "last_used_unix_ns": token.last_used_unix_ns,
        "max_rows_per_s": token.max_rows_per_s,
        "max_streams": token.max_streams,
        "max_runs": token.max_runs,
    }


def _print_table(found: Sequence[tokens.Token], now_unix_ns: int) -> None:
    rows = [("ID", "NAME", "SCOPE", "PROJECT", "RUN", "STATE", "EXPIRES", "LAST USED")]
    for token in found:
        project, run = ("any" if part is None else repr(part) for part in (token.project, token.run))
        expires = "never" if token.expires_unix_ns is None else _when(token.expires_unix_ns)
        used = "never" if token.last_used_unix_ns is None else _when(token.last_used_unix_ns)
        state = token.state(now_unix_ns)
        rows.append((str(token.id), token.name, token.scope, project, run, state, expires, used))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _when(unix_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_ns / 1e9))
