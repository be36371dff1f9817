"""FP8 for training: formats, scaling recipes, casts with statistics, GEMMs, `Fp8Linear`, model conversion.

In reading order: `formats`, `records`, `recipes` and `scaling` import no torch; `stats`, `quantize`, `kernels`,
`matmul`, `autograd`, `linear` and `convert` need it, and are imported when one of their names is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fp8core.formats import E4M3, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, FORMATS, GRAPHCORE, HYBRID, FormatPair, Fp8Format
from fp8core.recipes import AmaxScaling, ConstantScaling, CurrentScaling, DelayedScaling, parse_recipe
from fp8core.scaling import scale_exp2_from_amax

if TYPE_CHECKING:
    from fp8core.capabilities import capability
    from fp8core.convert import Override, convert_to_fp8
    from fp8core.histogram import exponent_histogram
    from fp8core.inference import quantize_for_inference
    from fp8core.linear import Fp8Linear
    from fp8core.stats import StatsArena

__all__ = [
    "E4M3",
    "E4M3FN",
    "E4M3FNUZ",
    "E5M2",
    "E5M2FNUZ",
    "FORMATS",
    "GRAPHCORE",
    "HYBRID",
    "AmaxScaling",
    "ConstantScaling",
    "CurrentScaling",
    "DelayedScaling",
    "FormatPair",
    "Fp8Format",
    "Fp8Linear",
    "Override",
    "StatsArena",
    "capability",
    "convert_to_fp8",
    "exponent_histogram",
    "parse_recipe",
    "quantize_for_inference",
    "scale_exp2_from_amax",
]

_NEEDS_TORCH = {
    "capability": "fp8core.capabilities",
    "convert_to_fp8": "fp8core.convert",
    "Fp8Linear": "fp8core.linear",
    "Override": "fp8core.convert",
    "StatsArena": "fp8core.stats",
    "exponent_histogram": "fp8core.histogram",
    "quantize_for_inference": "fp8core.inference",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module 'fp8core' has no attribute {name!r}")
    return getattr(import_module(_NEEDS_TORCH[name]), name)
