"""The command `fp8scope`: run a collector, list runs, export one, open the dashboard; tokens and upkeep are beside it.

Each option can be given by an environment variable too. What a user can cause ends in one sentence and exit code 1.
Each command imports what it needs itself: a collector starts without Arrow, a list of runs without gRPC.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import sqlalchemy as sa
import typer

from fp8scope_collector import token_cli, upkeep_cli
from fp8scope_collector.config import ConfigError, parse_address, serve_config
from fp8scope_collector.logs import log_to_stderr
from fp8scope_collector.options import AsJson, Database, Run, duration_s
from fp8scope_collector.storage.acknowledge import AcknowledgeError
from fp8scope_collector.storage.engine import DEFAULT_URL
from fp8scope_collector.storage.readmodels import RunNotFound, RunSummary
from fp8scope_collector.storage.stats_store import StorageError
from fp8scope_collector.storage.tokens import TokenError

app = typer.Typer(
    help="Watches FP8 training: stores what agents send, exports it, shows it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(token_cli.app, name="token")
for _name in ("prune", "delete", "migrate", "backup", "audit", "doctor"):
    app.command(_name)(getattr(upkeep_cli, f"{_name}_command"))


def main() -> None:
    """Runs the command line; what the user can put right is said in one sentence."""
    try:
        app()
    except BrokenPipeError:  # `fp8scope export ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno == errno.EPIPE:
            sys.exit(1)
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")
    except sa.exc.DBAPIError as error:
        _fail(f"the database failed: {' '.join(str(error.orig).split())}")
    except (StorageError, ConfigError, RunNotFound, TokenError, AcknowledgeError) as error:
        _fail(str(error))


def _fail(sentence: str) -> None:
    print(f"fp8scope: {sentence}", file=sys.stderr)
    sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        from fp8scope_collector.server import VERSION

        typer.echo(f"fp8scope {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    db: Database = DEFAULT_URL,
    grpc: Annotated[
        str, typer.Option(envvar="FP8SCOPE_GRPC", metavar="HOST:PORT", help="Where agents connect.")
    ] = "127.0.0.1:4327",
    metrics: Annotated[
        str, typer.Option(envvar="FP8SCOPE_METRICS", metavar="HOST:PORT", help="Where /metrics and /healthz are.")
    ] = "127.0.0.1:9464",
    auth: Annotated[
        Literal["tokens", "none"] | None,
        typer.Option(
            envvar="FP8SCOPE_AUTH",
            help="Whether agents have to show a token; else only where other machines reach --grpc without --insecure.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(envvar="FP8SCOPE_TLS_CERT", help="PEM: the server's certificate and its chain.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="FP8SCOPE_TLS_KEY", help="PEM: the private key.")] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(envvar="FP8SCOPE_TLS_CLIENT_CA", help="PEM: agents need a certificate signed by this one."),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            envvar="FP8SCOPE_INSECURE",
            help="Let other machines reach it without TLS and tokens: for a private network.",
        ),
    ] = False,
    insecure_metrics: Annotated[
        bool,
        typer.Option(
            "--insecure-metrics",
            envvar="FP8SCOPE_INSECURE_METRICS",
            help="The same for --metrics only.",
        ),
    ] = False,
    retention: Annotated[
        str | None,
        typer.Option(
            envvar="FP8SCOPE_RETENTION",
            metavar="30d|12h|90m",
            help="Delete raw rows of this age; rollups stay. Else nothing is deleted.",
        ),
    ] = None,
    diagnosis: Annotated[
        Literal["on", "off"],
        typer.Option(envvar="FP8SCOPE_DIAGNOSIS", help="Whether runs are diagnosed while they go on."),
    ] = "on",
    notify: Annotated[
        str,
        typer.Option(
            envvar="FP8SCOPE_NOTIFY", metavar="URL", help="A webhook that hears of findings (docs/alerts.md)."
        ),
    ] = "",
    notify_form: Annotated[
        Literal["json", "slack"],
        typer.Option(envvar="FP8SCOPE_NOTIFY_FORM", help="What the webhook takes: our JSON, or Slack's."),
    ] = "json",
    notify_severity: Annotated[
        Literal["info", "warning", "critical"],
        typer.Option(envvar="FP8SCOPE_NOTIFY_SEVERITY", help="From which severity on."),
    ] = "warning",
    dashboard_url: Annotated[
        str,
        typer.Option(envvar="FP8SCOPE_DASHBOARD_URL", metavar="URL", help="Where people reach the dashboard."),
    ] = "http://127.0.0.1:8501",
) -> None:
    """Run a collector: take what agents send and store it durably."""
    from fp8scope_collector.server import serve as run_server

    config = serve_config(
        db=db,
        grpc=grpc,
        metrics=metrics,
        auth=auth,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        insecure=insecure,
        insecure_metrics=insecure_metrics,
        retention_s=None if retention is None else duration_s("--retention", retention),
        diagnosis=diagnosis == "on",
        notify=notify,
        notify_form=notify_form,
        notify_severity=notify_severity,
        dashboard_url=dashboard_url,
    )
    log_to_stderr()
    asyncio.run(run_server(config, lambda line: print(line, flush=True)))


@app.command()
def runs(
    db: Database = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON array instead of a table.")] = False,
) -> None:
    """List the runs, the one heard from last first."""
    from fp8scope_collector.storage.reader import Reader

    found = Reader(db).runs()
    if as_json:
        typer.echo(json.dumps([{"run": run.ref} | dataclasses.asdict(run) for run in found], indent=2))
    else:
        _print_table(found)


@app.command()
def export(
    run: Run,
    out: Annotated[str, typer.Option("--out", help="The file to write, replaced when complete; - is standard output.")],
    db: Database = DEFAULT_URL,
    file_format: Annotated[Literal["csv", "parquet"], typer.Option("--format", help="csv or parquet.")] = "csv",
    as_json: AsJson = False,
) -> None:
    """Write all rows of a run to a file."""
    from fp8scope_collector.export import write_rows
    from fp8scope_collector.storage.reader import Reader

    reader = Reader(db)
    rows = write_rows(reader.rows(reader.run(run).id), file_format, out)
    if not rows:
        raise ConfigError(f"run {run!r} has no rows; nothing was written")
    if as_json and out != "-":
        print(json.dumps({"run": run, "rows": rows, "file": out}))
    else:
        print(f"{rows:,} rows of {run} written to {'standard output' if out == '-' else out}", file=sys.stderr)


@app.command()
def diagnose(
    run: Run,
    db: Database = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object instead of text.")] = False,
) -> None:
    """Say what goes wrong in a run: which tensor, since when, why, and what to do; worst first."""
    from fp8scope_collector.diagnosis.command import diagnosis_of

    for line in diagnosis_of(db, run, as_json=as_json):
        typer.echo(line)


@app.command()
def advise(
    run: Run,
    db: Database = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object instead of text.")] = False,
) -> None:
    """Say which constant scales a run would have borne, and how often its scales need computing anew."""
    from fp8scope_collector.advisers.command import advice_of

    for line in advice_of(db, run, as_json=as_json):
        typer.echo(line)


@app.command()
def findings(
    run: Annotated[str | None, typer.Argument(help="A run's name, or project/name; else all runs.")] = None,
    db: Database = DEFAULT_URL,
    everything: Annotated[bool, typer.Option("--all", help="Closed ones too.")] = False,
    severity: Annotated[Literal["info", "warning", "critical"], typer.Option(help="From this one on.")] = "warning",
    as_json: Annotated[bool, typer.Option("--json", help="A JSON array instead of a table.")] = False,
) -> None:
    """List what the collector's diagnosis found, worst first; `fp8scope diagnose` looks anew."""
    from fp8scope_collector.storage.reader import Reader

    reader = Reader(db)
    found = reader.findings(reader.run(run).id if run else None, open_only=not everything, severity=severity)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
        return
    rows = [("ID", "SEVERITY", "RULE", "RUN", "TENSOR", "STEPS", "STATE", "EVIDENCE")]
    for finding in found:
        steps = f"{finding.first_step}-{finding.last_step}"
        state = finding.ending or ("open" if finding.acknowledged_unix_ns is None else "acknowledged")
        rows.append(
            (
                str(finding.id),
                finding.severity,
                finding.rule,
                finding.run,
                finding.tensor,
                steps,
                state,
                finding.evidence,
            )
        )
    _print_columns(rows)


@app.command()
def ack(
    finding: Annotated[int, typer.Argument(help="A finding's number, as `fp8scope findings` has it.")],
    reason: Annotated[str, typer.Option(help="Why it needs nobody else: what was done, or why nothing.")] = "",
    by: Annotated[str, typer.Option(help="Who says so.")] = "",
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take an acknowledgement back.")] = False,
    db: Database = DEFAULT_URL,
) -> None:
    """Acknowledge a finding: somebody has seen it, and why that is enough."""
    import getpass

    from fp8scope_collector.storage.acknowledge import Acknowledger

    acknowledger = Acknowledger(db)
    if withdraw:
        found = acknowledger.withdraw(finding)
        print(f"finding {found.id} ({found.rule}, {found.tensor}) is acknowledged no more", file=sys.stderr)
        return
    found = acknowledger.acknowledge(finding, by=by or getpass.getuser(), reason=reason)
    print(
        f"finding {found.id} ({found.rule}, {found.tensor}) is acknowledged by {found.acknowledged_by}", file=sys.stderr
    )


@app.command("clickhouse-ddl")
def clickhouse_ddl(
    cluster: Annotated[str | None, typer.Option(help="A cluster's name: sharded and replicated tables.")] = None,
) -> None:
    """Print the SQL of ClickHouse's tables, which a collector creates itself where it may."""
    from fp8scope_collector.storage.clickhouse_ddl import create_tables

    typer.echo("\n\n".join(f"{statement};" for statement in create_tables(cluster)))


@app.command()
def dashboard(
    db: Database = DEFAULT_URL,
    listen: Annotated[
        str, typer.Option(envvar="FP8SCOPE_LISTEN", metavar="HOST:PORT", help="Where the browser connects.")
    ] = "127.0.0.1:8501",
    login: Annotated[
        Path | None,
        typer.Option(
            envvar="FP8SCOPE_LOGIN", metavar="FILE", help=r"Who may look: a TOML file with \[auth] and allow."
        ),
    ] = None,
) -> None:
    """Open the dashboard (the package fp8scope-dashboard)."""
    address = parse_address("--listen", listen)
    command = ["fp8scope_dashboard", "--db", db, "--listen", str(address)]
    _run_of_dashboard(command if login is None else [*command, "--login", str(login)])


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run's name, or project/name.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")],
    db: Database = DEFAULT_URL,
) -> None:
    """Write a run as one HTML file that needs no server (the package fp8scope-dashboard)."""
    _run_of_dashboard(["fp8scope_dashboard.report", run, "--db", db, "--out", str(out)])


def _run_of_dashboard(module_and_arguments: list[str]) -> NoReturn:
    """Goes on as a module of the dashboard, which is a package of its own."""
    if importlib.util.find_spec("fp8scope_dashboard") is None:
        raise ConfigError("the dashboard is not installed; run `pip install fp8scope-dashboard`")
    os.execv(sys.executable, [sys.executable, "-m", *module_and_arguments])


def _print_table(found: list[RunSummary]) -> None:
    rows = [("RUN", "STATE", "STEPS", "ROWS", "RANKS", "DROPPED", "LAST SEEN", "TAGS")]
    for run in found:
        steps = "" if run.last_step is None else f"{run.first_step}-{run.last_step}"
        seen = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.last_seen_unix_ns / 1e9))
        ranks = f"{run.ranks}/{run.world_size}"
        rows.append(
            (run.ref, run.state, steps, f"{run.rows:,}", ranks, f"{run.dropped_rows:,}", seen, " ".join(run.tags))
        )
    _print_columns(rows)


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
