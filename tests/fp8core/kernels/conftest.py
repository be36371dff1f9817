"""The implementations under test, and what they have to give: an oracle written from the definitions alone.

The tests of this folder run on the eager and the C++ kernels, on the Triton kernels where there is a GPU, and on the
Triton kernels in Triton's interpreter in a process of its own (test_kernel_interpreter.py).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from fp8core.formats import FORMATS, Fp8Format
from fp8core.records import COLUMNS, empty_row, is_float

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ML_DTYPE = {
    "E4M3FN": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
GPU = [pytest.param("triton", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []
NAMES = ["triton"] if INTERPRETED else ["eager", "cpu", *GPU]


@dataclass(frozen=True)
class Implementation:
    """A kernel module, the device of its tensors, and how many random values it can be given in a second or so."""

    name: str
    module: ModuleType
    device: str
    many: int

    def cast(
        self,
        x: torch.Tensor,
        scale: float,
        fmt: Fp8Format,
        words: torch.Tensor | None = None,
        slot: int = 0,
        **how: bool,
    ) -> tuple[npt.NDArray[np.uint8], float]:
        """The codes of `x` and its amax; `words` is a CPU tensor and is updated in place."""
        there = None if words is None else words.to(self.device)
        q, amax = self.module.cast(
            x.to(self.device),
            torch.tensor(scale, device=self.device),
            fmt,
            words=there,
            slot=None if there is None else torch.tensor(slot, device=self.device),
            **how,
        )
        assert q.shape == x.shape
        assert q.is_contiguous()
        if words is not None:
            words.copy_(there)
        return q.view(torch.uint8).cpu().numpy(), float(amax)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=NAMES)
def kernels(request: pytest.FixtureRequest) -> Implementation:
    name = request.param
    module = importlib.import_module(f"fp8core.kernels.{name}")
    if name == "cpu":
        request.getfixturevalue("require_binary")("g++")
        assert module.unavailable_reason() is None
    if INTERPRETED:
        module.BLOCK = 16384  # the interpreter's time goes by operations, not by elements
    device = "cuda" if name == "triton" and not INTERPRETED else "cpu"
    many = {"cpu": 10_000_000, "eager": 300_000, "triton": 20_000 if INTERPRETED else 10_000_000}[name]
    return Implementation(name, module, device, many)


@pytest.fixture(params=FORMATS.values(), ids=str)
def fmt(request: pytest.FixtureRequest) -> Fp8Format:
    fmt: Fp8Format = request.param
    return fmt


@pytest.fixture
def new_words() -> Callable[[int], torch.Tensor]:
    return lambda slots: torch.from_numpy(np.tile(empty_row(), (slots, 1)))


def _expected_codes(x: torch.Tensor, scale: float, fmt: Fp8Format) -> npt.NDArray[np.uint8]:
    """The codes by ml_dtypes, after saturation; NaN with x's sign where the format has one."""
    wide = x.float().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = wide * np.float32(scale)
    codes = np.asarray(np.clip(scaled, -fmt.max, fmt.max)).astype(ML_DTYPE[fmt.name]).view(np.uint8)
    nan = np.isnan(wide)
    return np.where(nan, 0x80 if fmt.name.endswith("FNUZ") else np.where(np.signbit(wide), 0xFF, 0x7F), codes).astype(
        np.uint8
    )


def _expected_row(x: torch.Tensor, scale: float, fmt: Fp8Format) -> dict[str, float]:
    """Each column from its definition, value by value, in float64."""
    wide = x.float().numpy().ravel()
    finite = np.isfinite(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.abs(wide * np.float32(scale)).astype(np.float64)
    q = _expected_codes(x, scale, fmt).ravel().view(ML_DTYPE[fmt.name]).astype(np.float64)
    # Rounded to the format's precision as if its exponents had no end: what is then beyond max was clipped.
    mantissa, exponent = np.frexp(scaled)
    places = 1 + fmt.mantissa_bits
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.ldexp(np.rint(np.ldexp(mantissa, places)), exponent - places)
    exact = wide.astype(np.float64)[finite] * np.float64(np.float32(scale))
    inv_scale = 1 / np.float64(np.float32(scale))
    return {
        "writes": 1,
        "amax": np.abs(wide[finite]).max(initial=0.0),
        "scale_min": np.float32(scale),
        "scale_max": np.float32(scale),
        "numel": wide.size,
        "zeros": (wide == 0).sum(),
        "overflow": (finite & (rounded > fmt.max)).sum(),
        "underflow": ((wide != 0) & (q == 0)).sum(),
        "subnormal": ((q != 0) & (np.abs(q) < fmt.smallest_normal)).sum(),
        "nonfinite": (~finite).sum(),
        "sum_sq": np.square(exact).sum() * inv_scale**2,
        "err_sq": np.square(exact - q[finite]).sum() * inv_scale**2,
    }


def _assert_row(words: torch.Tensor, slot: int, expected: dict[str, float]) -> None:
    row = words[slot].numpy()
    got = {name: row[i : i + 1].view(np.float64)[0] if is_float(name) else row[i] for i, name in enumerate(COLUMNS)}
    sums = {"sum_sq", "err_sq"}
    wrong = {name: (got[name], expected[name]) for name in COLUMNS if name not in sums and got[name] != expected[name]}
    assert not wrong, f"(got, expected): {wrong}"
    for name in sums:
        assert got[name] == pytest.approx(expected[name], rel=1e-5, abs=0), name


@pytest.fixture
def expected_codes() -> Callable[[torch.Tensor, float, Fp8Format], npt.NDArray[np.uint8]]:
    return _expected_codes


@pytest.fixture
def expected_row() -> Callable[[torch.Tensor, float, Fp8Format], dict[str, float]]:
    return _expected_row


@pytest.fixture
def assert_row() -> Callable[[torch.Tensor, int, dict[str, float]], None]:
    """Compares row `slot` with the expected columns: integers and maxima exactly, float sums to 1e-5."""
    return _assert_row
