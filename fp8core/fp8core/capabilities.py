"""What FP8 runs on here, in words: for bug reports and the first line of a training log."""

from __future__ import annotations

import torch

from fp8core.kernels import cpu
from fp8core.kernels.dispatch import why
from fp8core.matmul import has_bfloat16_gemm, has_fp8_tensor_cores


def capability() -> str:
    """One line for torch and one for each kind of device: which kernels run and how the GEMM is done."""
    lines = [f"torch {torch.__version__}", f"cpu: kernels {why('cpu')}; GEMM {_gemm(torch.device('cpu'))}"]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{device} ({torch.cuda.get_device_name(device)}, compute capability {major}.{minor})"
        lines.append(f"{name}: kernels {why('cuda')}; GEMM {_gemm(device)}")
    return "\n".join(lines)


def _gemm(device: torch.device) -> str:
    if has_fp8_tensor_cores(device):
        return "on FP8 tensor cores (E4M3FN and E5M2; FNUZ formats emulated in float32)"
    if device.type == "cpu" and why("cpu") == "cpu":
        return f"emulated in {cpu.engine()} (FP8 tensor cores need a CUDA device)"
    if has_bfloat16_gemm(device):
        return "emulated in bfloat16, in float32 where scales are not powers of two"
    if device.type == "cuda":
        return "emulated in float32 (FP8 tensor cores need compute capability 8.9)"
    return "emulated in float32 (no AVX512_BF16 or AMX)"
