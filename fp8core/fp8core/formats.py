"""The four FP8 formats and the pairs of them that training uses, as formulas over a few integers.

A format is (exponent bits, mantissa bits, bias) and which codes are not finite. Everything else follows: OCP's
E4M3FN and E5M2 (what NVIDIA's hardware computes in) and Graphcore's and AMD's E4M3FNUZ and E5M2FNUZ (the paper's,
arXiv 2309.17224 table 7). This module imports no torch; `torch_dtype` is the attribute's name on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fp8core.records import Role, parse_role


@dataclass(frozen=True)
class Fp8Format:
    """One FP8 format. `max_code` is the code of its largest finite value, sign bit clear."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_code: int
    torch_dtype: str

    @property
    def max(self) -> float:
        """The largest finite value."""
        exponent, mantissa = divmod(self.max_code, 1 << self.mantissa_bits)
        return float((1 + mantissa / (1 << self.mantissa_bits)) * 2.0 ** (exponent - self.bias))

    @property
    def smallest_normal(self) -> float:
        """The smallest positive normal value, 2**(1 - bias)."""
        return float(2.0 ** (1 - self.bias))

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive value, 2**(1 - bias - mantissa_bits)."""
        return float(2.0 ** (1 - self.bias - self.mantissa_bits))

    @property
    def overflow_limit(self) -> float:
        """The magnitude halfway between `max` and the next value that the exponent would allow.

        A value beyond it is clipped. At it, round-half-even decides: it stays `max` where that mantissa is even
        (E4M3FN: 464 is not an overflow) and is clipped where it is odd (see `ties_overflow`).
        """
        exponent = (self.max_code >> self.mantissa_bits) - self.bias
        return float(self.max + 2.0 ** (exponent - self.mantissa_bits - 1))

    @property
    def ties_overflow(self) -> bool:
        """Whether a magnitude equal to `overflow_limit` rounds up, out of range: where max's mantissa is odd."""
        return bool(self.max_code & 1)

    @property
    def flush_limit(self) -> float:
        """The largest magnitude that rounds to zero: half the smallest subnormal, a tie that goes to even."""
        return self.smallest_subnormal / 2

    def __str__(self) -> str:
        return self.name


E4M3FN = Fp8Format("E4M3FN", 4, 3, bias=7, max_code=0x7E, torch_dtype="float8_e4m3fn")
E5M2 = Fp8Format("E5M2", 5, 2, bias=15, max_code=0x7B, torch_dtype="float8_e5m2")
E4M3FNUZ = Fp8Format("E4M3FNUZ", 4, 3, bias=8, max_code=0x7F, torch_dtype="float8_e4m3fnuz")
E5M2FNUZ = Fp8Format("E5M2FNUZ", 5, 2, bias=16, max_code=0x7F, torch_dtype="float8_e5m2fnuz")

FORMATS = {fmt.name: fmt for fmt in (E4M3FN, E5M2, E4M3FNUZ, E5M2FNUZ)}


@dataclass(frozen=True)
class FormatPair:
    """Which format each role is cast to: `forward` for input and weight, `backward` for grad_output."""

    name: str
    forward: Fp8Format
    backward: Fp8Format

    def fmt(self, role: Role | str) -> Fp8Format:
        """The format of `role`."""
        return self.backward if parse_role(role) is Role.GRAD_OUTPUT else self.forward

    def __str__(self) -> str:
        return self.name


HYBRID = FormatPair("HYBRID", E4M3FN, E5M2)
E4M3 = FormatPair("E4M3", E4M3FN, E4M3FN)
GRAPHCORE = FormatPair("GRAPHCORE", E4M3FNUZ, E5M2FNUZ)

PAIRS = {pair.name: pair for pair in (HYBRID, E4M3, GRAPHCORE)}
