"""The way of a product past torch's dispatcher, in a fifth of the time of a call by torch.ops (docs/adr/0019).

`direct_product` gives a function of C, cpu_operator.cpp's `product_or_none`, that takes the tensors' addresses out of
their Python objects. It multiplies where nothing could see the difference: plain CPU tensors without gradients, and no
mode, transformation, tracer or profiler in this thread. Otherwise it returns None, and the operation is to be called.

How torch lays out these objects is no interface. So it is found out in this process, by comparing their words with what
torch says of several tensors, and tried before it is used; where anything is not as expected there is no such function.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DirectProduct = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor | None]

_IMPL_WORDS = 26  # the size that torch asserts for a TensorImpl


class _Direct(ctypes.Structure):
    """cpu_operator.cpp's `struct Direct`."""

    _LIBTORCH = ("_ZN2at4impl27torch_function_mode_enabledEv", "_ZN2at12hasCallbacksEv")
    _LIBC10 = ("_ZNK3c1010TensorImpl13requires_gradEv",)
    _LIBTORCH_PYTHON = ("_Z16THPVariable_WrapRKN2at10TensorBaseE",)
    _PYTHON = ("PyEval_SaveThread", "PyEval_RestoreThread", "Py_NewRef")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_LIBTORCH, *_LIBC10, *_LIBTORCH_PYTHON, *_PYTHON, "dlsym")),
        *((name, ctypes.c_void_p) for name in ("libc10", "none", "tensor_class", "float32", "bfloat16")),
        *((name, ctypes.c_int64) for name in ("class_at", "impl_at", "keys_at")),
        ("tensor_keys", ctypes.c_uint64 * 2),
        ("thread_keys", ctypes.c_uint64 * 2),
    )


class _UnknownLayoutError(Exception):
    """torch keeps something elsewhere than expected."""


def direct_product(library: ctypes.CDLL, reference: DirectProduct) -> DirectProduct | None:
    """The function, if it works here, that is if it gives what `reference` does."""
    found: list[DirectProduct] = []

    def find() -> None:
        try:
            product = _function(library)
            _try(product, reference)
        except (OSError, AttributeError, _UnknownLayoutError):
            return
        found.append(product)

    # In a thread of its own no mode of the caller is active.
    thread = threading.Thread(target=find)
    thread.start()
    thread.join()
    return found[0] if found else None


def _function(library: ctypes.CDLL) -> DirectProduct:
    libtorch, libc10, libtorch_python = (_torchs_library(name) for name in ("torch_cpu", "c10", "torch_python"))
    _address(libc10, "_ZN3c104impl26raw_local_dispatch_key_setE")  # cpu_operator.cpp asks for it in each thread
    direct = _Direct(
        *(_address(libtorch, name) for name in _Direct._LIBTORCH),
        *(_address(libc10, name) for name in _Direct._LIBC10),
        *(_address(libtorch_python, name) for name in _Direct._LIBTORCH_PYTHON),
        *(_address(ctypes.pythonapi, name) for name in _Direct._PYTHON),
        *(_address(ctypes.CDLL(None), "dlsym"), libc10._handle),
        *(id(known) for known in (None, Tensor, torch.float32, torch.bfloat16)),
    )
    plain = torch.empty(3, device="cpu")
    with torch.inference_mode():
        inference = torch.empty(3, device="cpu")
    parameter, meta = torch.nn.Parameter(torch.empty(3, device="cpu")), torch.empty(3, device="meta")
    conjugated = torch.empty(3, dtype=torch.complex64, device="cpu").conj()
    all_kinds = (plain, inference, parameter, meta, conjugated)
    direct.class_at = _offset((id(x), type(x).__basicsize__, id(type(x))) for x in all_kinds)
    direct.impl_at = _offset((id(x), type(x).__basicsize__, x._cdata) for x in all_kinds)
    direct.keys_at = _offset((x._cdata, 8 * _IMPL_WORDS, _dispatch_keys(x)) for x in all_kinds)
    direct.tensor_keys = (_dispatch_keys(plain), _dispatch_keys(inference))

    library.fp8_use_direct.argtypes = (ctypes.POINTER(_Direct),)
    library.fp8_thread_keys.restype = ctypes.c_uint64
    library.fp8_direct_method.restype = ctypes.c_void_p
    library.fp8_use_direct(direct)
    outside = library.fp8_thread_keys()
    with torch.inference_mode():
        direct.thread_keys = (outside, library.fp8_thread_keys())
    library.fp8_use_direct(direct)
    new_function = ctypes.pythonapi.PyCFunction_NewEx
    new_function.argtypes, new_function.restype = (ctypes.c_void_p,) * 3, ctypes.py_object
    function: DirectProduct = new_function(library.fp8_direct_method(), None, None)
    return function


def _torchs_library(name: str) -> ctypes.CDLL:
    path = next((Path(torch.__file__).parent / "lib").glob(f"lib{name}.*"), None)
    if path is None:
        raise OSError(f"torch has no lib{name}")
    return ctypes.CDLL(str(path))


def _address(library: ctypes.CDLL, name: str) -> int | None:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value


def _dispatch_keys(x: Tensor) -> int:
    return int(torch._C._dispatch_keys(x).raw_repr())


def _offset(blocks: Iterable[tuple[int, int, int]]) -> int:
    """The one place where each block of memory, given by address and bytes, has its word."""
    places = set.intersection(
        *(
            {place for place in range(0, size, 8) if ctypes.c_uint64.from_address(address + place).value == word}
            for address, size, word in blocks
        )
    )
    if len(places) != 1:
        raise _UnknownLayoutError(f"found at {sorted(places)}")
    return places.pop()


def _try(product: DirectProduct, reference: DirectProduct) -> None:
    """Raises unless it gives what `reference` gives, and nothing where somebody looks on."""
    a_MK = torch.arange(48, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).view(6, 8)
    b_KN, scale = a_MK.t(), torch.full((), 3.7, device="cpu")
    for mode in (nullcontext(), torch.inference_mode()):
        with mode:
            for dtype in (torch.float32, torch.bfloat16):
                given, expected = (each(a_MK, b_KN, scale, scale, dtype) for each in (product, reference))
                assert expected is not None
                if given is None or not torch.equal(given, expected) or given.is_inference() != expected.is_inference():
                    raise _UnknownLayoutError("the product is another one")
    modes = (TorchFunctionMode(), TorchDispatchMode())  # type: ignore[no-untyped-call]  # torch's own signature
    for watching in modes:
        with watching:
            if product(a_MK, b_KN, scale, scale, torch.float32) is not None:
                raise _UnknownLayoutError(f"{type(watching).__name__} is not noticed")
