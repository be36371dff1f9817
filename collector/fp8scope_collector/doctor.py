"""What is wrong with an installation, in sentences that end with what to do: the checks behind `fp8scope doctor`.

Nothing here changes anything, needs a collector to run, or stops at the first fault: each check is by itself, and one
that cannot be made says so. `problem` is what loses data or keeps agents out, `warning` what will.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import stat
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import grpc
import sqlalchemy as sa
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fp8scope_collector.config import Address, ConfigError, TlsFiles
from fp8scope_collector.options import bytes_text
from fp8scope_collector.storage import schema, tokens
from fp8scope_collector.storage.clickhouse_http import find, holder
from fp8scope_collector.storage.engine import display_url, newest_version, open_engine, open_stats, stored_version
from fp8scope_collector.storage.overview import recent_runs
from fp8scope_collector.storage.stats_store import StorageError
from fp8scope_collector.tls import Certificate, expires_unix_ns, first_pem

Level = Literal["ok", "warning", "problem"]

SOON_NS = 14 * 86400 * 10**9  # before a token or a certificate expires
SKEW_NS = 60 * 10**9
STALE_NS = 300 * 10**9
LITTLE_BYTES = 1 << 30  # of disk
LARGE_WAL_BYTES = 1 << 30
DISTRIBUTIONS = ("fp8core", "fp8scope-protos", "fp8scope-collector", "fp8scope-dashboard", "fp8scope-agent")
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "lustre", "glusterfs")


@dataclass(frozen=True)
class Installation:
    """The settings of `serve` that can be looked into."""

    db: str
    grpc: Address
    metrics: Address
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None


@dataclass(frozen=True)
class Symptom:
    """What one check found."""

    level: Level
    check: str
    sentence: str


Found = Iterator[tuple[Level, str]]


def examine(installation: Installation, *, now_unix_ns: int, deep: bool = False) -> list[Symptom]:
    """All that can be said, in the order in which to put it right."""
    symptoms: list[Symptom] = []

    def check(name: str, found: Callable[[], Found]) -> bool:
        before = len(symptoms)
        try:
            symptoms.extend(Symptom(level, name, sentence) for level, sentence in found())
        except (StorageError, ConfigError, OSError, sa.exc.SQLAlchemyError) as error:
            symptoms.append(Symptom("problem", name, " ".join(str(getattr(error, "orig", error)).split())))
        return all(symptom.level != "problem" for symptom in symptoms[before:])

    check("versions", _versions)
    engine: sa.Engine | None = None
    if check("files", lambda: _files(installation.db)):
        with contextlib.suppress(StorageError):
            engine = open_engine(installation.db, read_only=True)
        check("schema", lambda: _schema(installation.db))
    if engine is not None:
        known = engine
        check("settings", lambda: _settings(known, deep=deep))
        check("statistics", lambda: _statistics(known))
        check("clock", lambda: _clock(known, now_unix_ns))
        check("sources", lambda: _sources(known, now_unix_ns))
        check("tokens", lambda: _tokens(known, now_unix_ns))
        engine.dispose()
    if installation.tls_cert:
        check("certificate", lambda: _certificate(installation, now_unix_ns))
    check("collector", lambda: _collector(installation))
    return symptoms


def _versions() -> Found:
    found: dict[str, str] = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} {number}" for name, number in found.items())
        yield "problem", f"the distributions are of different versions ({listed}); install all of one version"
    else:
        yield "ok", f"fp8scope {found['fp8scope-collector']}: {', '.join(found)}"


def _files(url: str) -> Found:
    """The disk below a SQLite file: whether it may be written, how full it is, and of what kind."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise StorageError(f"the database URL is malformed: {error}") from None
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return
    path = Path(parsed.database).absolute()
    folder = path.parent
    if not folder.is_dir():
        yield "problem", f"the directory {str(folder)!r} does not exist; create it, or give another --db"
        return
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        yield "problem", f"{str(path)!r} or its directory is not writable by this user; SQLite needs both"
    wal = Path(f"{path}-wal")
    if wal.exists() and wal.stat().st_size > LARGE_WAL_BYTES:
        yield (
            "warning",
            f"{wal.name} has {bytes_text(wal.stat().st_size)}: a reader that does not end keeps it from shrinking; "
            "restart the dashboard",
        )
    yield _room(folder)
    if (kind := _file_system(folder)) in NETWORK_FILE_SYSTEMS:
        yield (
            "problem",
            f"{str(folder)!r} is on {kind}, where SQLite's locks do not hold; use a local disk or PostgreSQL",
        )


def _room(folder: Path) -> tuple[Level, str]:
    usage = shutil.disk_usage(folder)
    room = f"{bytes_text(usage.free)} of {bytes_text(usage.total)} are free below {str(folder)!r}"
    if usage.free < LITTLE_BYTES:
        return "problem", f"{room}; `fp8scope prune` or `fp8scope delete` make room, or use a larger disk"
    if usage.free < usage.total // 10:
        return "warning", f"{room}; when it is full collectors wait, and agents fill their spools"
    return "ok", room


def _file_system(folder: Path) -> str:
    """The kind of the file system that `folder` is on, "" where the system does not tell."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return ""
    found = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    holding = [(where, kind) for where, kind in found if folder.is_relative_to(where)]
    return max(holding, default=("", ""), key=lambda mount: len(mount[0]))[1]


def _schema(url: str) -> Found:
    engine = _connected(url)
    try:
        found, newest = stored_version(engine), newest_version()
    finally:
        engine.dispose()
    where = display_url(engine.url)
    if found is None:
        yield "problem", f"{where} has no tables; `fp8scope migrate` makes them"
    elif found != newest:
        yield "problem", f"{where} has tables of version {found}, this fp8scope's are {newest}; run `fp8scope migrate`"
    else:
        yield "ok", f"{where} has tables of version {found}, this fp8scope's"


def _connected(url: str) -> sa.Engine:
    """An engine whatever the tables are; a missing SQLite file is not made."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(str(parsed.database)).exists():
        raise StorageError(f"database {str(parsed.database)!r} does not exist; `fp8scope migrate` makes it")
    return open_engine(url)


def _settings(engine: sa.Engine, *, deep: bool) -> Found:
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            yield from _sqlite_settings(connection, deep=deep)
        else:
            yield from _postgresql_settings(connection)


def _sqlite_settings(connection: sa.Connection, *, deep: bool) -> Found:
    def pragma(name: str) -> Any:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()

    if (mode := pragma("journal_mode")) != "wal":
        yield "warning", f"the journal mode is {mode}; a collector that starts changes it to wal"
    pages, free = pragma("page_count"), pragma("freelist_count")
    size = bytes_text(pages * pragma("page_size"))
    if free > pages // 4:
        yield "warning", f"{free / pages:.0%} of the file's {size} are free; `fp8scope prune` gives them back"
    else:
        yield "ok", f"the file has {size}, {free / max(pages, 1):.0%} of it free"
    if deep:
        try:
            found = list(connection.exec_driver_sql("PRAGMA quick_check(3)").scalars())
        except sa.exc.DatabaseError as error:
            found = [str(error.orig)]
        if found != ["ok"]:
            yield "problem", f"the file is damaged ({'; '.join(map(str, found))}); restore a backup"
        else:
            yield "ok", "SQLite has read all of the file and found it whole"


def _postgresql_settings(connection: sa.Connection) -> Found:
    def show(name: str) -> str:
        return str(connection.exec_driver_sql(f"SHOW {name}").scalar_one())

    yield "ok", f"PostgreSQL {show('server_version')}"
    for setting in ("fsync", "full_page_writes", "synchronous_commit"):
        if show(setting) == "off":
            yield "problem", f"{setting} is off: a crash of its machine loses rows that were acknowledged; turn it on"
    used = connection.exec_driver_sql("SELECT count(*) FROM pg_stat_activity").scalar_one()
    if used > 0.8 * int(show("max_connections")):
        yield "warning", f"{used} of {show('max_connections')} connections are in use; raise max_connections"
    writing = "SELECT has_table_privilege('stats', 'INSERT')"
    if not connection.exec_driver_sql(writing).scalar_one():
        yield "problem", f"user {connection.engine.url.username!r} may not insert into stats; grant it, or use another"


def _statistics(engine: sa.Engine) -> Found:
    """Those that are in ClickHouse or chDB: whether they can be read, by asking for their size."""
    if (url := engine.get_execution_options()["fp8scope_stats"]) is None:
        return
    store = open_stats(engine)
    try:
        size = bytes_text(store.size_bytes())
    finally:
        store.close()
    parsed = sa.make_url(url)
    found = f"statistics in {parsed.render_as_string(hide_password=True)} can be read ({size})"
    if parsed.get_backend_name() != "chdb":
        yield "ok", found
        return
    folder = Path(str(parsed.database)).absolute()
    pid = holder(folder)
    offer = find(folder, pid) if pid else None
    collects = offer and not offer.gives_way
    yield "ok", f"{found}, through process {pid}, which has it" if collects else f"{found}; no collector has the folder"
    yield _room(folder)


def _clock(engine: sa.Engine, now_unix_ns: int) -> Found:
    source = schema.source
    with engine.connect() as connection:
        newest = connection.execute(sa.select(sa.func.max(source.c.last_seen_unix_ns))).scalar_one() or 0
        skewed = connection.execute(
            sa.select(sa.func.count(), sa.func.max(sa.func.abs(source.c.clock_skew_ns))).where(
                sa.func.abs(source.c.clock_skew_ns) > SKEW_NS, source.c.last_seen_unix_ns > now_unix_ns - 86400 * 10**9
            )
        ).one()
    if newest > now_unix_ns + SKEW_NS:
        ahead = (newest - now_unix_ns) / 1e9
        yield (
            "problem",
            f"the newest entry is {ahead:,.0f} s in the future: this machine's clock went back, or another's is ahead",
        )
    elif skewed[0]:
        yield (
            "warning",
            f"{skewed[0]} ranks of the last day have clocks up to {skewed[1] / 1e9:,.0f} s away from the collector's; "
            "nothing is lost, but times of start and end are theirs: run a time service there",
        )
    else:
        yield "ok", "the clocks of collector and ranks agree within a minute"


def _sources(engine: sa.Engine, now_unix_ns: int) -> Found:
    with engine.connect() as connection:
        runs = recent_runs(connection, limit=50)
    silent = [run for run in runs if run.active and now_unix_ns - run.last_seen_unix_ns > STALE_NS]
    for run in silent:
        minutes = (now_unix_ns - run.last_seen_unix_ns) / 60e9
        yield (
            "warning",
            f"run {run.run!r} has not ended and was not heard of for {minutes:,.0f} minutes: its job was killed, or "
            "its agents cannot reach a collector (their logs say why)",
        )
    for run in runs:
        if run.active and (dropped := sum(run.dropped_rows.values())):
            reasons = ", ".join(f"{reason} {rows:,}" for reason, rows in sorted(run.dropped_rows.items()) if rows)
            yield "warning", f"agents of run {run.run!r} have dropped {dropped:,} rows ({reasons})"
    if not silent:
        yield "ok", f"no run is silent ({sum(run.active for run in runs)} active of the newest {len(runs)})"


def _tokens(engine: sa.Engine, now_unix_ns: int) -> Found:
    found = tokens.read_all(engine)
    used = [token for token in found if token.last_used_unix_ns and token.last_used_unix_ns > now_unix_ns - SOON_NS]
    fine = True
    for token in used:
        if token.expires_unix_ns is None or token.revoked_unix_ns is not None:
            continue
        days = (token.expires_unix_ns - now_unix_ns) / 86400e9
        if days <= 0:
            fine = False
            yield "problem", f"token {token.name!r} is in use and expired {-days:.1f} days ago; make a new one"
        elif days * 86400e9 < SOON_NS:
            fine = False
            yield "warning", f"token {token.name!r} is in use and expires in {days:.1f} days; make a new one"
    if fine and found:
        yield "ok", f"{len(used)} of {len(found)} tokens were used lately, and none of them expires soon"


def _certificate(installation: Installation, now_unix_ns: int) -> Found:
    cert, key, client_ca = installation.tls_cert, installation.tls_key, installation.tls_client_ca
    assert cert is not None
    if key is None:
        raise ConfigError("TLS needs both --tls-cert and --tls-key")
    Certificate(TlsFiles(cert, key, client_ca))
    if stat.S_IMODE(key.stat().st_mode) & 0o077:
        yield "warning", f"{str(key)!r} can be read by others than its owner; `chmod 600` it"
    for path in filter(None, (cert, client_ca)):
        days = (expires_unix_ns(path) - now_unix_ns) / 86400e9
        if days <= 0:
            yield (
                "problem",
                f"the certificate in {str(path)!r} expired {-days:.1f} days ago; put a new one in its place",
            )
        elif days * 86400e9 < SOON_NS:
            yield "warning", f"the certificate in {str(path)!r} expires in {days:.1f} days; put a new one in its place"
        else:
            yield "ok", f"the certificate in {str(path)!r} is good for {days:.0f} days"


def _collector(installation: Installation) -> Found:
    """Whether something answers where agents and Prometheus would ask."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(installation.grpc.host, installation.grpc.host)
    target = Address(host, installation.grpc.port)
    absent = f"no collector answers at {target}: start `fp8scope serve`, or give --grpc as it has it"
    if installation.tls_cert:
        try:
            shown = _shown_certificate(target)
        except OSError as error:
            yield "problem", f"{absent} ({error.strerror or error})"
            return
        if shown != ssl.PEM_cert_to_DER_cert(first_pem(installation.tls_cert)):
            yield (
                "warning",
                f"the collector at {target} shows another certificate than the one in {str(installation.tls_cert)!r}; "
                "its log says why it did not take that one",
            )
        else:
            yield "ok", f"a collector answers at {target} with the certificate in {str(installation.tls_cert)!r}"
    else:
        with grpc.insecure_channel(str(target)) as channel:
            try:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError as error:
                yield "problem", f"{absent} ({error.code().name})"
                return
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            yield "ok", f"a collector answers at {target}"
        else:
            yield "warning", f"the collector at {target} is draining"
    yield _healthz(installation)


def _shown_certificate(target: Address) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # compared with the file instead
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((target.host, target.port), timeout=5) as raw:
        with context.wrap_socket(raw) as connection:
            return connection.getpeercert(binary_form=True) or b""


def _healthz(installation: Installation) -> tuple[Level, str]:
    address = str(installation.metrics).replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is only asked for its health
    for scheme in ("http", "https"):
        try:
            with urllib.request.urlopen(f"{scheme}://{address}/healthz", timeout=5, context=context):
                return "ok", f"{scheme}://{address}/healthz says ok"
        except urllib.error.HTTPError as error:
            return "problem", f"{scheme}://{address}/healthz says {error.read(200).decode(errors='replace').strip()!r}"
        except OSError:
            continue
    return "warning", f"nothing answers at {address}/healthz; give --metrics as `serve` has it"
