"""Casts with statistics on a CPU, by cpu.cpp: compiled on first use in seconds, then cached, called through ctypes.

The functions are those of every kernel module (eager, triton): device-side work only, payload and integer counters
identical on all paths. Inputs may be bfloat16, float16 or float32, of any strides (others are made contiguous first);
outputs are contiguous.

`unavailable_reason()` says why this machine cannot use them, usually that it has no C++ compiler; the eager path then
does the same work. Calls release the GIL and use `torch.get_num_threads()` threads. Rows are merged under a
lock of the process, so a backward in another thread may write to the same arena; resetting or copying the arena at
the same time is for the caller to order, as it is on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

from fp8core.formats import FORMATS, Fp8Format
from fp8core.kernels import eager
from fp8core.records import COLUMNS

INPUT_TYPES = (torch.bfloat16, torch.float16, torch.float32)

# Words of a row as cpu.cpp's `struct Row` has them.
_ROW = (
    *("writes", "amax", "scale_min", "scale_max", "numel", "zeros", "overflow", "underflow", "subnormal"),
    *("nonfinite", "sum_sq", "err_sq"),
)
assert COLUMNS == _ROW, "cpu.cpp's struct Row and records.COLUMNS differ"

_SOURCE = Path(__file__).with_name("cpu.cpp")
# Contracting x * scale + c into one rounding would break the rounding to FP8.
_COMMON_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-w")
_FLAG_SETS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
_COMPILE_DEADLINE_S = 120.0
_NO_SCALE = 1  # cpu.cpp's `Outcome`
# Below this one thread is faster than waking the others.
_ELEMENTS_FOR_THREADS = 1 << 16


def unavailable_reason() -> str | None:
    """Why these kernels cannot run here, as a sentence, or None when they can. The first call may compile."""
    _, reason = _load()
    return reason


def amax(x: torch.Tensor) -> torch.Tensor:
    """The largest finite |x| as a float32 0-d tensor; 0 if there is none."""
    x = _checked(x)
    result = torch.empty((), dtype=torch.float32)
    _library().fp8_amax(*_tensor(x), result.data_ptr(), _threads(x.numel()))
    return result


def cast(
    x: torch.Tensor,
    scale: torch.Tensor,
    fmt: Fp8Format,
    *,
    words: torch.Tensor | None = None,
    slot: torch.Tensor | None = None,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` in FP8 and its amax; with `words`, this call's statistics merged into row `slot`.

    The payload is the saturating round-half-even cast of fl32(x * scale): NaN becomes the format's NaN with x's sign
    (FNUZ has one NaN, without a sign), an infinity becomes the largest value and counts as nonfinite only. `scale`
    is a finite float32 0-d tensor, not negative. Where x * scale leaves float32's range a finite x is clipped like any
    other overflow.

    `words` is int64 [slots, len(COLUMNS)], `slot` a 0-d int64 tensor; `overwrite` replaces the row (weights).

    Raises:
        TypeError: x, words or slot have another dtype.
        IndexError: `slot` is outside `words`.
        ValueError: `scale` is negative, infinite or NaN.
    """
    x = _checked(x)
    payload = torch.empty(x.shape, dtype=getattr(torch, fmt.torch_dtype))
    largest = torch.empty((), dtype=torch.float32)
    row = (None, 0, None) if words is None else _row(words, slot)
    outcome = _library().fp8_cast(
        *(*_tensor(x), _scale_address(scale), _target(fmt.name), payload.data_ptr()),
        *(largest.data_ptr(), *row, overwrite, _threads(x.numel())),
    )
    if outcome:
        raise _refusal(outcome, scale, slot, words)
    return payload, largest


def count(
    x: torch.Tensor, scale: torch.Tensor, fmt: Fp8Format, *, words: torch.Tensor, slot: torch.Tensor, overwrite: bool
) -> torch.Tensor:
    """The amax of `x`, and the statistics that `cast` leaves, bit for bit, in less time: there is no payload."""
    x = _checked(x)
    largest = torch.empty((), dtype=torch.float32)
    outcome = _library().fp8_count(
        *(*_tensor(x), _scale_address(scale), _target(fmt.name)),
        *(largest.data_ptr(), *_row(words, slot), overwrite, _threads(x.numel())),
    )
    if outcome:
        raise _refusal(outcome, scale, slot, words)
    return largest


def count_by_amax(
    x: torch.Tensor,
    fmt: Fp8Format,
    margin: int,
    clamp: int,
    *,
    words: torch.Tensor,
    slot: torch.Tensor,
    overwrite: bool,
    last_scales: torch.Tensor,
) -> None:
    """`count` with the scale of AmaxScaling. Where the slot's last scale is right, x is read once, not twice."""
    x = _checked(x)
    outcome = _library().fp8_count_by_amax(
        *(*_tensor(x), math.ldexp(fmt.max, -margin), clamp, _target(fmt.name)),
        *(last_scales.data_ptr(), *_row(words, slot), overwrite, _threads(x.numel())),
    )
    if outcome:
        raise _refusal(outcome, None, slot, words)


def dequantize(q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The exact values of the codes of `q` in float32 or bfloat16; no scale is applied.

    Raises:
        TypeError: `q` is not FP8, or `dtype` is another one.
    """
    if q.dtype not in _format_by_dtype():
        raise TypeError(f"q is {q.dtype}; expected one of {', '.join(map(str, _format_by_dtype()))}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"dtype is {dtype}; an FP8 tensor dequantises to torch.float32 or torch.bfloat16")
    q = q.contiguous()
    out = torch.empty(q.shape, dtype=dtype)
    _library().fp8_dequantize(
        q.data_ptr(),
        q.numel(),
        _target(_format_by_dtype()[q.dtype].name),
        out.data_ptr(),
        dtype == torch.bfloat16,
        _threads(q.numel()),
    )
    return out


def unscale(
    product: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """`product` / (scale_a * scale_b) in `out_dtype`, rounded once; see `eager.unscale`. May reuse `product`."""
    if product.dtype != torch.float32 or out_dtype not in (torch.float32, torch.bfloat16):
        return eager.unscale(product, scale_a, scale_b, out_dtype)
    narrow = out_dtype == torch.bfloat16
    out = torch.empty_like(product, dtype=out_dtype) if narrow else product
    n = product.numel()
    _library().fp8_unscale(
        *(product.data_ptr(), n, scale_a.data_ptr(), scale_b.data_ptr(), out.data_ptr(), narrow, _threads(n)),
    )
    return out


def exponent_histogram(x: torch.Tensor) -> torch.Tensor:
    """How many elements have each exponent, before any scale: int64 [256].

    Bin e counts 2**(e - 127) <= |x| < 2**(e - 126); bin 0 holds zeros and everything below 2**-126, bin 255 Inf and
    NaN. Costs one to two times as much as the cast with statistics.
    """
    x = _checked(x)
    counts = torch.zeros(256, dtype=torch.int64)
    _library().fp8_exponents(*_tensor(x), counts.data_ptr(), _threads(x.numel()))
    return counts


def _checked(x: torch.Tensor) -> torch.Tensor:
    if x.dtype not in INPUT_TYPES:
        raise TypeError(f"x is {x.dtype}; expected one of {', '.join(map(str, INPUT_TYPES))}")
    assert x.device.type == "cpu", x.device
    return x if x.is_contiguous() else x.contiguous()


def _tensor(x: torch.Tensor) -> tuple[int, int, int]:
    """The arguments that stand for `x`: its address, its elements, its type."""
    return x.data_ptr(), x.numel(), INPUT_TYPES.index(x.dtype)


def _scale_address(scale: torch.Tensor) -> int:
    if scale.dtype != torch.float32 or scale.numel() != 1:
        raise TypeError(f"scale is {scale.dtype} {list(scale.shape)}; expected a float32 0-d tensor")
    return scale.data_ptr()


def _row(words: torch.Tensor, slot: torch.Tensor | None) -> tuple[int, int, int]:
    """The arguments that stand for row `slot` of `words`: the library reads the slot, which spares a call of torch."""
    if words.dtype != torch.int64 or words.ndim != 2 or words.shape[1] != len(COLUMNS) or not words.is_contiguous():
        raise TypeError(f"words are {words.dtype} {list(words.shape)}; expected int64 [slots, {len(COLUMNS)}]")
    if slot is None or slot.dtype != torch.int64:
        raise TypeError(f"slot is {slot!r}; expected an int64 0-d tensor")
    return words.data_ptr(), words.shape[0], slot.data_ptr()


def _refusal(
    outcome: int, scale: torch.Tensor | None, slot: torch.Tensor | None, words: torch.Tensor | None
) -> Exception:
    """What an outcome of cpu.cpp other than DONE means."""
    if outcome == _NO_SCALE and scale is not None:
        return ValueError(f"scale is {float(scale)}; expected a finite number that is not negative")
    assert slot is not None
    assert words is not None
    return IndexError(f"slot is {int(slot)}; the arena has {words.shape[0]} slots")


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= _ELEMENTS_FOR_THREADS else 1


class _Target(ctypes.Structure):
    """cpu.cpp's `struct Target`: a format, its magnitudes as float32 bits."""

    _fields_ = (
        ("mantissa_bits", ctypes.c_int32),
        ("smallest_normal", ctypes.c_int32),
        ("max", ctypes.c_int32),
        ("overflow_above", ctypes.c_int32),
        ("fnuz", ctypes.c_int32),
    )


@functools.cache
def _target(fmt_name: str) -> _Target:
    fmt = FORMATS[fmt_name]
    return _Target(
        mantissa_bits=fmt.mantissa_bits,
        smallest_normal=_float32_bits(fmt.smallest_normal),
        max=_float32_bits(fmt.max),
        overflow_above=_float32_bits(fmt.overflow_limit) - int(fmt.ties_overflow),
        fnuz=fmt.name.endswith("FNUZ"),
    )


def _float32_bits(value: float) -> int:
    return ctypes.c_int32.from_buffer(ctypes.c_float(value)).value


@functools.cache
def _format_by_dtype() -> dict[torch.dtype, Fp8Format]:
    return {getattr(torch, fmt.torch_dtype): fmt for fmt in FORMATS.values()}


# ----------------------------------------------------------------------------------------------- building and loading


class _UnavailableError(Exception):
    """The library cannot be built or loaded here; the message says why."""


_load_lock = threading.Lock()
_loaded: tuple[ctypes.CDLL | None, str | None] | None = None


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none; decided once a process."""
    global _loaded
    if _loaded is None:
        with _load_lock:
            if _loaded is None:
                try:
                    _loaded = _open(build()), None
                except _UnavailableError as error:
                    _loaded = None, str(error)
    return _loaded


def build(cache_dir: Path | None = None, compiler: str | None = None) -> Path:
    """The compiled library's path, compiling it unless it is cached.

    The name carries a hash of the source, the flags, the compiler and the processor, so that a cache on a shared
    home serves different machines. Several processes may build at once: each renames its own file into place.
    """
    cache_dir = cache_dir or _user_cache() / "fp8scope" / "kernels"
    compiler = compiler or _find_compiler()
    source = _SOURCE.read_bytes()
    reasons = []
    for extra in _FLAG_SETS:
        flags = (*_COMMON_FLAGS, *extra)
        key = hashlib.sha256(repr((source, flags, compiler, _processor())).encode()).hexdigest()[:20]
        library = cache_dir / f"cpu-{key}.so"
        if library.exists():
            return library
        failure = _compile(compiler, flags, library)
        if failure is None:
            return library
        reasons.append(failure)
    raise _UnavailableError(f"{compiler} did not compile the CPU kernels: {reasons[-1]}")


def _user_cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise _UnavailableError(f"no place for the compiled CPU kernels: {error} Set XDG_CACHE_HOME") from None


def _find_compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise _UnavailableError("no C++ compiler: install g++ (or set CXX) for casts that are many times faster")


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> str | None:
    """Compiles to `library`; returns the compiler's first complaint, or None when it worked."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as scratch:
            built = Path(scratch) / library.name
            command = [compiler, *flags, str(_SOURCE), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_DEADLINE_S, check=False)
            if done.returncode != 0:
                return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
            built.replace(library)
    except subprocess.TimeoutExpired:
        return f"it took more than {_COMPILE_DEADLINE_S:.0f} s"
    except OSError as error:
        raise _UnavailableError(f"cannot write the compiled CPU kernels: {error}; set XDG_CACHE_HOME") from None
    return None


def _processor() -> str:
    """What -march=native depends on: the processor's model and features, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), *told])


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _UnavailableError(
            f"cannot load the compiled CPU kernels: {error}; delete the file to have it built anew"
        ) from None
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    target, tensor = ctypes.POINTER(_Target), (pointer, count, number)
    library.fp8_amax.argtypes = (*tensor, pointer, number)
    row = (pointer, count, pointer)
    library.fp8_cast.argtypes = (*tensor, pointer, target, pointer, pointer, *row, number, number)
    library.fp8_count.argtypes = (*tensor, pointer, target, pointer, *row, number, number)
    library.fp8_count_by_amax.argtypes = (*tensor, ctypes.c_double, number, target, pointer, *row, number, number)
    library.fp8_dequantize.argtypes = (pointer, count, target, pointer, number, number)
    library.fp8_unscale.argtypes = (pointer, count, pointer, pointer, pointer, number, number)
    library.fp8_exponents.argtypes = (*tensor, pointer, number)
    for name in ("amax", "dequantize", "unscale", "exponents"):
        getattr(library, f"fp8_{name}").restype = None
    return library
