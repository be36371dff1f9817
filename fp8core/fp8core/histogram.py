"""How the magnitudes of a tensor are distributed over powers of two, before any scaling.

Bin e counts 2**(e - 127) <= |x| < 2**(e - 126); bin 0 zeros and magnitudes below 2**-126, bin 255 Inf and NaN. The
counts bound, within one bin, how many elements any power-of-two scale would have clipped or flushed in any format: the
formats' limits lie inside a bin (464 = 1.8125 * 2**8), so the elements of that one are in doubt. They say nothing about
sqnr.

A histogram costs about as much as the cast with statistics, so it is sampled: see `StatsArena.record_histograms`.
"""

from __future__ import annotations

from torch import Tensor

from fp8core.kernels import kernels_for


def exponent_histogram(x: Tensor) -> Tensor:
    """The histogram of `x` (bfloat16, float16 or float32), int64 [256], on x's device; the host does not wait."""
    return kernels_for(x.device.type).exponent_histogram(x.detach().contiguous())
