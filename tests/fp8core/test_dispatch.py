"""Which kernels run is chosen by device, overridable by an environment variable, and printable."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import fp8core
from fp8core.kernels import cpu, dispatch, eager, kernels_for


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.delenv(dispatch.ENV, raising=False)
    dispatch.kernels_for.cache_clear()
    yield monkeypatch
    dispatch.kernels_for.cache_clear()


def test_a_cpu_with_a_compiler_takes_the_compiled_kernels(choose: pytest.MonkeyPatch) -> None:
    choose.setattr(cpu, "unavailable_reason", lambda: None)

    assert kernels_for("cpu") is cpu
    assert kernels_for("meta") is eager


def test_without_a_compiler_the_eager_ones_run_and_capability_says_why(choose: pytest.MonkeyPatch) -> None:
    choose.setattr(cpu, "unavailable_reason", lambda: "no C++ compiler: install g++")

    assert kernels_for("cpu") is eager
    assert "cpu: kernels eager (no C++ compiler: install g++)" in fp8core.capability()


def test_the_variable_overrides_the_choice(choose: pytest.MonkeyPatch) -> None:
    choose.setenv(dispatch.ENV, "eager")

    assert kernels_for("cpu") is eager
    assert "kernels eager (FP8SCOPE_KERNEL=eager)" in fp8core.capability()


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("fast", ValueError, "FP8SCOPE_KERNEL='fast' is unknown; choose eager, cpu, triton or leave it unset"),
        ("triton", RuntimeError, "FP8SCOPE_KERNEL=triton is for CUDA tensors, but a tensor is on 'cpu'; unset it"),
    ],
)
def test_a_variable_that_cannot_be_followed_says_so(
    value: str, error: type[Exception], words: str, choose: pytest.MonkeyPatch
) -> None:
    choose.setenv(dispatch.ENV, value)

    with pytest.raises(error, match=words):
        kernels_for("cpu")
    assert f"cpu: kernels none ({words})" in fp8core.capability()


def test_asking_for_kernels_that_cannot_run_says_why(choose: pytest.MonkeyPatch) -> None:
    choose.setenv(dispatch.ENV, "cpu")
    choose.setattr(cpu, "unavailable_reason", lambda: "no C++ compiler")

    with pytest.raises(RuntimeError, match="FP8SCOPE_KERNEL=cpu, but no C\\+\\+ compiler; unset it"):
        kernels_for("cpu")


def test_capability_names_torch_kernels_and_gemm() -> None:
    lines = fp8core.capability().splitlines()

    assert lines[0] == f"torch {torch.__version__}"
    assert lines[1].startswith("cpu: kernels ")
    assert "GEMM emulated in" in lines[1]


# -------------------------------------------------------------------------------------------------- without torch


def run_without_torch(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` where importing torch fails."""
    block = "import sys; sys.modules['torch'] = None\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, timeout=60, check=False)


def test_formats_records_recipes_and_scaling_work_without_torch() -> None:
    done = run_without_torch(
        "import fp8core, fp8core.records, fp8core.formats, fp8core.recipes, fp8core.scaling\n"
        "print(fp8core.AmaxScaling(), fp8core.HYBRID, fp8core.scale_exp2_from_amax(1.0, fp8core.E4M3FN))"
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["HYBRID", "8"]


def test_a_name_that_needs_torch_fails_on_use_only_and_names_torch() -> None:
    done = run_without_torch("import fp8core\nfp8core.Fp8Linear")

    assert done.returncode != 0
    assert "torch" in done.stderr.splitlines()[-1]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Fp4Linear'"):
        fp8core.Fp4Linear  # noqa: B018  # what must fail
