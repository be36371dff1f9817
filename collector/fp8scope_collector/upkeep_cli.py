"""`fp8scope prune | delete | migrate | backup | audit | doctor`: keeping a database small, whole and known.

What a command did goes to standard output, as a sentence or with --json as an object; progress goes to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fp8scope_collector.config import ConfigError
from fp8scope_collector.options import AsJson, Database, Progress, Run, bytes_text, duration_s
from fp8scope_collector.storage import audit as audit_log
from fp8scope_collector.storage.engine import (
    DEFAULT_URL,
    display_url,
    migrate,
    newest_version,
    open_engine,
    open_stats,
    stored_version,
)


def prune_command(
    older_than: Annotated[str, typer.Option("--older-than", metavar="30d|12h|90m", help="Age of what is deleted.")],
    run: Annotated[str | None, typer.Option(help="Of this run only.")] = None,
    db: Database = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Delete raw rows of an age; rollups, scalars and findings stay. `serve --retention` does it by itself."""
    from fp8scope_collector.storage import retention

    seconds = duration_s("--older-than", older_than)
    run_id = _find(db, run).id if run is not None else None
    engine = open_engine(db)
    migrate(engine)
    progress = Progress("deleting", "rows")
    pruned = retention.prune(
        engine,
        open_stats(engine),
        older_than_ns=seconds * 10**9,
        now_unix_ns=time.time_ns(),
        actor=audit_log.this_user(),
        run_id=run_id,
        report=progress,
    )
    progress.end()
    rows = sum(each.rows for each in pruned)
    before, after = _release(engine) if rows else (0, 0)
    by_run: dict[str, int] = {}
    for each in pruned:
        by_run[each.run] = by_run.get(each.run, 0) + each.rows
    lines = [f"{count:,} rows of {name}" for name, count in by_run.items()]
    text = f"{rows:,} rows older than {older_than} deleted" + _room(before, after)
    said = {"rows": rows, "runs": by_run, "bytes_before": before, "bytes_after": after}
    _say(as_json, said, "\n".join([*lines, text]))


def delete_command(
    run: Run,
    force: Annotated[bool, typer.Option("--force", help="Even if its agents still send.")] = False,
    db: Database = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Delete a run and all that is stored of it, and give its room back."""
    from fp8scope_collector.storage import retention

    found = _find(db, run)
    if found.state == "running" and not force:
        raise ConfigError(f"run {found.ref!r} is running: its agents would begin it anew; end it first, or say --force")
    engine = open_engine(db)
    migrate(engine)
    progress = Progress(f"deleting {found.ref}", "rows")
    rows = retention.delete_run(
        engine,
        open_stats(engine),
        found.id,
        now_unix_ns=time.time_ns(),
        actor=audit_log.this_user(),
        report=progress,
    )
    progress.end()
    before, after = _release(engine)
    _say(
        as_json,
        {"run": found.ref, "rows": rows, "bytes_before": before, "bytes_after": after},
        f"run {found.ref} deleted, {rows:,} rows" + _room(before, after),
    )


def migrate_command(db: Database = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Bring the tables up to this version, or make them; `serve` does it by itself."""
    engine = open_engine(db)
    before = stored_version(engine)
    migrate(engine)
    after = newest_version()
    where = display_url(engine.url)
    text = f"{where} has tables of version {after} now; it had {before or 'none'}"
    _say(
        as_json,
        {"database": where, "from": before, "to": after},
        text if before != after else f"{where} is up to date: {after}",
    )


def backup_command(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="Replaced when the copy is complete.")],
    db: Database = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Copy the database to a file, while collectors write: SQLite as a database, PostgreSQL as pg_dump's archive."""
    from fp8scope_collector.backup import back_up, beside

    hint = beside(db)
    started = time.monotonic()
    progress = Progress("copying", "pages")
    size = back_up(db, out, progress)
    progress.end()
    seconds = time.monotonic() - started
    _say(
        as_json,
        {"file": str(out), "bytes": size, "seconds": round(seconds, 3)} | ({"missing": hint} if hint else {}),
        f"{out}: {bytes_text(size)} in {seconds:.1f} s" + (f"; {hint}" if hint else ""),
    )


def audit_command(
    subject: Annotated[str | None, typer.Argument(metavar="[RUN|TOKEN]", help="Only what is about it.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="The newest so many.")] = 100,
    db: Database = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Say who sent, pruned and deleted which run, and who made and revoked which token."""
    found = audit_log.entries(open_engine(db, read_only=True), subject=subject, limit=limit)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(entry) for entry in found], indent=2))
        return
    for entry in found:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at_unix_ns / 1e9))
        detail = " ".join(f"{key}={value}" for key, value in entry.detail.items())
        typer.echo(f"{when}  {entry.actor}  {entry.action}  {entry.subject}  {detail}".rstrip())


def doctor_command(
    db: Database = DEFAULT_URL,
    grpc: Annotated[
        str, typer.Option(envvar="FP8SCOPE_GRPC", metavar="HOST:PORT", help="Where the collector listens.")
    ] = "127.0.0.1:4327",
    metrics: Annotated[
        str, typer.Option(envvar="FP8SCOPE_METRICS", metavar="HOST:PORT", help="Where its /healthz is.")
    ] = "127.0.0.1:9464",
    tls_cert: Annotated[Path | None, typer.Option(envvar="FP8SCOPE_TLS_CERT", help="The collector's own.")] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="FP8SCOPE_TLS_KEY", help="The collector's own.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(envvar="FP8SCOPE_TLS_CLIENT_CA", help="The collector's own.")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read all of a SQLite file and check it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with this installation and what to do, with the options of `serve`. Exit code 1: a problem."""
    from fp8scope_collector.config import parse_address
    from fp8scope_collector.doctor import Installation, examine

    installation = Installation(
        db=db,
        grpc=parse_address("--grpc", grpc),
        metrics=parse_address("--metrics", metrics),
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
    )
    symptoms = examine(installation, now_unix_ns=time.time_ns(), deep=deep)
    wrong = [symptom for symptom in symptoms if symptom.level != "ok"]
    lines = [f"{symptom.level}: {symptom.sentence}" for symptom in symptoms]
    lines.append(f"{len(wrong)} of {len(symptoms)} need attention" if wrong else "nothing is wrong")
    _say(as_json, {"symptoms": [dataclasses.asdict(symptom) for symptom in symptoms]}, "\n".join(lines))
    if any(symptom.level == "problem" for symptom in symptoms):
        raise typer.Exit(1)


def _find(db: str, run: str) -> Any:
    from fp8scope_collector.storage.reader import Reader

    reader = Reader(db)
    try:
        return reader.run(run)
    finally:
        reader.close()


def _release(engine: Any) -> tuple[int, int]:
    from fp8scope_collector.storage import retention

    if retention.needs_rewriting(engine):
        typer.echo(
            "this file was made without incremental vacuum and is written anew, once: that takes as much room again, "
            "and collectors wait until it is done",
            err=True,
        )
    progress = Progress("giving room back", "pages")
    sizes = retention.release(engine, progress)
    progress.end()
    return sizes


def _room(before: int, after: int) -> str:
    if before <= after:
        return ""
    return f"; the database shrank from {bytes_text(before)} to {bytes_text(after)}"


def _say(as_json: bool, said: dict[str, Any], text: str) -> None:
    typer.echo(json.dumps(said) if as_json else text)
