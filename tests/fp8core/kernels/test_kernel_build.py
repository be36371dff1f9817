"""How the C++ kernels are compiled, cached and refused."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fp8core.formats import E4M3FN
from fp8core.kernels import cpu, cpu_build

REPOSITORY = Path(__file__).parents[3]


def compiler_script(folder, body):
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def not_loaded(monkeypatch):
    monkeypatch.setattr(cpu, "_loaded", None)


def test_processes_that_build_at_once_share_one_library(tmp_path, require_binary):
    require_binary("g++")
    code = "from fp8core.kernels import cpu; import sys; sys.exit(cpu.unavailable_reason())"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]

    assert [process.wait(60) for process in processes] == [0, 0]
    (library,) = (tmp_path / "fp8scope" / "kernels").iterdir()
    assert library.suffix == ".so"


def test_flags_that_the_compiler_refuses_are_left_out_and_nothing_is_compiled_twice(
    tmp_path, monkeypatch, expected_codes, require_binary
):
    refuse_native = (
        f'case "$*" in *march=native*) echo "unknown flag" >&2; exit 1;; esac; exec {require_binary("g++")} "$@"'
    )
    compiler = compiler_script(tmp_path, refuse_native)

    built = cpu_build.build(tmp_path / "cache", compiler)

    monkeypatch.setattr(cpu, "_loaded", (cpu._open(built), None))
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    q, _ = cpu.cast(x, torch.tensor(64.0), E4M3FN)
    assert (q.view(torch.uint8).numpy() == expected_codes(x, 64.0, E4M3FN)).all()
    compiler_script(tmp_path, "exit 1")
    monkeypatch.setattr(cpu_build, "_FLAG_SETS", (("-fopenmp",),))
    assert cpu_build.build(tmp_path / "cache", compiler) == built


def test_without_a_compiler_the_reason_says_what_to_install(monkeypatch, not_loaded):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)

    assert "install g++" in cpu.unavailable_reason()
    with pytest.raises(RuntimeError, match="no C"):
        cpu.amax(torch.ones(3))


def test_a_compiler_that_fails_is_quoted(monkeypatch, not_loaded, tmp_path):
    monkeypatch.setenv("CXX", compiler_script(tmp_path, "echo 'out of cheese' >&2; exit 3"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert cpu.unavailable_reason() == f"{tmp_path}/compiler did not compile the CPU kernels: out of cheese"


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, not_loaded, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    reason = cpu.unavailable_reason()

    assert str(tmp_path / "file") in reason
    assert "XDG_CACHE_HOME" in reason


def test_the_wheel_carries_the_sources(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    subprocess.run([*command, str(REPOSITORY / "fp8core")], check=True, capture_output=True, timeout=60)

    (wheel,) = tmp_path.iterdir()
    sources = {f"fp8core/kernels/{path.name}" for path in (*cpu_build.SOURCES, *cpu_build.HEADERS)}
    assert sources <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(3, dtype=torch.float64)}, TypeError, "torch.float64"),
        ({"scale": torch.tensor(1.0, dtype=torch.float64)}, TypeError, "float32 0-d"),
        ({"words": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, r"\[2, 3\]"),
        ({"slot": torch.tensor(2)}, IndexError, "slot is 2; the arena has 2 slots"),
        ({"slot": None}, TypeError, "slot is None"),
    ],
    ids=["x", "scale", "words", "slot", "no slot"],
)
def test_a_wrong_argument_is_named(arguments, error, message, new_words):
    right = {"x": torch.ones(3), "scale": torch.tensor(1.0), "words": new_words(2), "slot": torch.tensor(0)}
    given = right | arguments

    with pytest.raises(error, match=message):
        cpu.cast(given["x"], given["scale"], E4M3FN, words=given["words"], slot=given["slot"])
