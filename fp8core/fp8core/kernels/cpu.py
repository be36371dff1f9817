"""Casts with statistics and GEMMs on a CPU, by cpu*.cpp, which cpu_build.py compiles, called by ctypes.

Casts and counts are those of every kernel module (eager, triton): device-side work only, payload and integer counters
identical on all paths. Inputs may be bfloat16, float16 or float32, of any strides (others are made contiguous first);
outputs are contiguous. The GEMM is for CPUs alone.

`unavailable_reason()` says why this machine cannot use them, usually that it has no C++ compiler; the eager path then
does the same work. Calls release the GIL and use `torch.get_num_threads()` threads. Rows are merged under a
lock of the process, so a backward in another thread may write to the same arena; resetting or copying the arena at
the same time is for the caller to order, as it is on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from pathlib import Path

import torch

from fp8core.formats import FORMATS, Fp8Format
from fp8core.kernels.cpu_build import UnavailableError, build
from fp8core.kernels.cpu_direct import DirectProduct, direct_product
from fp8core.records import COLUMNS

INPUT_TYPES = (torch.bfloat16, torch.float16, torch.float32)

# Words of a row as cpu.cpp's `struct Row` has them.
_ROW = (
    *("writes", "amax", "scale_min", "scale_max", "numel", "zeros", "overflow", "underflow", "subnormal"),
    *("nonfinite", "sum_sq", "err_sq"),
)
assert COLUMNS == _ROW, "cpu.cpp's struct Row and records.COLUMNS differ"

# What a GEMM can compute with, as cpu_gemm.h's `Engine` numbers it.
ENGINES = ("float32", "bfloat16 (AVX512_BF16)", "bfloat16 on AMX")

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


def scaled_mm(
    a_MK: torch.Tensor, b_KN: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """a_MK @ b_KN / (scale_a * scale_b) in `out_dtype`, rounded once, for FP8 operands of any strides.

    Where `is_registered()`, torch's dispatcher calls the same without Python on the way.
    """
    narrow = out_dtype == torch.bfloat16
    out_MN = torch.empty(a_MK.shape[0], b_KN.shape[1], dtype=out_dtype if narrow else torch.float32)
    failure = _library().fp8_scaled_mm(
        *(_matrix(a_MK), _matrix(b_KN), _scale_address(scale_a), _scale_address(scale_b)),
        *(out_MN.data_ptr(), narrow, torch.get_num_threads()),
    )
    if failure:
        raise MemoryError(f"no memory to multiply {list(a_MK.shape)} by {list(b_KN.shape)}")
    return out_MN if out_MN.dtype == out_dtype else out_MN.to(out_dtype)


def _no_product(*_: object) -> None:
    """None."""


# The product in float32 or bfloat16 past torch's dispatcher, or None where the operation is to be called.
product_or_none: DirectProduct = _no_product


def engine() -> str:
    """What the GEMM computes with: the fastest of ENGINES here, or what `use_engine` said."""
    return ENGINES[_library().fp8_engine()]


def engines() -> tuple[str, ...]:
    """Those of ENGINES that run here."""
    return tuple(name for number, name in enumerate(ENGINES) if _library().fp8_can_use(number))


def use_engine(name: str) -> None:
    """From now on, in the whole process, the GEMM computes with this one of `engines()`: for tests and benchmarks."""
    assert name in engines(), name
    _library().fp8_use_engine(ENGINES.index(name))


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


class _Matrix(ctypes.Structure):
    """cpu_gemm.h's `struct Matrix`."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("format", ctypes.POINTER(_Target)),
    )


def _matrix(q: torch.Tensor) -> _Matrix:
    fmt = _format_by_dtype()[q.dtype]
    return _Matrix(q.data_ptr(), *q.shape, *q.stride(), ctypes.pointer(_target(fmt.name)))


@functools.cache
def _format_by_dtype() -> dict[torch.dtype, Fp8Format]:
    return {getattr(torch, fmt.torch_dtype): fmt for fmt in FORMATS.values()}


# ------------------------------------------------------------------------------------------------------------- loading


_load_lock = threading.Lock()
_loaded: tuple[ctypes.CDLL | None, str | None] | None = None


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none; decided once a process."""
    global _loaded, product_or_none
    if _loaded is None:
        with _load_lock:
            if _loaded is None:
                try:
                    _loaded = _open(build()), None
                    if is_registered():
                        product_or_none = direct_product(_library(), scaled_mm) or _no_product
                except UnavailableError as error:
                    _loaded = None, str(error)
    return _loaded


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(
            f"cannot load the compiled CPU kernels: {error}; delete the file to have it built anew"
        ) from None
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    target, tensor = ctypes.POINTER(_Target), (pointer, count, number)
    library.fp8_register.argtypes = (ctypes.POINTER(_Torch),)
    library.fp8_amax.argtypes = (*tensor, pointer, number)
    row = (pointer, count, pointer)
    library.fp8_cast.argtypes = (*tensor, pointer, target, pointer, pointer, *row, number, number)
    library.fp8_count.argtypes = (*tensor, pointer, target, pointer, *row, number, number)
    library.fp8_count_by_amax.argtypes = (*tensor, ctypes.c_double, number, target, pointer, *row, number, number)
    library.fp8_dequantize.argtypes = (pointer, count, target, pointer, number, number)
    matrix = ctypes.POINTER(_Matrix)
    library.fp8_scaled_mm.argtypes = (matrix, matrix, pointer, pointer, pointer, number, number)
    library.fp8_can_use.argtypes = library.fp8_use_engine.argtypes = (number,)
    library.fp8_exponents.argtypes = (*tensor, pointer, number)
    for name in ("amax", "dequantize", "exponents", "use_engine"):
        getattr(library, f"fp8_{name}").restype = None
    return library


# ------------------------------------------------------------------------------------------------ torch's dispatcher


class _Torch(ctypes.Structure):
    """cpu_operator.cpp's `struct Torch`."""

    _FUNCTIONS = (
        *("aoti_torch_library_init_impl", "aoti_torch_library_impl", "aoti_torch_call_dispatcher"),
        *("torch_get_num_threads", "aoti_torch_get_dim", "aoti_torch_get_numel", "aoti_torch_get_dtype"),
        *("aoti_torch_get_sizes", "aoti_torch_get_strides", "aoti_torch_get_data_ptr", "aoti_torch_empty_strided"),
        "aoti_torch_delete_tensor_object",
    )
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _FUNCTIONS),
        ("float32", ctypes.c_int32),
        ("bfloat16", ctypes.c_int32),
        ("fp8", ctypes.c_int32 * 4),
        ("formats", ctypes.POINTER(_Target) * 4),
    )


@functools.cache
def is_registered() -> bool:
    """Whether cpu_operator.cpp is the body of torch.ops.fp8core.scaled_mm on CPU tensors; the first call makes it so.

    It needs torch 2.10. Before, the operation's body in Python calls `scaled_mm`: that takes some microseconds more.
    """
    libtorch = _libtorch()
    if libtorch is None:
        return False
    known = sorted(_format_by_dtype().items(), key=lambda item: item[1].name)
    return not _library().fp8_register(
        _Torch(
            *(ctypes.cast(getattr(libtorch, name), ctypes.c_void_p) for name in _Torch._FUNCTIONS),
            *(_torchs_number(libtorch, dtype) for dtype in (torch.float32, torch.bfloat16)),
            (ctypes.c_int32 * 4)(*(_torchs_number(libtorch, dtype) for dtype, _ in known)),
            (ctypes.POINTER(_Target) * 4)(*(ctypes.pointer(_target(fmt.name)) for _, fmt in known)),
        )
    )


def _libtorch() -> ctypes.CDLL | None:
    """The library that has all of torch's functions that are asked for."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        if all(hasattr(library, name) for name in _Torch._FUNCTIONS):
            return library
    return None


def _torchs_number(libtorch: ctypes.CDLL, dtype: torch.dtype) -> int:
    return int(getattr(libtorch, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")())
