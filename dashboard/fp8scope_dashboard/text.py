"""Numbers and names as people read them: three significant digits, thin spaces, powers of two, nothing executable."""

from __future__ import annotations

import math

THIN = "\u2009"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def count(number: int) -> str:
    """12 340: an integer with thin spaces between thousands."""
    return f"{number:,}".replace(",", THIN)


def number(value: float) -> str:
    """A value with three significant digits; a dash where there is none."""
    if math.isnan(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        whole, _, part = f"{value:,.{digits}f}".replace(",", THIN).partition(".")
        return f"{whole}.{part.rstrip('0')}".rstrip(".").replace("-", "−")
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", "−")


def share(ratio: float) -> str:
    """A share of elements: per cent, or per million where that is easier to read."""
    if math.isnan(ratio):
        return "–"
    if ratio == 0:
        return "0"
    return f"{number(ratio * 1e6)} ppm" if ratio < 1e-4 else f"{number(ratio * 100)} %"


def size(value: float) -> str:
    """Bytes as kB, MB, GB: powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{number(value)} {unit}"
        value /= 1000
    return f"{number(value)} TB"


def exp2(exponent: float) -> str:
    """2⁻⁹: a power of two; other powers with their exponent as a number."""
    if math.isnan(exponent):
        return "–"
    if exponent == int(exponent):
        return f"2{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return f"2^{number(exponent)}"


def bits(value: float) -> str:
    """Headroom in bits."""
    return "–" if math.isnan(value) else f"{number(value)} bit" + "s" * (number(value) != "1")


def duration(seconds: float) -> str:
    """A time span in its two largest units that matter."""
    whole = max(0, int(seconds))
    for size, unit, smaller, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {small_unit}" if rest and whole < 10 * size else "")
    return f"{whole} s"


def plain(text: str) -> str:
    """A name for plotly, which reads tags and entities in labels: shown as it is, without control characters."""
    visible = "".join(c if c.isprintable() else "�" for c in text)
    return visible.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shorten(text: str, length: int) -> str:
    """A long name with its middle left out."""
    if len(text) <= length:
        return text
    return f"{text[: (length - 1) // 2]}…{text[len(text) - length // 2 :]}"
