"""`fp8scope doctor`: quiet about what is well, and one sentence with the way out for each thing that is not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from certificates import Authority
from fp8scope_collector.decode import decode_open
from fp8scope_collector.limits import Limits
from fp8scope_collector.messages import Opening
from fp8scope_collector.storage import tokens
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.writer import Seen, StatsWriter

Run = Callable[..., Any]
DAY = 86400 * 10**9


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    engine = open_engine(f"sqlite:///{tmp_path}/test.db")
    migrate(engine)
    return engine


@pytest.fixture
def authority(require_binary: Callable[[str], Path], tmp_path: Path) -> Authority:
    return Authority(require_binary("openssl"), tmp_path)


def examined(run: Run, url: str, *arguments: str, problem: bool = True) -> dict[str, list[tuple[str, str]]]:
    """(level, sentence) by check; the command fails where there is a `problem`."""
    found = json.loads(run("doctor", "--db", url, "--json", *arguments, fails=problem).stdout)["symptoms"]
    checks: dict[str, list[tuple[str, str]]] = {}
    for symptom in found:
        checks.setdefault(symptom["check"], []).append((symptom["level"], symptom["sentence"]))
    return checks


def url_of(engine: sa.Engine) -> str:
    return f"sqlite:///{engine.url.database}"


def opening(wire: Any, run: str, **fields: Any) -> Opening:
    return decode_open(wire.open(run, **fields), Limits())


def test_nothing_is_wrong_with_a_collector_that_runs(
    start_collector: Callable[..., Any], connect: Callable[..., Any], wire: Any, engine: sa.Engine, run: Run
) -> None:
    collector = start_collector(url_of(engine))
    connect(collector.grpc, wire.open())
    where = ["--grpc", collector.grpc, "--metrics", collector.http.removeprefix("http://")]

    checks = examined(run, url_of(engine), *where, "--deep", problem=False)

    assert {level for found in checks.values() for level, _ in found} == {"ok"}
    assert list(checks) == ["versions", "files", "schema", "settings", "clock", "sources", "collector"]
    assert run("doctor", "--db", url_of(engine), *where).stdout.endswith("nothing is wrong\n")


def test_a_collector_and_a_database_that_are_not_there_are_two_problems(
    tmp_path: Path, run: Run, free_port: Callable[[], int]
) -> None:
    address = f"127.0.0.1:{free_port()}"

    checks = examined(run, f"sqlite:///{tmp_path}/none.db", "--grpc", address)
    folder = examined(run, f"sqlite:///{tmp_path}/none/none.db", "--grpc", address)

    assert checks["schema"] == [
        ("problem", f"database '{tmp_path}/none.db' does not exist; `fp8scope migrate` makes it")
    ]
    ((level, sentence),) = checks["collector"]
    assert level == "problem"
    assert sentence.startswith(f"no collector answers at {address}: start `fp8scope serve`")
    assert folder["files"] == [
        ("problem", f"the directory '{tmp_path}/none' does not exist; create it, or give another --db")
    ]
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"


@pytest.mark.parametrize(("stored", "sentence"), [("0001", "run `fp8scope migrate`"), ("9999", "of version 9999")])
def test_tables_of_another_version_are_told(engine: sa.Engine, run: Run, stored: str, sentence: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{stored}'")

    ((level, said),) = examined(run, url_of(engine))["schema"]

    assert level == "problem"
    assert sentence in said


def test_what_runs_and_tokens_suffer_from_is_told(engine: sa.Engine, wire: Any, run: Run) -> None:
    now = time.time_ns()
    writer = StatsWriter(engine)
    silent = writer.register(opening(wire, "silent", sent_unix_ns=now - 600 * 10**9), now_unix_ns=now - 600 * 10**9)
    writer.touch({silent.id: Seen(now - 599 * 10**9, {"spool_full": 7})})
    writer.register(opening(wire, "skewed", sent_unix_ns=now - 3 * DAY), now_unix_ns=now)
    for name, days in [("expired", -1), ("expiring", 3), ("fine", 300)]:
        until = now + days * DAY
        tokens.create(engine, name=name, scope="ingest", project=None, run=None, expires_unix_ns=until, now_unix_ns=now)
    tokens.note_used(engine, dict.fromkeys([1, 2, 3], now))

    checks = examined(run, url_of(engine))

    assert [level for level, _ in checks["sources"]] == ["warning", "warning"]
    assert "run 'silent' has not ended and was not heard of for 10 minutes" in checks["sources"][0][1]
    assert "agents of run 'silent' have dropped 7 rows (spool_full 7)" in checks["sources"][1][1]
    ((level, clock),) = checks["clock"]
    assert level == "warning"
    assert "1 ranks of the last day have clocks up to 259,200 s away" in clock
    assert [(level, sentence.split(";")[0]) for level, sentence in checks["tokens"]] == [
        ("problem", "token 'expired' is in use and expired 1.0 days ago"),
        ("warning", "token 'expiring' is in use and expires in 3.0 days"),
    ]


def test_a_clock_that_went_back_is_a_problem(engine: sa.Engine, wire: Any, run: Run) -> None:
    StatsWriter(engine).register(opening(wire, "run"), now_unix_ns=time.time_ns() + DAY)

    ((level, sentence),) = examined(run, url_of(engine))["clock"]

    assert level == "problem"
    assert "in the future" in sentence


def test_a_damaged_file_is_found_by_reading_all_of_it(engine: sa.Engine, wire: Any, run: Run) -> None:
    writer = StatsWriter(engine)
    for rank in range(8):
        writer.register(opening(wire, "run", rank=rank, slots=300), now_unix_ns=1)
    with engine.connect() as connection:
        root = connection.exec_driver_sql("SELECT rootpage FROM sqlite_master WHERE name = 'audit'").scalar_one()
    engine.dispose()
    path = Path(str(engine.url.database))
    with path.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(b"\xff" * 200)

    checks = examined(run, url_of(engine), "--deep")

    assert checks["settings"][-1][0] == "problem"
    assert "restore a backup" in checks["settings"][-1][1]


def test_postgresql_that_does_not_sync_is_a_problem(postgres_url: str, run: Run) -> None:
    """The tests' own server has fsync off."""
    engine = open_engine(postgres_url)
    migrate(engine)
    engine.dispose()

    settings = examined(run, postgres_url)["settings"]

    assert settings[0][1].startswith("PostgreSQL ")
    assert [sentence.split(":")[0] for level, sentence in settings if level == "problem"] == ["fsync is off"]


def test_certificates_are_looked_into(
    start_collector: Callable[..., Any], authority: Authority, engine: sa.Engine, run: Run
) -> None:
    cert, key = authority.issue("server", days=100)
    soon, soon_key = authority.issue("soon", days=3)
    expired, expired_key = authority.issue("expired", days=-1)
    for path in (key, soon_key, expired_key):
        path.chmod(0o600)
    collector = start_collector(url_of(engine), "--tls-cert", cert, "--tls-key", key)
    where = ["--grpc", collector.grpc, "--metrics", collector.http.removeprefix("http://")]

    def with_files(cert: Path, key: Path, problem: bool) -> dict[str, list[tuple[str, str]]]:
        files = ["--tls-cert", str(cert), "--tls-key", str(key)]
        return examined(run, url_of(engine), *where, *files, problem=problem)

    good = with_files(cert, key, False)
    key.chmod(0o644)
    open_key = with_files(cert, key, False)
    near = with_files(soon, soon_key, False)
    over = with_files(expired, expired_key, True)
    mixed = with_files(cert, soon_key, True)

    assert good["certificate"] == [("ok", f"the certificate in '{cert}' is good for 100 days")]
    assert good["collector"][0] == (
        "ok",
        f"a collector answers at {collector.grpc} with the certificate in '{cert}'",
    )
    assert "can be read by others" in open_key["certificate"][0][1]
    assert near["certificate"][0][0] == "warning"
    assert "expires in 3.0 days" in near["certificate"][0][1]
    assert "shows another certificate" in near["collector"][0][1]
    assert over["certificate"][0][0] == "problem"
    assert "expired 1.0 days ago" in over["certificate"][0][1]
    assert "belongs to another certificate" in mixed["certificate"][0][1]
