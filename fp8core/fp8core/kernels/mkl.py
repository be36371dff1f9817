"""The float32 product of two bfloat16 matrices: `gemm(a_MK, b_KN)`, by the MKL that torch's x86 builds carry.

torch rounds the result of a bfloat16 GEMM to bfloat16, once too often where a scale is still to be divided out or a
gradient is wanted in float32. MKL's own `cblas_gemm_bf16bf16f32` keeps the float32 sum. On tile registers (AMX) it is
about five times as fast as a float32 GEMM, and as exact: FP8 values are bfloat16 numbers, their products float32 ones.
It is taken on AMX only: that is where the speed is, and those are processors that MKL was written for.

The function is found in the library that torch has loaded already, and has to multiply two small matrices right, in
each layout, before anything relies on it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112  # CBLAS's names
_Cblas = Callable[..., None]


def gemm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a_MK @ b_KN in float32, contiguous; a and b are bfloat16 on a CPU, contiguous or transposed, not empty."""
    found = _function()
    assert found is not None
    return _call(found, a_MK, b_KN)


def available() -> bool:
    """Whether `gemm` can be used here."""
    return torch.cpu._is_amx_tile_supported() and _function() is not None


@functools.cache
def _function() -> _Cblas | None:
    """cblas_gemm_bf16bf16f32 with 32-bit integers, or None where it is not there or something else."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            function = ctypes.CDLL(str(path)).cblas_gemm_bf16bf16f32
        except (OSError, AttributeError):
            continue
        number, pointer, real = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
        function.argtypes = (
            *(number, number, number),  # layout, transposition of a and of b
            *(number, number, number),  # M, N, K
            *(real, pointer, number, pointer, number),  # alpha, a and its leading dimension, b and its
            *(real, pointer, number),  # beta, result and its leading dimension
        )
        function.restype = None
        return function if _multiplies_right(function) else None
    return None


def _call(function: _Cblas, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    (M, K), N = a_MK.shape, b_KN.shape[1]
    (a, a_order, lda), (b, b_order, ldb) = _laid_out(a_MK), _laid_out(b_KN)
    out_MN = torch.empty(M, N, dtype=torch.float32)
    function(
        *(_ROW_MAJOR, a_order, b_order, M, N, K),
        *(1.0, a.data_ptr(), lda, b.data_ptr(), ldb, 0.0, out_MN.data_ptr(), N),
    )
    return out_MN


def _laid_out(matrix: Tensor) -> tuple[Tensor, int, int]:
    """The matrix in memory, whether it has to be read transposed, and the length of its rows there."""
    if matrix.t().is_contiguous() and not matrix.is_contiguous():
        return matrix, _TRANS, matrix.shape[0]
    return matrix.contiguous(), _NO_TRANS, matrix.shape[1]


def _multiplies_right(function: _Cblas) -> bool:
    a_MK, b_KN = (torch.arange(n, dtype=torch.bfloat16) % 17 - 8 for n in (5 * 33, 33 * 7))
    a_MK, b_KN = a_MK.view(5, 33), b_KN.view(33, 7)
    layouts = itertools.product((a_MK, a_MK.t().contiguous().t()), (b_KN, b_KN.t().contiguous().t()))
    return all(torch.equal(_call(function, a, b), (a.double() @ b.double()).float()) for a, b in layouts)
