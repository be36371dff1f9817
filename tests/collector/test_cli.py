"""The command `fp8scope`, as users call it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from fp8core.records import FIELDS
from fp8scope_collector.decode import decode_open, decode_stats
from fp8scope_collector.limits import Limits
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.writer import StatsWriter
from fp8scope_protos.v1 import telemetry_pb2 as pb

Run = Callable[..., Any]
COLUMNS = ["run", "incarnation", "rank", "layer", "role", "step", *(field.name for field in FIELDS)]


@pytest.fixture
def stored(tmp_path: Path, wire: Any) -> str:
    """The URL of a database with the runs team/first (two ranks, three steps) and empty."""
    url = f"sqlite:///{tmp_path}/test.db"
    engine = open_engine(url)
    migrate(engine)
    writer = StatsWriter(engine)
    writer.register(decode_open(wire.open("empty"), Limits()), now_unix_ns=1)
    for rank in range(2):
        opening = wire.open("first", project="team", rank=rank, tags=["a", "b"], slots=_risky_slots())
        source = writer.register(decode_open(opening, Limits()), now_unix_ns=2)
        columns = wire.columns(0, slots=2, steps=3)
        columns["amax"] = np.array([0.1, 1e-45, 3.4028235e38, np.nan, np.inf, 2], np.float32)
        del columns["err_sq"]
        writer.commit([decode_stats(wire.stats(1, columns), source, Limits())], now_unix_ns=3)
    engine.dispose()
    return url


def _risky_slots() -> list[pb.Slot]:
    return [
        pb.Slot(slot=0, layer='=cmd|"/C calc"!A1', role=pb.ROLE_INPUT, format="E4M3FN"),
        pb.Slot(slot=1, layer="a,b", role=pb.ROLE_WEIGHT, format="E4M3FN"),
    ]


def test_version_is_the_distribution_s(run: Run) -> None:
    text = (Path(__file__).parents[2] / "collector" / "pyproject.toml").read_text()

    assert run("--version").stdout == f"fp8scope {tomllib.loads(text)['project']['version']}\n"


def test_runs_lists_what_is_stored(stored: str, run: Run) -> None:
    lines = run("runs", "--db", stored).stdout.splitlines()

    assert lines[0].split() == ["RUN", "STATE", "STEPS", "ROWS", "RANKS", "DROPPED", "LAST", "SEEN", "TAGS"]
    assert lines[1].split()[:6] == ["team/first", "crashed", "0-2", "12", "2/8", "0"]
    assert lines[1].endswith("a b")
    assert lines[2].startswith("empty")


def test_runs_speaks_json(stored: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8SCOPE_DB", stored)

    runs = json.loads(run("runs", "--json").stdout)

    assert [(run["run"], run["rows"], run["last_step"], run["tags"]) for run in runs] == [
        ("team/first", 12, 2, ["a", "b"]),
        ("empty", 0, None, []),
    ]


# float32 0.1, smallest subnormal, largest; null; infinity; 2: each as the float64 that equals it
EXACT_AMAX = ["0.10000000149011612", "1.401298464324817e-45", "3.4028234663852886e+38", "", "inf", "2"]


def test_csv_has_every_row_and_no_formulas(stored: str, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out.csv"

    said = run("export", "first", "--db", stored, "--out", str(out)).stderr

    assert said == f"12 rows of first written to {out}\n"
    rows = list(csv.DictReader(out.open()))
    assert list(rows[0]) == COLUMNS
    assert [(row["rank"], row["step"], row["layer"], row["role"]) for row in rows[:2]] == [
        ("0", "0", '\'=cmd|"/C calc"!A1', "input"),
        ("0", "0", "a,b", "weight"),
    ]
    assert [row["amax"] for row in rows[:6]] == EXACT_AMAX
    assert {row["err_sq"] for row in rows} == {""}
    assert {row["run"] for row in rows} == {"team/first"}
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out.csv"], "no leftovers"


def test_dash_is_standard_output(stored: str, tmp_path: Path, run: Run) -> None:
    written = tmp_path / "out.csv"
    run("export", "team/first", "--db", stored, "--out", str(written))

    assert run("export", "team/first", "--db", stored, "--out", "-").stdout == written.read_text()


def test_parquet_keeps_types_and_nulls(stored: str, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out.parquet"

    run("export", "first", "--db", stored, "--format", "parquet", "--out", str(out))

    table = pyarrow.parquet.read_table(out)
    assert table.column_names == COLUMNS
    assert table.num_rows == 12
    assert table["layer"][0].as_py() == '=cmd|"/C calc"!A1'
    assert str(table["amax"].type) == "float"
    assert table["amax"].to_pylist()[:2] == [float(np.float32(0.1)), float(np.float32(1e-45))]
    assert table["err_sq"].null_count == 12


def test_an_export_that_fails_leaves_the_old_file(stored: str, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out.csv"
    out.write_text("old")

    failed = run("export", "empty", "--db", stored, "--out", str(out), fails=True)

    assert failed.stderr == "fp8scope: run 'empty' has no rows; nothing was written\n"
    assert out.read_text() == "old"


def test_a_directory_that_is_not_there_is_a_sentence(stored: str, run: Run) -> None:
    failed = run("export", "first", "--db", stored, "--out", "/nowhere/out.csv", fails=True)

    assert failed.stderr == "fp8scope: /nowhere/out.csv: No such file or directory\n"


def test_a_closed_pipe_is_no_traceback(stored: str) -> None:
    command = f"{sys.executable} -m fp8scope_collector export first --db {stored} --out - | head -c 0"

    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)

    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["runs", "--db", "sqlite:///missing.db"],
            "database 'missing.db' does not exist; check the path, or start `fp8sc",
        ),
        (
            ["runs", "--db", "mongodb://x"],
            "database URL 'mongodb://x' is of kind 'mongodb'; expected sqlite:///PATH or",
        ),
        (
            ["serve", "--db", "sqlite:////nowhere/x.db"],
            "cannot create database '/nowhere/x.db': its directory '/nowhere'",
        ),
        (
            ["serve", "--db", "sqlite:////proc/x.db"],
            "cannot open database sqlite:////proc/x.db: unable to open database",
        ),
        (
            ["serve", "--db", "postgresql://u:secret@127.0.0.1:1/x"],
            "cannot open database postgresql://u:***@127.0.0.1:1/x: ",
        ),
        (["serve", "--grpc", "4327"], "--grpc is '4327'; expected HOST:PORT, for example 127.0.0.1:4327 or [::1]:4327"),
        (
            ["serve", "--grpc", "0.0.0.0:0"],
            "--grpc 0.0.0.0:0 can be reached from other machines: encrypt it with --tls-cert",
        ),
        (["serve", "--metrics", "[::]:0"], "--metrics [::]:0 can be reached from other machines"),
        (["serve", "--metrics", "no.such.host.invalid:0"], "host 'no.such.host.invalid' is unknown: "),
        (["serve", "--db", "sqlite:///."], "cannot open database sqlite:///.: unable to open database file"),
        (["dashboard", "--listen", "8501"], "--listen is '8501'; expected HOST:PORT"),
    ],
)
def test_what_a_user_can_cause_is_a_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    failed = run(*arguments, fails=True)

    assert failed.stderr.startswith(f"fp8scope: {sentence}")
    assert failed.stderr.count("\n") == 1
    assert "secret" not in failed.stderr


def test_an_unknown_run_is_answered_with_the_known_ones(stored: str, run: Run) -> None:
    failed = run("export", "frist", "--db", stored, "--out", "-", fails=True)

    assert failed.stderr == "fp8scope: run 'frist' is unknown; there are: team/first, empty\n"


@pytest.mark.parametrize("option", ["--grpc", "--metrics"])
def test_a_taken_port_is_a_sentence(shared_collector: Any, option: str, tmp_path: Path, run: Run) -> None:
    collector, _ = shared_collector
    taken = collector.grpc if option == "--grpc" else collector.http.removeprefix("http://")
    addresses = {"--grpc": "127.0.0.1:0", "--metrics": "127.0.0.1:0"} | {option: taken}
    arguments = [word for pair in addresses.items() for word in pair]

    failed = run("serve", "--db", f"sqlite:///{tmp_path}/x.db", *arguments, fails=True)

    assert failed.stderr.splitlines()[-1].startswith(f"fp8scope: cannot listen on {option} {taken}: ")
    assert "Traceback" not in failed.stderr


def test_insecure_allows_other_addresses(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fp8scope_collector", "serve", "--insecure", "--db", f"sqlite:///{tmp_path}/x.db"],
        env=os.environ | {"FP8SCOPE_GRPC": "0.0.0.0:0", "FP8SCOPE_METRICS": "127.0.0.1:0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    line = process.stdout.readline()
    process.terminate()
    process.wait(10)
    process.stdout.close()

    assert line.startswith("fp8scope collector: grpc 0.0.0.0:")


def test_a_full_disk_is_a_sentence(stored: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    failed = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m fp8scope_collector export first --db {stored} --out - > /dev/full"],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert failed.returncode == 1
    assert failed.stderr.startswith("fp8scope: ")
    assert "No space left on device" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.fixture
def trained(tmp_path: Path, wire: Any) -> str:
    """The URL of a database with the run "trained": an input of root mean square 1, amax 4, for eight steps."""
    url = f"sqlite:///{tmp_path}/trained.db"
    engine = open_engine(url)
    migrate(engine)
    writer = StatsWriter(engine)
    slots = [pb.Slot(slot=0, layer="fc", role=pb.ROLE_INPUT, format="E4M3FNUZ")]
    source = writer.register(decode_open(wire.open("trained", slots=slots), Limits()), now_unix_ns=1)
    columns = wire.columns(0, slots=1, steps=8)
    columns["amax"] = np.full(8, 4, np.float32)
    columns["sum_sq"] = columns["numel"].astype(np.float64)
    writer.commit([decode_stats(wire.stats(1, columns), source, Limits())], now_unix_ns=2)
    engine.dispose()
    return url


def test_advise_says_which_constants_work_and_how_long_a_scale_may_be_kept(run: Run, trained: str) -> None:
    lines = run("advise", "trained", "--db", trained).stdout.splitlines()

    assert lines[0] == "trained: 1 tensors, 8 recorded steps"
    # 240 / 2.8 is 2**6.4, 240 / 4 is 2**5.9; the smallest normal number is 2**-7.
    bounds = "above, fc input clips; below, fc input vanishes; nothing at all clips up to 5"
    assert f"  all roles    -7 to 6  ({bounds})" in lines
    assert lines[-1].startswith("  input        every 4 steps  (0.000 flips a step")


def test_advise_as_json_is_one_object_with_both_kinds_of_advice(run: Run, trained: str) -> None:
    advice = json.loads(run("advise", "trained", "--db", trained, "--json").stdout)

    assert advice["run"] == "trained"
    assert [each["role"] for each in advice["constant"]] == ["input", None]
    assert advice["constant"][1]["upper"] == {"scale_exp2": 6, "tensor": "fc input"}
    assert advice["refresh"][0]["clipped_steps"] == {"1": 0.0, "2": 0.0, "4": 0.0}
    assert advice["refresh"][0]["interval"] == 4


def test_advise_on_a_run_that_says_nothing_of_its_tensors_tells_what_is_missing(run: Run, stored: str) -> None:
    failed = run("advise", "empty", "--db", stored, fails=True)

    assert failed.stdout == ""
    assert failed.stderr.endswith(
        "run 'empty' has no rows with amax, numel and sum_sq; there is nothing to advise on\n"
    )


def test_advise_on_an_unknown_run_names_those_that_there_are(run: Run, stored: str) -> None:
    failed = run("advise", "frist", "--db", stored, fails=True)

    assert "team/first" in failed.stderr
