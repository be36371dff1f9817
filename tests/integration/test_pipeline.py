"""From a training step to the database: every row once, every number what the recipe says."""

from __future__ import annotations

import csv
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from fp8core.formats import E4M3FN, E5M2, Fp8Format
from programs import FP8SCOPE, ROOT, SMALL_MODEL, Program, environment, wait_for_rows

LINEARS = [f"blocks.{n}.{part}" for n in range(6) for part in ("attn.qkv", "attn.out", "mlp.fc1", "mlp.fc2")]
FORMAT_AND_MARGIN: dict[str, tuple[Fp8Format, int]] = {
    "input": (E4M3FN, 0),
    "weight": (E4M3FN, 0),
    "grad_output": (E5M2, 3),
}


def exported(database: str, run: str, out: Path) -> list[dict[str, str]]:
    command = ["export", run, "--db", database, "--format", "csv", "--out", str(out)]
    subprocess.run([sys.executable, FP8SCOPE, *command], check=True, env=environment(), timeout=60)
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_every_row_once(rows: list[dict[str, str]], steps: int) -> None:
    expected = Counter(
        {(layer, role, step): 1 for layer in LINEARS for role in FORMAT_AND_MARGIN for step in range(steps)}
    )
    seen = Counter((row["layer"], row["role"], int(row["step"])) for row in rows)
    assert seen == expected, f"missing {list(expected - seen)[:5]}, too many {list(seen - expected)[:5]}"


def floor_log2(value: Fraction) -> int:
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def assert_scales_follow_the_recipe(rows: list[dict[str, str]]) -> None:
    for row in rows:
        fmt, margin = FORMAT_AND_MARGIN[row["role"]]
        amax = Fraction(float(row["amax"]))
        expected = Fraction(2) ** (floor_log2(Fraction(fmt.max) / amax) - margin)

        assert Fraction(float(row["scale_min"])) == Fraction(float(row["scale_max"])) == expected, row
        assert row["overflow"] == "0", row
        assert row["nonfinite"] == "0", row


def test_a_run_leaves_one_exact_row_for_each_layer_role_and_step(tmp_path: Path, start: Callable[..., Program]) -> None:
    steps = 12

    demo = start(
        *(
            "examples/demo.py",
            "--exit",
            "--no-dashboard",
            "--dir",
            tmp_path / "demo",
            "--steps",
            str(steps),
            *SMALL_MODEL,
        ),
        *("--validate-every", "3"),
    )
    code = demo.wait(120)

    assert code == 0, demo.output()
    assert f"{steps * 72} stored of {steps * 72} recorded, 0 dropped" in demo.output()
    assert re.search(r"\d+ bytes a row", demo.output())
    database = f"sqlite:///{tmp_path / 'demo' / 'fp8scope.db'}"
    run = re.search(r"^run +(\S+)", demo.output(), re.MULTILINE)[1]
    rows = exported(database, run, tmp_path / "rows.csv")
    assert_every_row_once(rows, steps)
    assert_scales_follow_the_recipe(rows)
    # validation ran after steps 3, 6, 9 and 12; had it been recorded, those steps would count its elements too
    numel = {(row["layer"], row["role"], row["numel"]) for row in rows}
    assert len(numel) == 72, "numel differs between steps"
    assert ("blocks.0.attn.qkv", "input", str(4 * 64 * 96)) in numel


def test_a_collector_killed_and_started_again_has_every_row_once(
    tmp_path: Path, start: Callable[..., Program], start_collector: Callable[..., tuple[Program, str]]
) -> None:
    steps, database = 60, f"sqlite:///{tmp_path / 'fp8scope.db'}"
    collector, address = start_collector(database)
    training = start(
        *("examples/train_gpt.py", "--run", "killed", "--steps", str(steps), *SMALL_MODEL),
        *("--collector", address, "--spool-dir", tmp_path / "spool", "--result", tmp_path / "result.json"),
    )

    training.wait_for(r"step 18/60")
    collector.kill()
    training.wait_for(r"step 36/60")
    start_collector(database, grpc=address)
    code = training.wait(120)

    assert code == 0, training.output()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["rows_recorded"] == steps * 72
    assert result["rows_dropped"] == 0
    wait_for_rows(database, "killed", steps * 72)
    rows = exported(database, "killed", tmp_path / "rows.csv")
    assert_every_row_once(rows, steps)
    assert_scales_follow_the_recipe(rows)


def test_fp8_reaches_the_validation_loss_of_bf16(tmp_path: Path) -> None:
    losses = {}
    for name, options in {
        "bf16": ["--precision", "bf16"],
        "HYBRID": ["--formats", "HYBRID"],
        "GRAPHCORE": ["--formats", "GRAPHCORE"],
    }.items():
        result = tmp_path / f"{name}.json"
        command = ["examples/train_gpt.py", *options, "--steps", "30", *SMALL_MODEL, "--result", str(result)]
        command += ["--collector", "127.0.0.1:1", "--spool-dir", str(tmp_path / "spool")]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env=environment(), timeout=200)
        losses[name] = json.loads(result.read_text())["validation_loss"]

    assert losses["HYBRID"] == pytest.approx(losses["bf16"], rel=0.02), losses
    assert losses["GRAPHCORE"] == pytest.approx(losses["bf16"], rel=0.02), losses


def test_a_taken_port_is_one_sentence_and_no_traceback(tmp_path: Path, start: Callable[..., Program]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        demo = start("examples/demo.py", "--dir", tmp_path / "demo", "--listen", address)
        code = demo.wait(60)

    assert code == 1
    assert address in demo.output()
    assert "--listen" in demo.output()
    assert "Traceback" not in demo.output()


def processes_about(folder: Path) -> list[str]:
    """Command lines of the processes whose arguments or environment name `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if str(folder).encode() in command + (process / "environ").read_bytes():
                found.append(command.replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it ended just now, or is another user's
    return found


@pytest.mark.parametrize("moment", ["while it trains", "while the dashboard stays up"])
def test_interrupting_the_demo_ends_all_of_it(
    moment: str, tmp_path: Path, start: Callable[..., Program], free_port: Callable[[], int]
) -> None:
    steps = 1000 if moment == "while it trains" else 3
    demo = start(
        *("examples/demo.py", "--dir", tmp_path / "demo", "--listen", f"127.0.0.1:{free_port()}"),
        *("--steps", str(steps), "--validate-every", "0", *SMALL_MODEL),
    )
    demo.wait_for(r"loss \d" if moment == "while it trains" else r"stays up", within_s=120)
    if moment == "while it trains":
        demo.wait_for(r"rows sent [1-9]", within_s=120)

    code = demo.stop(signal.SIGINT, within_s=20)

    assert code == (130 if moment == "while it trains" else 0), demo.output()
    assert "Traceback" not in demo.output()
    deadline = time.monotonic() + 10
    while (left := processes_about(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)  # the sender sees that everything is sent
    assert not left
