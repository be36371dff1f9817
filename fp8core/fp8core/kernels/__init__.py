"""The passes over the data: amax, cast with statistics, dequantise. One module for each way to run them."""

from fp8core.kernels.dispatch import Kernels, kernels_for

__all__ = ["Kernels", "kernels_for"]
