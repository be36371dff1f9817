// FP8 casts with statistics on a CPU: the whole of fp8core's hot path where there is no GPU.
//
// cpu_build.py compiles this file and its neighbours with the system's compiler on first use, cpu.py calls them through
// ctypes: no torch headers, no ABI to match, one library for every shape. The compiler writes the vector instructions:
// the code below is in GCC's portable vector types, which become AVX-512, AVX2 or NEON, whatever -march=native says.
//
// A tensor goes through in blocks of BLOCK elements that stay in the L1 cache, three passes each, every pass in
// the narrowest lanes that hold what it counts:
//
//   scan    over x in its own width (16 bits for bf16): amax, zeros, nonfinite
//   encode  in 32 bits: multiply, clamp, round, pack; overflow, sums of squares
//   tally   over the codes in 8 bits: underflow, subnormal
//
// Where nobody wants the payload there are no codes and two passes: `scan` counts underflow and subnormal too, by the
// largest magnitudes of x that become 0 or a subnormal (a cast never reverses the order of two magnitudes).
//
// Rounding is done by adding and subtracting a power of two whose last place is the FP8 format's at that magnitude:
// exact round-half-even in every format, subnormals included, as long as the compiler does not contract the
// arithmetic (-ffp-contract=off) and the processor rounds to nearest (DefaultFloatMode sees to it).
//
// Words: y = fl32(x * scale) is the scaled value, q the FP8 value, a a magnitude (sign bit clear).

#include "cpu_vectors.h"

#include <atomic>
#include <cfloat>
#include <cmath>
#include <mutex>
#include <type_traits>

namespace {

constexpr int BLOCK = 2048;        // elements of a block; at most 255 * 64: `tally` counts in 8 bits
constexpr int PAD = 64;            // blocks are padded with zeros to a multiple of this
constexpr int CHUNK_BLOCKS = 16;   // blocks of the smallest piece of work that a thread takes
constexpr int MAX_CHUNKS = 256;    // partial results live on the stack

template <class V> inline int64_t total(V lanes) {
    int64_t sum = 0;
    for (unsigned i = 0; i < sizeof(V) / sizeof(lanes[0]); ++i) sum += lanes[i];
    return sum;
}

// ------------------------------------------------------------------------------------------- the three input types
//
// `Words` are 64 bytes of x as signed lanes (a magnitude is never negative in them), LAST_FINITE the largest finite
// magnitude. Widening is exact, subnormals included.

struct BFloat16 {
    typedef uint16_t Word;
    typedef Shorts Words;
    static constexpr int16_t MAGNITUDE = 0x7FFF, LAST_FINITE = 0x7F7F;

    static Floats widen(const Word* x) {
        return bit_cast<Floats>(__builtin_convertvector(load<HalfRegister>(x), Ints) << 16);
    }
};

struct Half {
    typedef uint16_t Word;
    typedef Shorts Words;
    static constexpr int16_t MAGNITUDE = 0x7FFF, LAST_FINITE = 0x7BFF;

    static Floats widen(const Word* x) {
        const Ints bits = __builtin_convertvector(load<HalfRegister>(x), Ints);
        const Ints a = (bits & 0x7FFF) << 13;  // float16's fields at float32's place; the exponent is 112 too small
        const Ints normal = a + (112 << 23);
        const Ints special = a + (224 << 23);  // Inf and NaN: exponent 31 becomes 255
        const Floats place = bit_cast<Floats>(Ints{} + (113 << 23));
        const Ints subnormal = bit_cast<Ints>(bit_cast<Floats>(a + (113 << 23)) - place);  // exact
        const Ints magnitude =
            select(Ints(a < (1 << 23)), subnormal, select(Ints(a >= (31 << 23)), special, normal));
        return bit_cast<Floats>(magnitude | ((bits & 0x8000) << 16));
    }
};

struct Float32 {
    typedef uint32_t Word;
    typedef Ints Words;
    static constexpr int32_t MAGNITUDE = 0x7FFFFFFF, LAST_FINITE = 0x7F7FFFFF;

    static Floats widen(const Word* x) { return load<Floats>(x); }
};

template <class In> float to_float(typename In::Word bits) {
    typename In::Word lanes[LANES] = {bits};
    return In::widen(lanes)[0];
}

// ---------------------------------------------------------------------------------------------------- the passes
//
// Each takes a block whose `n` is a multiple of PAD.

// What a block or a whole tensor adds up to; sums of squares in scaled units.
struct Tally {
    float amax = 0;
    int64_t zeros = 0, nonfinite = 0, overflow = 0, flushed = 0, subnormal = 0;  // flushed: codes of value zero
    double sum_sq = 0, err_sq = 0;

    void add(const Tally& other) {
        amax = std::fmax(amax, other.amax);
        zeros += other.zeros;
        nonfinite += other.nonfinite;
        overflow += other.overflow;
        flushed += other.flushed;
        subnormal += other.subnormal;
        sum_sq += other.sum_sq;
        err_sq += other.err_sq;
    }
};

template <class In> typename In::Word largest_of(typename In::Words lanes) {
    typename In::Word largest = 0;
    for (unsigned i = 0; i < sizeof lanes / sizeof largest; ++i)
        if (typename In::Word(lanes[i]) > largest) largest = typename In::Word(lanes[i]);
    return largest;
}

// The largest finite magnitudes of x whose codes are zero, and zero or subnormal.
template <class In> struct Borders {
    typename In::Word flushed, subnormal;

    Borders(float scale, const Target& target) {
        const float smallest_normal = bit_cast<float>(target.smallest_normal);
        const float half_step = std::ldexp(smallest_normal, -target.mantissa_bits - 1);
        flushed = largest_within(half_step, scale);  // the tie between 0 and the smallest subnormal goes to 0
        subnormal = largest_within(std::nextafter(smallest_normal - half_step, 0.0f), scale);  // the other tie up
    }

    static typename In::Word largest_within(float limit, float scale) {
        int32_t low = 0, high = In::LAST_FINITE;
        while (low < high) {
            const int32_t middle = high - (high - low) / 2;
            if (to_float<In>(typename In::Word(middle)) * scale <= limit)
                low = middle;
            else
                high = middle - 1;
        }
        return typename In::Word(low);
    }
};

// amax and nonfinite; with ZEROS zeros too, with BORDERS also what lies within them.
template <class In, bool ZEROS, bool BORDERS = false>
void scan(const typename In::Word* x, int n, Tally& tally, const Borders<In>* borders = nullptr) {
    typedef typename In::Words Words;
    typedef typename std::make_signed<typename In::Word>::type Signed;
    constexpr int COUNT = sizeof(Words) / sizeof(typename In::Word);
    const Words last_flushed = Words{} + (BORDERS ? Signed(borders->flushed) : Signed(0));
    const Words last_subnormal = Words{} + (BORDERS ? Signed(borders->subnormal) : Signed(0));
    Words largest{}, zeros{}, flushed{}, below_normal{};
    for (int i = 0; i < n; i += COUNT) {
        const Words a = load<Words>(x + i) & In::MAGNITUDE;
        largest = a > largest ? a : largest;
        if (ZEROS) zeros -= Words(a == 0);
        if (BORDERS) {
            flushed -= Words(a <= last_flushed);
            below_normal -= Words(a <= last_subnormal);
        }
    }
    tally.zeros = total(zeros);
    tally.flushed = total(flushed);
    tally.subnormal = total(below_normal) - tally.flushed;
    if (largest_of<In>(largest) > In::LAST_FINITE) {
        Words nonfinite{};
        largest = Words{};
        for (int i = 0; i < n; i += COUNT) {
            const Words a = load<Words>(x + i) & In::MAGNITUDE;
            const Words finite = a <= In::LAST_FINITE;
            const Words finite_a = a & finite;
            largest = finite_a > largest ? finite_a : largest;
            nonfinite -= Words(~finite);
        }
        tally.nonfinite = total(nonfinite);
    }
    tally.amax = to_float<In>(largest_of<In>(largest));
}

void drop_signed_zeros(uint8_t* q, int n) {
    for (int i = 0; i < n; i += VECTOR_BYTES) {
        const Bytes code = load<Bytes>(q + i);
        const Bytes kept = code & Bytes(code != -128);
        std::memcpy(q + i, &kept, sizeof kept);
    }
}

// CAREFUL: the block may hold an Inf or NaN, which take no part in overflow and sums, or values that are clipped.
// Without KEEP `q` is left alone.
template <class In, bool STATS, bool CAREFUL, bool KEEP>
void encode(const typename In::Word* x, uint8_t* q, int n, float scale, const Target& target, Tally& tally) {
    const int shift = 23 - target.mantissa_bits;
    const int fields = target.smallest_normal >> shift;
    // Added to a magnitude, a power of two rounds it to a multiple of its own last place. `to_place` makes one from a
    // binade whose last place is the format's there; its low bits, an even number, make those of the sum, plus the
    // binade's number, the code modulo 256.
    const int to_place = (shift << 23) + (256 - fields % 256);
    const Ints smallest_normal = Ints{} + target.smallest_normal;
    const Ints max = Ints{} + target.max;
    const Ints signed_zero = Ints{} - int32_t(!target.fnuz);  // all bits where the format has a -0
    const Ints nan = Ints{} + (target.fnuz ? 0x80 : 0x7F);
    Ints overflow{};
    Floats sum_sq{}, err_sq{};
    for (int i = 0; i < n; i += LANES) {
        __builtin_prefetch(x + i + BLOCK);  // the next block comes while this pass computes
        if (KEEP) __builtin_prefetch(q + i + BLOCK, 1);
        const Floats wide = In::widen(x + i);
        const Floats y = wide * scale;
        const Ints bits = bit_cast<Ints>(y);
        const Ints a = bits & 0x7FFFFFFF;
        const Ints clamped = CAREFUL ? (a < max ? a : max) : a;
        const Ints exponent = clamped & 0x7F800000;
        const Ints binade = exponent > smallest_normal ? exponent : smallest_normal;
        const Floats place = bit_cast<Floats>(binade + to_place);
        const Floats placed = bit_cast<Floats>(clamped) + place;
        const Ints sign = (bits >> 24) & 0x80;
        Ints code = bit_cast<Ints>(placed) + (binade >> shift);
        Floats counted = y, error = bit_cast<Floats>(a) - (placed - place);
        if (CAREFUL) {
            const Ints wide_a = bit_cast<Ints>(wide) & 0x7FFFFFFF;
            const Ints finite = wide_a < 0x7F800000;
            overflow -= Ints(a > target.overflow_above) & finite;
            counted = bit_cast<Floats>(bit_cast<Ints>(counted) & finite);
            error = bit_cast<Floats>(bit_cast<Ints>(error) & finite);
            code &= 0x7F;
            code |= sign & (signed_zero | Ints(code != 0));
            code = select(Ints(wide_a > 0x7F800000), nan | (sign & signed_zero), code);
        } else {
            code |= sign;
        }
        if (KEEP) {
            const QuarterRegister packed = narrow(code);
            std::memcpy(q + i, &packed, sizeof packed);
        }
        if (STATS) {
            sum_sq += counted * counted;
            err_sq += error * error;
        }
    }
    if (KEEP && !CAREFUL && target.fnuz) drop_signed_zeros(q, n);
    if (STATS) {
        tally.overflow = total(overflow);
        for (int i = 0; i < LANES; ++i) {
            tally.sum_sq += sum_sq[i];
            tally.err_sq += err_sq[i];
        }
    }
}

void tally_codes(const uint8_t* q, int n, const Target& target, Tally& tally) {
    const int8_t zero_bits = target.fnuz ? -1 : 0x7F;  // the bits that are clear in a zero
    const int8_t first_normal = int8_t(1 << target.mantissa_bits);
    Bytes flushed{}, subnormal{};
    for (int i = 0; i < n; i += VECTOR_BYTES) {
        const Bytes code = load<Bytes>(q + i);
        const Bytes a = code & 0x7F;
        flushed -= Bytes((code & zero_bits) == 0);
        subnormal -= Bytes((a > 0) & (a < first_normal));
    }
    for (int i = 0; i < VECTOR_BYTES; ++i) {
        tally.flushed += uint8_t(flushed[i]);
        tally.subnormal += uint8_t(subnormal[i]);
    }
}

float decode(uint8_t code, const Target& target) {
    const int a = code & 0x7F, first_normal = 1 << target.mantissa_bits;
    const int exponent = a >> target.mantissa_bits, mantissa = a % first_normal;
    const float step = bit_cast<float>(target.smallest_normal) / float(first_normal);
    const float value =
        exponent == 0 ? float(mantissa) * step : std::ldexp(float(first_normal + mantissa) * step, exponent - 1);
    return code & 0x80 ? -value : value;
}

// The sums of `encode` again in float64, for blocks whose squares leave float32's range: a few times slower.
template <class In>
void sums_in_float64(const typename In::Word* x, const uint8_t* q, int n, float scale, const Target& target,
                     Tally& tally) {
    float value[256];
    for (int code = 0; code < 256; ++code) value[code] = decode(uint8_t(code), target);
    tally.sum_sq = tally.err_sq = 0;
    for (int i = 0; i < n; i += LANES) {
        const Floats wide = In::widen(x + i);
        for (int lane = 0; lane < LANES; ++lane) {
            if (!std::isfinite(wide[lane])) continue;
            const double y = double(wide[lane]) * double(scale), error = y - double(value[q[i + lane]]);
            tally.sum_sq += y * y;
            tally.err_sq += error * error;
        }
    }
}

// Within these limits a block's squares neither overflow a float32 nor lose what matters to its sum.
inline bool squares_fit(float y_max) { return y_max >= 0x1p-40f && y_max <= 0x1p50f; }

template <class In, bool STATS>
Tally cast_padded(const typename In::Word* x, uint8_t* q, int n, float scale, const Target& target) {
    Tally tally;
    scan<In, STATS>(x, n, tally);
    const float y_max = tally.amax * scale;
    if (tally.nonfinite || bit_cast<int32_t>(y_max) > target.overflow_above)
        encode<In, STATS, true, true>(x, q, n, scale, target, tally);
    else
        encode<In, STATS, false, true>(x, q, n, scale, target, tally);
    if (STATS) {
        tally_codes(q, n, target, tally);
        if (tally.amax > 0 && !squares_fit(y_max)) sums_in_float64<In>(x, q, n, scale, target, tally);
    }
    return tally;
}

// The tally of `cast_padded`, without its payload.
template <class In>
Tally count_padded(const typename In::Word* x, int n, float scale, const Target& target, const Borders<In>& borders) {
    Tally tally;
    scan<In, true, true>(x, n, tally, &borders);
    const float y_max = tally.amax * scale;
    if (tally.amax > 0 && !squares_fit(y_max)) {
        uint8_t q[BLOCK];
        return cast_padded<In, true>(x, q, n, scale, target);
    }
    if (tally.nonfinite || bit_cast<int32_t>(y_max) > target.overflow_above)
        encode<In, true, true, false>(x, nullptr, n, scale, target, tally);
    else
        encode<In, true, false, false>(x, nullptr, n, scale, target, tally);
    return tally;
}

// Calls body(x, n) on a block whose n is a multiple of PAD: this one, or a copy of it with zeros behind, of which the
// tally knows nothing.
template <class In, class Body> Tally on_padded(const typename In::Word* x, int n, const Body& body) {
    if (n % PAD == 0) return body(x, n);
    const int padded = (n + PAD - 1) / PAD * PAD;
    typename In::Word x_padded[BLOCK] = {};
    std::memcpy(x_padded, x, size_t(n) * sizeof *x);
    Tally tally = body(x_padded, padded);
    tally.zeros -= padded - n;
    tally.flushed -= padded - n;
    return tally;
}

template <class In, bool STATS>
Tally cast_block(const typename In::Word* x, uint8_t* q, int n, float scale, const Target& target) {
    return on_padded<In>(x, n, [&](const typename In::Word* block, int count) {
        if (count == n) return cast_padded<In, STATS>(block, q, n, scale, target);
        uint8_t q_padded[BLOCK];
        const Tally tally = cast_padded<In, STATS>(block, q_padded, count, scale, target);
        std::memcpy(q, q_padded, size_t(n));
        return tally;
    });
}

template <class In> Tally scan_block(const typename In::Word* x, int n) {
    return on_padded<In>(x, n, [](const typename In::Word* block, int count) {
        Tally tally;
        scan<In, false>(block, count, tally);
        return tally;
    });
}

// ------------------------------------------------------------------------------------------------------- threads

typedef Tally (*Work)(const void* body, int64_t first, int count);

Tally run_chunks(int64_t n, int threads, const void* body, Work work) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    int64_t chunk_blocks = (blocks + MAX_CHUNKS - 1) / MAX_CHUNKS;
    if (chunk_blocks < CHUNK_BLOCKS) chunk_blocks = CHUNK_BLOCKS;
    const int chunks = int((blocks + chunk_blocks - 1) / chunk_blocks);
    Tally partial[MAX_CHUNKS];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && chunks > 1)
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const DefaultFloatMode mode;
        const int64_t end = (chunk + 1) * chunk_blocks < blocks ? (chunk + 1) * chunk_blocks * BLOCK : n;
        for (int64_t first = chunk * chunk_blocks * BLOCK; first < end; first += BLOCK)
            partial[chunk].add(work(body, first, int(end - first < BLOCK ? end - first : BLOCK)));
    }
    Tally all;
    for (int chunk = 0; chunk < chunks; ++chunk) all.add(partial[chunk]);
    return all;
}

// Calls body(first, count) -> Tally for blocks of [0, n) and returns their total. Chunks and the order of the
// addition do not depend on the number of threads, so neither do the sums.
template <class Body> Tally over_blocks(int64_t n, int threads, const Body& body) {
    return run_chunks(n, threads, &body, [](const void* self, int64_t first, int count) {
        return (*static_cast<const Body*>(self))(first, count);
    });
}

template <class In, bool STATS>
Tally cast_all(const void* x, int64_t n, float scale, const Target& target, uint8_t* q, int threads) {
    const auto* words = static_cast<const typename In::Word*>(x);
    return over_blocks(n, threads, [&](int64_t first, int count) {
        return cast_block<In, STATS>(words + first, q + first, count, scale, target);
    });
}

// How AmaxScaling makes a scale of an amax: device_scaling.amax_scale, bit for bit.
struct AmaxRule {
    double max;  // the format's, lowered by the margin
    int clamp;

    float scale(float amax) const {
        if (!(amax > 0)) return 1.0f;
        const int64_t exp2 = (bit_cast<int64_t>(max) - bit_cast<int64_t>(double(amax))) >> 52;
        return std::ldexp(1.0f, int(exp2 < -clamp ? -clamp : exp2 > clamp ? clamp : exp2));
    }
};

// What `cast_all` tallies, without a payload. With `rule` it only looks for the amax as soon as a block has one for
// which `scale` is too large.
template <class In>
Tally count_all(const void* x, int64_t n, float scale, const Target& target, int threads,
                const AmaxRule* rule = nullptr) {
    const auto* words = static_cast<const typename In::Word*>(x);
    const Borders<In> borders(scale, target);
    std::atomic<bool> too_large{false};
    return over_blocks(n, threads, [&](int64_t first, int count) {
        if (too_large.load(std::memory_order_relaxed)) return scan_block<In>(words + first, count);
        const Tally tally = on_padded<In>(words + first, count, [&](const typename In::Word* block, int padded) {
            return count_padded<In>(block, padded, scale, target, borders);
        });
        if (rule && tally.amax > 0 && rule->scale(tally.amax) < scale) too_large.store(true, std::memory_order_relaxed);
        return tally;
    });
}

// With the scale that the rule gives, which is known only at the end: counted is with `scale` first, most often the
// right one, and with the right one again if it was not. So x is read once, mostly, and `scale` is the right one then.
template <class In>
Tally count_by_amax(const void* x, int64_t n, float& scale, const AmaxRule& rule, const Target& target, int threads) {
    const Tally tally = count_all<In>(x, n, scale, target, threads, &rule);
    const float right = rule.scale(tally.amax);
    if (right == scale) return tally;
    scale = right;
    return count_all<In>(x, n, scale, target, threads);
}

template <class In> float amax_of(const void* x, int64_t n, int threads) {
    const auto* words = static_cast<const typename In::Word*>(x);
    return over_blocks(n, threads, [&](int64_t first, int count) { return scan_block<In>(words + first, count); }).amax;
}

// Eight tables, so that equal neighbours do not wait for each other's increment.
template <class In> void count_exponents(const void* x, int64_t n, int64_t* counts, int threads) {
    const auto* words = static_cast<const typename In::Word*>(x);
    over_blocks(n, threads, [&](int64_t first, int count) {
        typename In::Word padded[BLOCK];
        const auto* block = words + first;
        if (count % PAD) {
            std::memset(padded, 0, sizeof padded);
            block = static_cast<const typename In::Word*>(std::memcpy(padded, block, size_t(count) * sizeof *block));
        }
        uint8_t exponent[BLOCK];
        for (int i = 0; i < count; i += LANES) {
            const QuarterRegister packed = narrow(bit_cast<Ints>(In::widen(block + i)) >> 23);
            std::memcpy(exponent + i, &packed, sizeof packed);
        }
        uint16_t table[8][256] = {};
        const int whole = count / 8 * 8;
        for (int i = 0; i < whole; i += 8)
            for (int lane = 0; lane < 8; ++lane) ++table[lane][exponent[i + lane]];
        for (int i = whole; i < count; ++i) ++table[0][exponent[i]];
        for (int lane = 1; lane < 8; ++lane)
            for (int bin = 0; bin < 256; ++bin) table[0][bin] = uint16_t(table[0][bin] + table[lane][bin]);
        for (int bin = 0; bin < 256; ++bin) {
            if (table[0][bin]) {
#pragma omp atomic
                counts[bin] += table[0][bin];
            }
        }
        return Tally();
    });
}

// ---------------------------------------------------------------------------------------------------- dequantise

template <class Out> void decode_all(const uint8_t* q, int64_t n, const Target& target, Out* out, int threads) {
    over_blocks(n, threads, [&](int64_t first, int count) {
        const int whole = count / LANES * LANES, rest = count - whole;
        decode_block(q + first, out + first, whole, target);
        if (rest) {
            uint8_t q_padded[LANES] = {};
            Out out_padded[LANES];
            std::memcpy(q_padded, q + first + whole, size_t(rest));
            decode_block(q_padded, out_padded, LANES, target);
            std::memcpy(out + first + whole, out_padded, size_t(rest) * sizeof *out);
        }
        return Tally();
    });
}

// --------------------------------------------------------------------------------------------------- arena rows

// A row of the arena: the words of fp8core.records.COLUMNS, in that order (cpu.py asserts it).
struct Row {
    int64_t writes;
    double amax, scale_min, scale_max;
    int64_t numel, zeros, overflow, underflow, subnormal, nonfinite;
    double sum_sq, err_sq;
};

// Two backward threads may write to one arena. They merge one after the other: 0.1 us under a lock, once a tensor.
void write_row(int64_t* words, const Tally& tally, float scale, int64_t numel, bool overwrite) {
    static std::mutex one_writer;
    const double inv_scale = 1.0 / double(scale);
    const Row fresh = {1, tally.amax, scale, scale, numel, tally.zeros, tally.overflow, tally.flushed - tally.zeros,
                       tally.subnormal, tally.nonfinite, tally.sum_sq * inv_scale * inv_scale,
                       tally.err_sq * inv_scale * inv_scale};
    const std::lock_guard<std::mutex> lock(one_writer);
    Row row;
    std::memcpy(&row, words, sizeof row);
    if (overwrite) {
        row = fresh;
    } else {
        row.writes += fresh.writes;
        row.amax = std::fmax(row.amax, fresh.amax);
        row.scale_min = std::fmin(row.scale_min, fresh.scale_min);
        row.scale_max = std::fmax(row.scale_max, fresh.scale_max);
        row.numel += fresh.numel;
        row.zeros += fresh.zeros;
        row.overflow += fresh.overflow;
        row.underflow += fresh.underflow;
        row.subnormal += fresh.subnormal;
        row.nonfinite += fresh.nonfinite;
        row.sum_sq += fresh.sum_sq;
        row.err_sq += fresh.err_sq;
    }
    std::memcpy(words, &row, sizeof row);
}

}  // namespace

// --------------------------------------------------------------------------------------- what cpu.py calls
//
// `type` is the index of x's dtype in cpu.py's INPUT_TYPES; tensors are contiguous. A row is number *slot of the `slots`
// that begin at `words`. Functions with an outcome other than DONE have done nothing then.

namespace {

enum Outcome { DONE, NO_SCALE, NO_SLOT };  // not a finite scale, or a negative one; not a row of the arena

// Calls body(In()) with x's type.
template <class Body> auto for_type(int type, const Body& body) {
    return type == 0 ? body(BFloat16()) : type == 1 ? body(Half()) : body(Float32());
}

bool is_scale(float scale) { return scale >= 0 && scale <= FLT_MAX; }
bool is_slot(int64_t slot, int64_t slots) { return slot >= 0 && slot < slots; }
int64_t* row_of(int64_t* words, int64_t slot) { return words + slot * int64_t(sizeof(Row) / sizeof(int64_t)); }

}  // namespace

extern "C" {

void fp8_amax(const void* x, int64_t n, int type, float* amax, int threads) {
    const DefaultFloatMode mode;
    *amax = for_type(type, [&](auto in) { return amax_of<decltype(in)>(x, n, threads); });
}

// `words` is null where no statistics are wanted.
int fp8_cast(const void* x, int64_t n, int type, const float* scale, const Target* target, uint8_t* q, float* amax,
             int64_t* words, int64_t slots, const int64_t* slot, int overwrite, int threads) {
    const DefaultFloatMode mode;
    const float factor = *scale;
    if (!is_scale(factor)) return NO_SCALE;
    if (words && !is_slot(*slot, slots)) return NO_SLOT;
    const Tally tally = for_type(type, [&](auto in) {
        return words ? cast_all<decltype(in), true>(x, n, factor, *target, q, threads)
                     : cast_all<decltype(in), false>(x, n, factor, *target, q, threads);
    });
    *amax = tally.amax;
    if (words) write_row(row_of(words, *slot), tally, factor, n, overwrite != 0);
    return DONE;
}

int fp8_count(const void* x, int64_t n, int type, const float* scale, const Target* target, float* amax,
              int64_t* words, int64_t slots, const int64_t* slot, int overwrite, int threads) {
    const DefaultFloatMode mode;
    const float factor = *scale;
    if (!is_scale(factor)) return NO_SCALE;
    if (!is_slot(*slot, slots)) return NO_SLOT;
    const Tally tally =
        for_type(type, [&](auto in) { return count_all<decltype(in)>(x, n, factor, *target, threads); });
    *amax = tally.amax;
    write_row(row_of(words, *slot), tally, factor, n, overwrite != 0);
    return DONE;
}

// `last_scales[*slot]`, the bits of a float32: the scale that the slot had last time, and then the one of this time.
int fp8_count_by_amax(const void* x, int64_t n, int type, double max, int clamp, const Target* target,
                      int32_t* last_scales, int64_t* words, int64_t slots, const int64_t* slot, int overwrite,
                      int threads) {
    const DefaultFloatMode mode;
    if (!is_slot(*slot, slots)) return NO_SLOT;
    const AmaxRule rule = {max, clamp};
    int32_t* last_scale = last_scales + *slot;  // of two backwards at once, perhaps
    float scale = bit_cast<float>(__atomic_load_n(last_scale, __ATOMIC_RELAXED));
    const Tally tally =
        for_type(type, [&](auto in) { return count_by_amax<decltype(in)>(x, n, scale, rule, *target, threads); });
    __atomic_store_n(last_scale, bit_cast<int32_t>(scale), __ATOMIC_RELAXED);
    write_row(row_of(words, *slot), tally, scale, n, overwrite != 0);
    return DONE;
}

// To float32, or to bf16 where `narrow` is set.
void fp8_dequantize(const uint8_t* q, int64_t n, const Target* target, void* out, int narrow, int threads) {
    if (narrow)
        decode_all(q, n, *target, static_cast<uint16_t*>(out), threads);
    else
        decode_all(q, n, *target, static_cast<uint32_t*>(out), threads);
}

// Adds to counts[256].
void fp8_exponents(const void* x, int64_t n, int type, int64_t* counts, int threads) {
    for_type(type, [&](auto in) { count_exponents<decltype(in)>(x, n, counts, threads); });
}
}
