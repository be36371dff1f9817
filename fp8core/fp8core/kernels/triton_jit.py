"""The Triton kernels: one pass over x that casts it and counts, in registers, what the cast did.

`triton.py` launches them. What a reader must know:

* The cast is cpu.cpp's, in integer and exact float32 arithmetic: add and subtract a power of two whose last place is
  the FP8 format's in that binade. It needs `enable_fp_fusion=False`: contracted, x * scale + place rounds once, not
  twice.
  HW_CAST takes the processor's conversion instead (OCP formats, compute capability 8.9 and up).
* bfloat16 comes as int16 words: Triton's interpreter, which the tests use, widens bfloat16 subnormals wrongly.
* A program goes over several blocks and keeps one accumulator for FOLD neighbouring elements, which one thread holds:
  an accumulator for each element took all registers. The five counters of an element share an int32, those of an
  accumulator an int64, WIDTH bits each: hence MAX_ITERATIONS blocks for a program.
* Each program leaves its totals in `partials`, float64 [PARTIALS, programs] (counts are exact there); `finalise`
  adds them up in a fixed order, so that sums do not change from run to run, and merges them into the arena's row.

Words as in cpu.cpp: y = fl32(x * scale), a is a magnitude's bits (sign clear).
"""

# mypy: ignore-errors
# The kernels are written in Triton's language, which has no types that mypy knows.

from __future__ import annotations

import triton
import triton.language as tl

from fp8core.records import COLUMNS

FOLD = tl.constexpr(8)
NARROW = tl.constexpr(4)  # bits of an element's counter: FOLD of them are added in it
WIDTH = tl.constexpr(12)  # bits of an accumulator's
MAX_ITERATIONS = 128  # 128 * FOLD < 2**WIDTH, and so many float32 additions keep a sum within 1e-5
PARTIALS = 7  # zeros, overflow, underflow, subnormal, nonfinite, sum_sq, err_sq

BFLOAT16 = tl.constexpr(0)
FLOAT16 = tl.constexpr(1)
FLOAT32 = tl.constexpr(2)

_WRITES = tl.constexpr(COLUMNS.index("writes"))
_AMAX = tl.constexpr(COLUMNS.index("amax"))
_SCALE_MIN = tl.constexpr(COLUMNS.index("scale_min"))
_SCALE_MAX = tl.constexpr(COLUMNS.index("scale_max"))
_NUMEL = tl.constexpr(COLUMNS.index("numel"))
_ZEROS = tl.constexpr(COLUMNS.index("zeros"))
_OVERFLOW = tl.constexpr(COLUMNS.index("overflow"))
_UNDERFLOW = tl.constexpr(COLUMNS.index("underflow"))
_SUBNORMAL = tl.constexpr(COLUMNS.index("subnormal"))
_NONFINITE = tl.constexpr(COLUMNS.index("nonfinite"))
_SUM_SQ = tl.constexpr(COLUMNS.index("sum_sq"))
_ERR_SQ = tl.constexpr(COLUMNS.index("err_sq"))
_ROW_WORDS = tl.constexpr(len(COLUMNS))
_INF = tl.constexpr(0x7F800000)


@triton.jit
def amax_kernel(x_ptr, amax_ptr, n, iterations, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Raises the float32 at `amax_ptr`, zero before, to the largest finite |x|."""
    largest = tl.zeros([BLOCK], tl.int32)
    for i in range(iterations):
        at, inside = _block(i, n, BLOCK)
        a = _bits(_widen(tl.load(x_ptr + at, mask=inside, other=0), TYPE)) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.where(a < _INF, a, 0))
    tl.atomic_max(amax_ptr, tl.max(largest, 0), sem="relaxed")


@triton.jit
def cast_kernel(
    x_ptr, q_ptr, scale_ptr, amax_ptr, partials_ptr, n, iterations,
    TYPE: tl.constexpr, MANTISSA_BITS: tl.constexpr, SMALLEST_NORMAL: tl.constexpr, MAX: tl.constexpr,
    OVERFLOW_ABOVE: tl.constexpr, FNUZ: tl.constexpr, STATS: tl.constexpr, HW_CAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [n] to codes [n]; raises `amax`; with STATS leaves this program's totals in `partials`."""
    scale = tl.load(scale_ptr)
    largest = tl.zeros([BLOCK // FOLD], tl.int32)
    counts = tl.zeros([BLOCK // FOLD], tl.int64)
    sum_sq = tl.zeros([BLOCK // FOLD], tl.float32)
    err_sq = tl.zeros([BLOCK // FOLD], tl.float32)
    for i in range(iterations):
        at, inside = _block(i, n, BLOCK)
        wide = _widen(tl.load(x_ptr + at, mask=inside, other=0), TYPE)
        y, code, q = _cast(wide, scale, MANTISSA_BITS, SMALLEST_NORMAL, MAX, FNUZ, HW_CAST)
        tl.store(q_ptr + at, _payload(code, wide, FNUZ), mask=inside)
        largest = tl.maximum(largest, tl.max(_folded(_finite_magnitude(wide)), 1))
        if STATS:
            counts += _widened(tl.sum(_folded(_count(wide, y, code, inside, MANTISSA_BITS, OVERFLOW_ABOVE)), 1))
            square, error = _squares(wide, y, q)
            sum_sq += tl.sum(_folded(square), 1)
            err_sq += tl.sum(_folded(error), 1)
    amax = tl.max(largest, 0)
    tl.atomic_max(amax_ptr, amax, sem="relaxed")
    if STATS:
        total_sq = tl.sum(sum_sq.to(tl.float64), 0)
        total_err = tl.sum(err_sq.to(tl.float64), 0)
        if _squares_leave_float32(amax, scale):
            exact_sq = tl.zeros([BLOCK // FOLD], tl.float64)
            exact_err = tl.zeros([BLOCK // FOLD], tl.float64)
            for i in range(iterations):
                at, inside = _block(i, n, BLOCK)
                wide = _widen(tl.load(x_ptr + at, mask=inside, other=0), TYPE)
                y, code, q = _cast(wide, scale, MANTISSA_BITS, SMALLEST_NORMAL, MAX, FNUZ, HW_CAST)
                square64, error64 = _squares_in_float64(wide, scale, q)
                exact_sq += tl.sum(_folded(square64), 1)
                exact_err += tl.sum(_folded(error64), 1)
            total_sq = tl.sum(exact_sq, 0)
            total_err = tl.sum(exact_err, 0)
        _leave_partials(partials_ptr, counts, total_sq, total_err)


@triton.jit
def cast_transpose_kernel(
    x_ptr, q_ptr, q_t_ptr, scale_ptr, amax_ptr, partials_ptr, rows, columns, iterations,
    TYPE: tl.constexpr, MANTISSA_BITS: tl.constexpr, SMALLEST_NORMAL: tl.constexpr, MAX: tl.constexpr,
    OVERFLOW_ABOVE: tl.constexpr, FNUZ: tl.constexpr, STATS: tl.constexpr, HW_CAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [rows, columns] to codes of that shape and of the transposed one, else as `cast_kernel`."""
    scale = tl.load(scale_ptr)
    ACCUMULATORS: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS // FOLD
    largest = tl.zeros([ACCUMULATORS], tl.int32)
    counts = tl.zeros([ACCUMULATORS], tl.int64)
    sum_sq = tl.zeros([ACCUMULATORS], tl.float32)
    err_sq = tl.zeros([ACCUMULATORS], tl.float32)
    for i in range(iterations):
        row, column = _tile(i, columns, BLOCK_ROWS, BLOCK_COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        wide = _widen(tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0), TYPE)
        y, code, q = _cast(wide, scale, MANTISSA_BITS, SMALLEST_NORMAL, MAX, FNUZ, HW_CAST)
        payload = _payload(code, wide, FNUZ)
        tl.store(q_ptr + row[:, None] * columns + column[None, :], payload, mask=inside)
        tl.store(q_t_ptr + column[:, None] * rows + row[None, :], tl.trans(payload), mask=tl.trans(inside))
        largest = tl.maximum(largest, tl.max(_folded(_finite_magnitude(wide)), 1))
        if STATS:
            counts += _widened(tl.sum(_folded(_count(wide, y, code, inside, MANTISSA_BITS, OVERFLOW_ABOVE)), 1))
            square, error = _squares(wide, y, q)
            sum_sq += tl.sum(_folded(square), 1)
            err_sq += tl.sum(_folded(error), 1)
    amax = tl.max(largest, 0)
    tl.atomic_max(amax_ptr, amax, sem="relaxed")
    if STATS:
        total_sq = tl.sum(sum_sq.to(tl.float64), 0)
        total_err = tl.sum(err_sq.to(tl.float64), 0)
        if _squares_leave_float32(amax, scale):
            exact_sq = tl.zeros([ACCUMULATORS], tl.float64)
            exact_err = tl.zeros([ACCUMULATORS], tl.float64)
            for i in range(iterations):
                row, column = _tile(i, columns, BLOCK_ROWS, BLOCK_COLUMNS)
                inside = (row < rows)[:, None] & (column < columns)[None, :]
                wide = _widen(tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0), TYPE)
                y, code, q = _cast(wide, scale, MANTISSA_BITS, SMALLEST_NORMAL, MAX, FNUZ, HW_CAST)
                square64, error64 = _squares_in_float64(wide, scale, q)
                exact_sq += tl.sum(_folded(square64), 1)
                exact_err += tl.sum(_folded(error64), 1)
            total_sq = tl.sum(exact_sq, 0)
            total_err = tl.sum(exact_err, 0)
        _leave_partials(partials_ptr, counts, total_sq, total_err)


@triton.jit
def finalise_kernel(
    partials_ptr, programs, words_ptr, slot_ptr, scale_ptr, amax_ptr, numel,
    OVERWRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges the totals of a cast into row `slot` of the arena; one program.

    The merges are atomic, so that casts on two streams may share a row. OVERWRITE replaces the row instead.
    """
    row = words_ptr + tl.load(slot_ptr) * _ROW_WORDS
    scale = tl.load(scale_ptr).to(tl.float64)
    inv_scale = 1.0 / scale
    amax = tl.load(amax_ptr).to(tl.float64)
    zeros = _total(partials_ptr, 0, programs, BLOCK).to(tl.int64)
    overflow = _total(partials_ptr, 1, programs, BLOCK).to(tl.int64)
    underflow = _total(partials_ptr, 2, programs, BLOCK).to(tl.int64)
    subnormal = _total(partials_ptr, 3, programs, BLOCK).to(tl.int64)
    nonfinite = _total(partials_ptr, 4, programs, BLOCK).to(tl.int64)
    sum_sq = _total(partials_ptr, 5, programs, BLOCK) * inv_scale * inv_scale
    err_sq = _total(partials_ptr, 6, programs, BLOCK) * inv_scale * inv_scale
    float_row = row.to(tl.pointer_type(tl.float64), bitcast=True)
    if OVERWRITE:
        tl.store(row + _WRITES, 1)
        tl.store(float_row + _AMAX, amax)
        tl.store(float_row + _SCALE_MIN, scale)
        tl.store(float_row + _SCALE_MAX, scale)
        tl.store(row + _NUMEL, numel)
        tl.store(row + _ZEROS, zeros)
        tl.store(row + _OVERFLOW, overflow)
        tl.store(row + _UNDERFLOW, underflow)
        tl.store(row + _SUBNORMAL, subnormal)
        tl.store(row + _NONFINITE, nonfinite)
        tl.store(float_row + _SUM_SQ, sum_sq)
        tl.store(float_row + _ERR_SQ, err_sq)
    else:
        # Non-negative float64s order like their bits.
        tl.atomic_add(row + _WRITES, 1, sem="relaxed")
        tl.atomic_max(row + _AMAX, amax.to(tl.int64, bitcast=True), sem="relaxed")
        tl.atomic_min(row + _SCALE_MIN, scale.to(tl.int64, bitcast=True), sem="relaxed")
        tl.atomic_max(row + _SCALE_MAX, scale.to(tl.int64, bitcast=True), sem="relaxed")
        tl.atomic_add(row + _NUMEL, numel, sem="relaxed")
        tl.atomic_add(row + _ZEROS, zeros, sem="relaxed")
        tl.atomic_add(row + _OVERFLOW, overflow, sem="relaxed")
        tl.atomic_add(row + _UNDERFLOW, underflow, sem="relaxed")
        tl.atomic_add(row + _SUBNORMAL, subnormal, sem="relaxed")
        tl.atomic_add(row + _NONFINITE, nonfinite, sem="relaxed")
        tl.atomic_add(float_row + _SUM_SQ, sum_sq, sem="relaxed")
        tl.atomic_add(float_row + _ERR_SQ, err_sq, sem="relaxed")


@triton.jit
def exponents_kernel(x_ptr, counts_ptr, n, iterations, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds to counts[256] how many elements have each biased float32 exponent."""
    counts = tl.zeros([256], tl.int32)
    for i in range(iterations):
        at, inside = _block(i, n, BLOCK)
        bits = _bits(_widen(tl.load(x_ptr + at, mask=inside, other=0), TYPE))
        counts += tl.histogram((bits >> 23) & 0xFF, 256, mask=inside)
    tl.atomic_add(counts_ptr + tl.arange(0, 256), counts.to(tl.int64), sem="relaxed")


# --------------------------------------------------------------------------------------------- where a program works


@triton.jit
def _block(i, n, BLOCK: tl.constexpr):
    """Offsets of this program's i-th block, and which of them are inside."""
    block = i * tl.num_programs(0) + tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < n


@triton.jit
def _tile(i, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Row and column numbers of this program's i-th tile; beyond the last tile the rows are outside."""
    tile = i * tl.num_programs(0) + tl.program_id(0)
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (tile // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tile % across).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return row, column


# ------------------------------------------------------------------------------------------------------ one element


@triton.jit
def _bits(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _widen(words, TYPE: tl.constexpr):
    """x as float32; exact."""
    if TYPE == BFLOAT16:
        return _float(words.to(tl.int32) << 16)
    return words.to(tl.float32)


@triton.jit
def _finite_magnitude(wide):
    a = _bits(wide) & 0x7FFFFFFF
    return tl.where(a < _INF, a, 0)


@triton.jit
def _cast(
    wide, scale,
    MANTISSA_BITS: tl.constexpr, SMALLEST_NORMAL: tl.constexpr, MAX: tl.constexpr,
    FNUZ: tl.constexpr, HW_CAST: tl.constexpr,
):  # fmt: skip
    """y, and the code (without sign) and value of |q|. Those of NaN mean nothing; see `_payload`."""
    y = wide * scale
    a = _bits(y) & 0x7FFFFFFF
    clamped = tl.minimum(a, MAX)
    if HW_CAST:
        tl.static_assert(not FNUZ, "the processor converts OCP formats only")
        hardware = _float(clamped).to(tl.float8e4nv if MANTISSA_BITS == 3 else tl.float8e5)
        code = hardware.to(tl.uint8, bitcast=True).to(tl.int32)
        q = hardware.to(tl.float32)
    else:
        SHIFT: tl.constexpr = 23 - MANTISSA_BITS
        binade = tl.maximum(clamped & _INF, SMALLEST_NORMAL)
        place = _float(binade + (SHIFT << 23))
        placed = _float(clamped) + place
        code = _bits(placed) - _bits(place) + ((binade - SMALLEST_NORMAL) >> SHIFT)
        q = placed - place
    return y, code, q


@triton.jit
def _payload(code, wide, FNUZ: tl.constexpr):
    """The bytes to store: the code with x's sign, or the format's NaN."""
    sign = (_bits(wide) >> 24) & 0x80
    nan = (_bits(wide) & 0x7FFFFFFF) > _INF
    if FNUZ:
        return tl.where(nan, 0x80, tl.where(code == 0, 0, code | sign)).to(tl.uint8)
    return (tl.where(nan, 0x7F, code) | sign).to(tl.uint8)


@triton.jit
def _count(wide, y, code, inside, MANTISSA_BITS: tl.constexpr, OVERFLOW_ABOVE: tl.constexpr):
    """What this element adds to the five counters, packed."""
    wide_a = _bits(wide) & 0x7FFFFFFF
    a = _bits(y) & 0x7FFFFFFF
    finite = wide_a < _INF
    zeros = ((wide_a == 0) & inside).to(tl.int32)
    overflow = (finite & (a > OVERFLOW_ABOVE)).to(tl.int32)
    underflow = ((wide_a > 0) & finite & (code == 0)).to(tl.int32)
    subnormal = (finite & (code > 0) & (code < (1 << MANTISSA_BITS))).to(tl.int32)
    nonfinite = (wide_a >= _INF).to(tl.int32)
    return (
        zeros
        | (overflow << NARROW)
        | (underflow << (2 * NARROW))
        | (subnormal << (3 * NARROW))
        | (nonfinite << (4 * NARROW))
    )


@triton.jit
def _widened(counts):
    """The five counters of an int32 in an int64."""
    wide = tl.zeros_like(counts).to(tl.int64)
    for counter in tl.static_range(5):
        wide |= ((counts >> (counter * NARROW)) & 0xF).to(tl.int64) << (counter * WIDTH)
    return wide


@triton.jit
def _folded(values):
    """[..] as [accumulators, FOLD]."""
    return tl.reshape(values, [values.numel // FOLD, FOLD])


@triton.jit
def _squares(wide, y, q):
    """y^2 and (|y| - |q|)^2 in float32, of a finite element."""
    finite = (_bits(wide) & 0x7FFFFFFF) < _INF
    error = tl.abs(y) - q
    return tl.where(finite, y * y, 0.0), tl.where(finite, error * error, 0.0)


@triton.jit
def _squares_in_float64(wide, scale, q):
    finite = (_bits(wide) & 0x7FFFFFFF) < _INF
    y = tl.abs(wide).to(tl.float64) * scale.to(tl.float64)
    error = y - q.to(tl.float64)
    return tl.where(finite, y * y, 0.0), tl.where(finite, error * error, 0.0)


@triton.jit
def _squares_leave_float32(amax_bits, scale):
    """Whether this program's float32 squares may have overflowed, or lost what matters to their sum."""
    y_max = _float(amax_bits) * scale
    return (amax_bits > 0) & ((y_max < 9.094947e-13) | (y_max > 1.1258999e15))  # 2**-40, 2**50


# ---------------------------------------------------------------------------------------------------------- totals


@triton.jit
def _leave_partials(partials_ptr, counts, sum_sq, err_sq):
    programs = tl.num_programs(0)
    mine = partials_ptr + tl.program_id(0)
    for counter in tl.static_range(5):
        count = tl.sum((counts >> (counter * WIDTH)) & 0xFFF, 0)
        tl.store(mine + counter * programs, count.to(tl.float64))
    tl.store(mine + 5 * programs, sum_sq)
    tl.store(mine + 6 * programs, err_sq)


@triton.jit
def _total(partials_ptr, which, programs, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, programs, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + which * programs + at, mask=at < programs, other=0.0)
    return tl.sum(total, 0)
