// The product of two FP8 matrices on a CPU, unscaled: y = a @ b / (scale_a * scale_b) in float32 or bf16, rounded once.
//
// FP8 values are bf16 numbers and their products float32 ones: all that can be lost is the order of a float32 sum. So it
// is computed with the fastest of
//
//   FLOATS  float32 vectors, everywhere
//   PAIRS   pairs of bf16 in vectors (AVX512_BF16)
//   TILES   pairs of bf16 in tile registers (AMX)
//
// Each operand is decoded once, into panels that lie as the innermost loop reads them. They are made of units of 32
// bits, a float32 or two bf16 that follow each other along K; a unit is one step of the sum.
//
//   a  [piece of K][panel of ROWS][row][unit]       decoded from rows of codes along K
//   b  [panel of COLUMNS][piece of K][unit][column] decoded from rows of codes along N
//
// An operand whose codes lie the other way is transposed first, 16 x 16 bytes at a time in registers. Sums that go over
// several pieces of K, and those of tiles, wait in scratch that stays in the cache; they are unscaled, rounded and written
// once. What is beyond K is zero. Rows and columns are multiplied without panels, as codes are decoded.

#include "cpu_gemm.h"

#include <algorithm>
#include <cfloat>
#include <cstdlib>
#include <new>
#include <optional>
#include <type_traits>

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)
#define HAS_PAIRS
#endif
#if defined(__AVX512VBMI__) && defined(__AMX_BF16__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

typedef uint32_t Unit;
constexpr int LINE = 64 / sizeof(Unit);  // of the cache

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
constexpr int COLUMNS = 2 * LANES;
constexpr int DEPTH = 384;                     // units in a piece: a piece of b's panel is about as large as the L1 cache
constexpr int BLOCK_M = 192;                   // of the result; with its panels it fits into the L2 cache
constexpr int SHALLOW = 32;                    // units of K, up to which writing the result is most of the work
constexpr int CODES = 64;                      // are decoded at once
constexpr int STAGE_ROWS = 48, STAGE_COLUMNS = 128;
constexpr int64_t WORK_FOR_TILES = 1 << 14;    // multiplications; below, vectors are faster
constexpr int64_t DEPTH_FOR_TILES = 8;         // likewise, along K
constexpr int64_t WORK_FOR_THREADS = 1 << 21;  // below, one thread is faster than waking the others

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// --------------------------------------------------------------------------------------------- codes in the right order

typedef uint8_t Codes16 __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, Codes16{__VA_ARGS__})
#endif

// Four times, row i and row i + 8 become rows 2 i and 2 i + 1, their codes in turns.
void transpose_16x16(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
    Codes16 row[16], next[16];
    for (int i = 0; i < 16; ++i) row[i] = load<Codes16>(from + i * from_stride);
#pragma GCC unroll 4
    for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const Codes16 a = row[i], b = row[i + 8];
            next[2 * i] = PICK(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2 * i + 1] = PICK(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) row[i] = next[i];
    }
    for (int i = 0; i < 16; ++i) std::memcpy(to + i * to_stride, &row[i], 16);
}

// Rows of codes that follow each other: the matrix's own, or a copy.
struct Rows {
    const uint8_t* codes;
    int64_t stride;
};

struct Stage {
    alignas(64) uint8_t codes[STAGE_ROWS][STAGE_COLUMNS];
};

Rows rows_of(const Matrix& x, int64_t row, int rows, int64_t column, int columns, Stage& stage) {
    const uint8_t* first = x.codes + row * x.row_stride + column * x.column_stride;
    if (x.column_stride == 1) return {first, x.row_stride};
    for (int i = 0; i < rows; i += 16) {
        for (int j = 0; j < columns; j += 16) {
            const uint8_t* corner = first + i * x.row_stride + j * x.column_stride;
            const int height = std::min(16, rows - i), width = std::min(16, columns - j);
            if (x.row_stride == 1 && height == 16 && width == 16) {
                transpose_16x16(corner, x.column_stride, &stage.codes[i][j], STAGE_COLUMNS);
                continue;
            }
            for (int right = 0; right < width; ++right)
                for (int down = 0; down < height; ++down)
                    stage.codes[i + down][j + right] = corner[down * x.row_stride + right * x.column_stride];
        }
    }
    return {stage.codes[0], STAGE_COLUMNS};
}

// ------------------------------------------------------------------------------------------------- from codes to units

#if defined(__AVX512VBMI__)
// By tables in registers, of the bytes of the bf16 of all 128 magnitudes.
class Decoder {
public:
    explicit Decoder(const Target& format) : fnuz(format.fnuz) {
        uint8_t codes[128], bytes[2][128];
        uint16_t magnitudes[128];
        for (int code = 0; code < 128; ++code) codes[code] = uint8_t(code);
        decode_block(codes, magnitudes, 128, format);
        for (int code = 0; code < 128; ++code) {
            bytes[0][code] = uint8_t(magnitudes[code]);
            bytes[1][code] = uint8_t(magnitudes[code] >> 8);
        }
        for (int half = 0; half < 2; ++half)
            for (int part = 0; part < 2; ++part) table[half][part] = _mm512_loadu_si512(bytes[half] + 64 * part);
        for (int i = 0; i < 64; ++i) codes[i % 16 / 4 * 16 + i / 32 * 8 + i % 4 * 2 + i / 16 % 2] = uint8_t(i);
        floats_order = _mm512_loadu_si512(codes);
    }

    // 32 bf16 of the codes whose place is even by eights, and 32 of the others
    struct Halves {
        __m512i first, second;
    };
    Halves operator()(__m512i codes) const {
        __m512i low = _mm512_permutex2var_epi8(table[0][0], codes, table[0][1]);
        __m512i high = _mm512_permutex2var_epi8(table[1][0], codes, table[1][1]);
        high = _mm512_or_si512(high, _mm512_and_si512(codes, _mm512_set1_epi8(-128)));
        if (fnuz) {
            const __mmask64 is_nan = _mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(-128));
            low = _mm512_mask_mov_epi8(low, is_nan, _mm512_set1_epi8(int8_t(0xC0)));
            high = _mm512_mask_mov_epi8(high, is_nan, _mm512_set1_epi8(0x7F));
        }
        return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
    }

    // bf16 of 64 codes, in their order
    void to_pairs(__m512i codes, Unit* out) const {
        const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
        const Halves halves = (*this)(_mm512_permutexvar_epi64(order, codes));
        _mm512_storeu_si512(out, halves.first);
        _mm512_storeu_si512(out + 16, halves.second);
    }

    // Float32 of 64 codes, in their order
    void to_floats(__m512i codes, Unit* out) const {
        const Halves halves = (*this)(_mm512_permutexvar_epi8(floats_order, codes));
        const __m512i high = _mm512_set1_epi32(int(0xFFFF0000));
        _mm512_storeu_si512(out, _mm512_slli_epi32(halves.first, 16));
        _mm512_storeu_si512(out + 16, _mm512_and_si512(halves.first, high));
        _mm512_storeu_si512(out + 32, _mm512_slli_epi32(halves.second, 16));
        _mm512_storeu_si512(out + 48, _mm512_and_si512(halves.second, high));
    }

    void to_floats(const uint8_t* codes, int n, Unit* out) const { to_floats(load_codes(codes, n), out); }

    // The first n of 64 codes, and zeros
    static __m512i load_codes(const uint8_t* codes, int n) {
        return n >= 64 ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8((__mmask64(1) << n) - 1, codes);
    }
    static __m256i load_32_codes(const uint8_t* codes, int n) {
        return _mm256_maskz_loadu_epi8(n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1, codes);
    }

private:
    __m512i table[2][2];
    __m512i floats_order;  // so that pairs are of codes that are 16 apart
    bool fnuz;
};
#else
class Decoder {
public:
    explicit Decoder(const Target& target) : format(target) {}

    // Float32 of the first n of COUNT codes, and zeros
    template <int COUNT = CODES> void to_floats(const uint8_t* codes, int n, Unit* out) const {
        uint8_t padded[COUNT] = {};
        if (n < COUNT) codes = static_cast<const uint8_t*>(std::memcpy(padded, codes, size_t(n)));
        decode_block(codes, out, COUNT, format);
    }

private:
    const Target& format;
};
#endif

struct Floats32 {
    static constexpr int STEPS = 1;   // of K in a unit
    static constexpr int PADDED = 2;  // units of K that there are a multiple of

    // n codes of a row of a, with zeros up to a multiple of CODES
    static void along(const Decoder& decode, const uint8_t* codes, int n, Unit* out) {
        for (int i = 0; i < n; i += CODES) decode.to_floats(codes + i, n - i, out + i);
    }

    // Two rows of b (or one and zeros), n codes each, with zeros up to COLUMNS
    static void across(const Decoder& decode, Rows rows, int height, int n, Unit* out) {
        const int second = height > 1 ? n : 0;
#if defined(__AVX512VBMI__)
        const __m256i odd = Decoder::load_32_codes(rows.codes + (second ? rows.stride : 0), second);
        const __m256i even = Decoder::load_32_codes(rows.codes, n);
        decode.to_floats(_mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1), out);
#else
        decode.to_floats<COLUMNS>(rows.codes, n, out);
        decode.to_floats<COLUMNS>(rows.codes + (second ? rows.stride : 0), second, out + COLUMNS);
#endif
    }

    static Floats add_product(Unit a, Floats b, Floats sum) {
#if defined(__AVX512F__)
        return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(int(a))), b, sum);
#elif defined(__AVX2__) && defined(__FMA__)
        return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_set1_epi32(int(a))), b, sum);
#else
        return b * bit_cast<float>(a) + sum;  // the same bits: the product is exact
#endif
    }
};

#if defined(HAS_PAIRS) || defined(HAS_TILES)
struct BFloat16Pairs {
    static constexpr int STEPS = 2, PADDED = 1;

    static void along(const Decoder& decode, const uint8_t* codes, int n, Unit* out) {
        for (int i = 0; i < n; i += CODES) decode.to_pairs(Decoder::load_codes(codes + i, n - i), out + i / STEPS);
    }

    static void across(const Decoder& decode, Rows rows, int height, int n, Unit* out) {
        const int second = height > 1 ? n : 0;
        const __m512i even = _mm512_cvtepu8_epi16(Decoder::load_32_codes(rows.codes, n));
        const __m512i odd =
            _mm512_cvtepu8_epi16(Decoder::load_32_codes(rows.codes + (second ? rows.stride : 0), second));
        decode.to_pairs(_mm512_or_si512(even, _mm512_slli_epi16(odd, 8)), out);
    }

#if defined(HAS_PAIRS)
    static Floats add_product(Unit a, Floats b, Floats sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
    }
#endif
};
#endif

// ------------------------------------------------------------------------------------------------------------ unscale

// To bf16, ties to even; all NaN become one, as in torch.
inline Ints rounded_to_bf16(Floats y) {
    const Ints bits = bit_cast<Ints>(y);
    const Ints rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    return select(Ints((bits & 0x7FFFFFFF) > 0x7F800000), Ints{} + 0x7FC00000, rounded);
}

struct ToFloat32 {
    typedef float Out;
    static void store(Out* out, Floats y) { std::memcpy(out, &y, sizeof y); }
};

struct ToBFloat16 {
    typedef uint16_t Out;
    static void store(Out* out, Floats y) { ::store(out, rounded_to_bf16(y)); }
};

#if defined(__AVX512BF16__)
// By the instruction for it, which takes subnormals for zeros: where there are none.
struct ToBFloat16Fast {
    typedef uint16_t Out;
    static void store(Out* out, Floats y) {
        const __m256bh rounded = _mm512_cvtneps_pbh(y);
        std::memcpy(out, &rounded, sizeof rounded);
    }
};
#endif

// Reads whole registers of `sum`.
template <class To> void unscale(const float* sum, int64_t n, float inv_scale, typename To::Out* out) {
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) To::store(out + i, load<Floats>(sum + i) * inv_scale);
    if (whole == n) return;
    typename To::Out last[LANES];
    To::store(last, load<Floats>(sum + whole) * inv_scale);
    std::memcpy(out + whole, last, size_t(n - whole) * sizeof *out);
}

// Where sums go: to float32, from where the next piece of K goes on ...
struct Sums {
    float* first;
    int64_t stride;

    float* at(int64_t row, int64_t column) const { return first + row * stride + column; }
    void put(int64_t row, int64_t column, Floats sum) const { std::memcpy(at(row, column), &sum, sizeof sum); }
};

// ... or unscaled into the result.
template <class To> struct Result {
    typename To::Out* first;
    int64_t stride;
    float inv_scale;

    typename To::Out* at(int64_t row, int64_t column) const { return first + row * stride + column; }
    void put(int64_t row, int64_t column, Floats sum) const { To::store(at(row, column), sum * inv_scale); }
};

// ------------------------------------------------------------------------------------------------- the innermost loop
//
// after[rows][columns] = before[rows][columns] + a[rows][depth] @ b[depth][COLUMNS], in units; `before` is zero where it
// has no address. Up to ROWS and COLUMNS of sums are written: there is room.

template <class Kind> struct Vectors : Kind {
    static constexpr int ROWS = REGISTERS == 32 ? 12 : 6;  // whose sums stay in registers
    static constexpr int BLOCK_N = 512;
    static constexpr bool FINISHES = true;
    struct Mode {};

    template <int R, int V, class To>
    static void sum_in_registers(const Unit* a, int64_t a_stride, const Unit* b, int64_t depth, Sums before,
                                 const To& after) {
        Floats total[R][V];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
                total[r][v] = before.first ? load<Floats>(before.at(r, v * LANES)) : Floats{};
        for (int64_t k = 0; k < depth; ++k) {
            Floats b_row[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) b_row[v] = load<Floats>(b + k * COLUMNS + v * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) total[r][v] = Kind::add_product(a[r * a_stride + k], b_row[v], total[r][v]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) after.put(r, v * LANES, total[r][v]);
    }

    static int height(int rows) { return rows > 8 ? ROWS : rows > 4 ? std::min(ROWS, 8) : rows > 2 ? 4 : rows; }

    template <int V, class To> static auto sum_of(int rows) {
        return rows > 8   ? sum_in_registers<ROWS, V, To>
               : rows > 4 ? sum_in_registers<(ROWS < 8 ? ROWS : 8), V, To>
               : rows > 2 ? sum_in_registers<4, V, To>
               : rows > 1 ? sum_in_registers<2, V, To>
                          : sum_in_registers<1, V, To>;
    }

    static void multiply(const Unit* a, int64_t a_stride, const Unit* b, int64_t depth, Sums before, Sums after, int rows,
                         int columns) {
        const auto sum = columns > LANES ? sum_of<2, Sums>(rows) : sum_of<1, Sums>(rows);
        sum(a, a_stride, b, depth, before, after);
    }

    // The last piece of K: from the registers into the result, if that has all that is in them.
    template <class To>
    static void finish(const Unit* a, int64_t a_stride, const Unit* b, int64_t depth, Sums before,
                       const Result<To>& after, int rows, int columns) {
        if (rows == height(rows) && columns == COLUMNS)
            return sum_of<2, Result<To>>(rows)(a, a_stride, b, depth, before, after);
        float sum[ROWS * COLUMNS];
        multiply(a, a_stride, b, depth, before, Sums{sum, COLUMNS}, rows, columns);
        for (int row = 0; row < rows; ++row)
            unscale<To>(sum + row * COLUMNS, columns, after.inv_scale, after.at(row, 0));
    }
};

#if defined(HAS_TILES)
struct Tiles : BFloat16Pairs {
    static constexpr int SIDE = 16;  // of a tile: rows, and units in a row
    static constexpr int ROWS = 2 * SIDE;
    static constexpr int PADDED = SIDE;
    static constexpr int BLOCK_N = 256;
    static constexpr bool FINISHES = false;
    static_assert(COLUMNS == 2 * SIDE, "two tiles side by side");

    struct Mode {  // the tile registers are whole tiles while this lives
        Mode() {
            struct alignas(64) {
                uint8_t palette = 1, start_row = 0, reserved[14] = {};
                uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
            } shape;
            _tile_loadconfig(&shape);
        }
        ~Mode() { _tile_release(); }
    };

    // Tiles 0 to 3 are the sums, 4 and 5 those of a, 6 and 7 those of b.
    template <bool TALL, bool WIDE>
    static void sum_in_tiles(const Unit* a, int64_t a_stride, const Unit* b, int64_t depth, Sums before, Sums after) {
        const int64_t a_bytes = a_stride * 4, before_bytes = before.stride * 4, after_bytes = after.stride * 4;
        const Unit* const a_below = a + SIDE * a_stride;
        if (before.first) {
            _tile_loadd(0, before.first, before_bytes);
            if (WIDE) _tile_loadd(1, before.at(0, SIDE), before_bytes);
            if (TALL) _tile_loadd(2, before.at(SIDE, 0), before_bytes);
            if (TALL && WIDE) _tile_loadd(3, before.at(SIDE, SIDE), before_bytes);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t k = 0; k < depth; k += SIDE) {
            _tile_loadd(4, a + k, a_bytes);
            _tile_loadd(6, b + k * COLUMNS, COLUMNS * 4);
            _tile_dpbf16ps(0, 4, 6);
            if (WIDE) {
                _tile_loadd(7, b + k * COLUMNS + SIDE, COLUMNS * 4);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (TALL) {
                _tile_loadd(5, a_below + k, a_bytes);
                _tile_dpbf16ps(2, 5, 6);
                if (WIDE) _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, after.first, after_bytes);
        if (WIDE) _tile_stored(1, after.at(0, SIDE), after_bytes);
        if (TALL) _tile_stored(2, after.at(SIDE, 0), after_bytes);
        if (TALL && WIDE) _tile_stored(3, after.at(SIDE, SIDE), after_bytes);
    }

    static void multiply(const Unit* a, int64_t a_stride, const Unit* b, int64_t depth, Sums before, Sums after, int rows,
                         int columns) {
        const bool tall = rows > SIDE, wide = columns > SIDE;
        const auto sum_of = tall && wide ? sum_in_tiles<true, true>
                            : tall       ? sum_in_tiles<true, false>
                            : wide       ? sum_in_tiles<false, true>
                                         : sum_in_tiles<false, false>;
        sum_of(a, a_stride, b, depth, before, after);
    }
};
#endif

// --------------------------------------------------------------------------------------------------------------- GEMM

// Memory with any content: small amounts a thread has of its own, which spares a small product the allocations.
class Scratch {
public:
    explicit Scratch(int64_t bytes) {
        if (bytes <= int64_t(sizeof own) && !own_is_taken) {
            memory = own;
            own_is_taken = true;
        } else {
            memory = static_cast<uint8_t*>(std::aligned_alloc(64, size_t(padded(bytes))));
            if (!memory) throw std::bad_alloc();
        }
    }
    ~Scratch() {
        if (memory == own)
            own_is_taken = false;
        else
            std::free(memory);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    static int64_t padded(int64_t bytes) { return parts(bytes, 64) * 64; }

    template <class T> T* take(int64_t count) {
        T* taken = reinterpret_cast<T*>(memory + used);
        used += padded(count * int64_t(sizeof(T)));
        return taken;
    }

private:
    alignas(64) static thread_local uint8_t own[128 << 10];
    static thread_local bool own_is_taken;
    uint8_t* memory;
    int64_t used = 0;
};
alignas(64) thread_local uint8_t Scratch::own[128 << 10];
thread_local bool Scratch::own_is_taken = false;

// Calls body(first, end) for parts of [0, count).
template <class Body> void in_parallel(int64_t count, int threads, const Body& body) {
    if (threads <= 1 || count <= 1) return body(0, count);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) body(i, i + 1);
}

// The operands of one product in units, by panels and pieces of K.
template <class Kernel> class Packing {
public:
    static constexpr int ROWS = Kernel::ROWS, STEPS = Kernel::STEPS;
    static constexpr int GROUP = STAGE_ROWS / ROWS * ROWS;  // rows that are decoded together: whole squares to transpose

    const int64_t K, units = parts(K, STEPS), depth = parts(units, Kernel::PADDED) * Kernel::PADDED;
    const int64_t row_units = parts(K, CODES) * CODES / STEPS;  // of a row of a as `along` writes it
    const int64_t stride = std::min<int64_t>(row_units, DEPTH), pieces = parts(row_units, DEPTH);

    Packing(const Matrix& a_codes, const Matrix& b_codes)
        : K(a_codes.columns), a(a_codes), b(b_codes), decode_a(*a.format), decode_b(*b.format) {}

    int64_t depth_of(int64_t piece) const { return std::min<int64_t>(DEPTH, depth - piece * DEPTH); }

    // Rows m0 to m1 of a piece of a, [panel][row][unit].
    void pack_a(int64_t m0, int64_t m1, int64_t piece, Unit* to) const {
        const int64_t first = piece * DEPTH * STEPS, end = std::min(K, first + DEPTH * STEPS);
        for (int64_t m = m0; m < m1; m += GROUP) {
            const int rows = int(std::min<int64_t>(GROUP, m1 - m));
            for (int64_t k = first; k < end; k += STAGE_COLUMNS) {
                const int n = int(std::min<int64_t>(STAGE_COLUMNS, end - k));
                Stage stage;
                const Rows from = rows_of(a, m, rows, k, n, stage);
                Unit* out = to + (m - m0) * stride + (k - first) / STEPS;
                for (int r = 0; r < rows; ++r) Kernel::along(decode_a, from.codes + r * from.stride, n, out + r * stride);
            }
        }
    }

    // COLUMNS columns from n on of a piece of b, [unit][column].
    void pack_b(int64_t n, int64_t piece, Unit* to) const {
        const int columns = int(std::min<int64_t>(COLUMNS, b.columns - n));
        const int64_t first = piece * DEPTH * STEPS, end = std::min(K, first + DEPTH * STEPS);
        for (int64_t k = first; k < end; k += STAGE_ROWS) {
            const int height = int(std::min<int64_t>(STAGE_ROWS, end - k));
            Stage stage;
            Rows from = rows_of(b, k, height, n, columns, stage);
            for (int i = 0; i < height; i += 2, to += 2 / STEPS * COLUMNS, from.codes += 2 * from.stride)
                Kernel::across(decode_b, from, height - i, columns, to);
        }
        const int64_t written = parts(K, 2) * 2 / STEPS;
        if (end == K) std::memset(to, 0, size_t((depth - written) * COLUMNS) * sizeof(Unit));
    }

private:
    const Matrix &a, &b;
    const Decoder decode_a, decode_b;
};

template <class Kernel, class To>
void multiply(const Matrix& a, const Matrix& b, float inv_scale, typename To::Out* out, int threads) {
    constexpr int ROWS = Kernel::ROWS;
    const Packing<Kernel> packing(a, b);
    const int64_t M = a.rows, N = b.columns, stride = packing.stride, depth = packing.depth, pieces = packing.pieces;
    const int64_t row_panels = parts(M, ROWS), column_panels = parts(N, COLUMNS);
    const bool shallow = depth <= SHALLOW && row_panels > 2;
    const int64_t block_m = shallow ? ROWS : std::min<int64_t>(BLOCK_M, parts(parts(M, threads), ROWS) * ROWS);
    const int64_t block_n = std::min<int64_t>(Kernel::BLOCK_N, column_panels * COLUMNS);
    const int64_t blocks_m = parts(M, block_m), blocks_n = parts(N, block_n);

    // What several blocks read is decoded once for all; what only one reads, by that one, and stays in the cache. So does
    // a where vectors multiply: decoding it again for each of their few wide blocks is faster than reading it from memory.
    const bool a_is_shared = blocks_n > 1 && (shallow || !Kernel::FINISHES), b_is_shared = blocks_m > 1;
    const int64_t padded_m = row_panels * ROWS;
    const int64_t a_count = (a_is_shared ? padded_m * pieces : block_m) * stride;
    const int64_t b_count = (b_is_shared ? column_panels * depth : std::min<int64_t>(depth, DEPTH)) * COLUMNS;
    const auto bytes = [](int64_t count) { return Scratch::padded(count * 4); };
    std::optional<Scratch> shared;
    Unit *shared_a = nullptr, *shared_b = nullptr;
    if (a_is_shared || b_is_shared) {
        shared.emplace((a_is_shared ? bytes(a_count) : 0) + (b_is_shared ? bytes(b_count) : 0));
        if (a_is_shared) shared_a = shared->take<Unit>(a_count);
        if (b_is_shared) shared_b = shared->take<Unit>(b_count);
        constexpr int GROUP = Packing<Kernel>::GROUP;
        const int64_t a_parts = a_is_shared ? parts(M, GROUP) * pieces : 0;
        const int64_t b_parts = b_is_shared ? column_panels * pieces : 0;
        in_parallel(a_parts + b_parts, threads, [&](int64_t first, int64_t end) {
            for (int64_t part = first; part < end; ++part) {
                if (part < a_parts) {
                    const int64_t m = part / pieces * GROUP, piece = part % pieces;
                    packing.pack_a(m, std::min(M, m + GROUP), piece, shared_a + (piece * padded_m + m) * stride);
                } else {
                    const int64_t panel = (part - a_parts) / pieces, piece = (part - a_parts) % pieces;
                    packing.pack_b(panel * COLUMNS, piece, shared_b + (panel * depth + piece * DEPTH) * COLUMNS);
                }
            }
        });
    }

    in_parallel(blocks_m * blocks_n, threads, [&](int64_t first, int64_t end) {
        const DefaultFloatMode float_mode;
        [[maybe_unused]] const typename Kernel::Mode mode;
        const int64_t sum_count = pieces > 1 || !Kernel::FINISHES ? block_m * block_n : 0;
        Scratch own((a_is_shared ? 0 : bytes(a_count)) + (b_is_shared ? 0 : bytes(b_count)) + bytes(sum_count));
        Unit* const own_a = a_is_shared ? nullptr : own.take<Unit>(a_count);
        Unit* const own_b = b_is_shared ? nullptr : own.take<Unit>(b_count);
        float* const sums = own.take<float>(sum_count);
        for (int64_t block = first; block < end; ++block) {
            // A shallow product goes along the rows of the result, which memory takes fastest; others stay with b.
            const int64_t m0 = (shallow ? block / blocks_n : block % blocks_m) * block_m, m1 = std::min(M, m0 + block_m);
            const int64_t n0 = (shallow ? block % blocks_n : block / blocks_m) * block_n, n1 = std::min(N, n0 + block_n);
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const int64_t piece_depth = packing.depth_of(piece);
                const Unit* const a_piece = a_is_shared ? shared_a + (piece * padded_m + m0) * stride : own_a;
                if (!a_is_shared) packing.pack_a(m0, m1, piece, own_a);
                for (int64_t n = n0; n < n1; n += COLUMNS) {
                    const Unit* const b_piece =
                        b_is_shared ? shared_b + (n / COLUMNS * depth + piece * DEPTH) * COLUMNS : own_b;
                    if (!b_is_shared) packing.pack_b(n, piece, own_b);
                    const int columns = int(std::min<int64_t>(COLUMNS, n1 - n));
                    const bool has_next = b_is_shared && !shallow && n + COLUMNS < n1;
                    const int64_t share = has_next ? piece_depth * COLUMNS / parts(m1 - m0, ROWS) : 0;
                    const Unit* soon = b_piece + depth * COLUMNS;  // the next panel, fetched while this one is used
                    for (int64_t m = m0; m < m1; m += ROWS) {
                        for (const Unit* const end = soon + share; soon < end; soon += LINE)
                            __builtin_prefetch(soon, 0, 2);
                        const Unit* const a_panel = a_piece + (m - m0) * stride;
                        const Sums so_far{sums + (m - m0) * block_n + n - n0, block_n};
                        const Sums before = piece > 0 ? so_far : Sums{};
                        const int rows = int(std::min<int64_t>(ROWS, m1 - m));
                        if constexpr (Kernel::FINISHES) {
                            if (piece == pieces - 1) {
                                const Result<To> result{out + m * N + n, N, inv_scale};
                                Kernel::finish(a_panel, stride, b_piece, piece_depth, before, result, rows, columns);
                                continue;
                            }
                        }
                        Kernel::multiply(a_panel, stride, b_piece, piece_depth, before, so_far, rows, columns);
                    }
                }
            }
            if (Kernel::FINISHES) continue;
            for (int64_t m = m0; m < m1; ++m)
                unscale<To>(sums + (m - m0) * block_n, n1 - n0, inv_scale, out + m * N + n0);
        }
    });
}

// Float32 of n codes that are `stride` apart, and zeros up to a multiple of CODES.
void decode_vector(const uint8_t* codes, int64_t stride, int64_t n, const Target& format, Unit* out) {
    const Decoder decode(format);
    for (int64_t i = 0; i < n; i += CODES) {
        uint8_t block[CODES] = {};
        for (int64_t j = 0; j < std::min<int64_t>(CODES, n - i); ++j) block[j] = codes[(i + j) * stride];
        decode.to_floats(block, CODES, out + i);
    }
}

// out[a.rows] = a @ b, b a column. The codes of a lie along K: they are read once and multiplied as they are decoded.
template <class To>
void multiply_by_column(const Matrix& a, const Matrix& b, float inv_scale, typename To::Out* out, int threads) {
    const int64_t M = a.rows, K = a.columns, padded = parts(K, CODES) * CODES;
    const Decoder decode_a(*a.format);
    Scratch scratch(padded * int64_t(sizeof(Unit)));
    Unit* const b_units = scratch.take<Unit>(padded);
    decode_vector(b.codes, b.row_stride, K, *b.format, b_units);

    constexpr int ROWS = 64, PARTS = CODES / LANES;
    in_parallel(parts(M, ROWS), threads, [&](int64_t first, int64_t end) {
        const DefaultFloatMode float_mode;
        for (int64_t m = first * ROWS; m < std::min(M, end * ROWS); m += ROWS) {
            const int rows = int(std::min<int64_t>(ROWS, M - m));
            float sum[ROWS];
            for (int row = 0; row < rows; ++row) {
                const uint8_t* const codes = a.codes + (m + row) * a.row_stride;
                Floats total[PARTS] = {};
                for (int64_t k = 0; k < K; k += CODES) {
                    Unit units[CODES];
                    Floats32::along(decode_a, codes + k, int(std::min<int64_t>(CODES, K - k)), units);
#pragma GCC unroll 16
                    for (int i = 0; i < PARTS; ++i)
                        total[i] += load<Floats>(units + i * LANES) * load<Floats>(b_units + k + i * LANES);
                }
                float lanes[CODES];
                std::memcpy(lanes, total, sizeof lanes);
                for (int width = CODES / 2; width > 0; width /= 2)
                    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
                sum[row] = lanes[0];
            }
            unscale<To>(sum, rows, inv_scale, out + m);
        }
    });
}

// out[b.columns] = a @ b, a a row. The codes of b lie along N: its rows are added up as they are decoded.
template <class To>
void multiply_row(const Matrix& a, const Matrix& b, float inv_scale, typename To::Out* out, int threads) {
    constexpr int WIDE = std::max(CODES, 8 * LANES), VECTORS = WIDE / LANES;
    const int64_t K = a.columns, N = b.columns, padded = parts(K, CODES) * CODES;
    const Decoder decode_b(*b.format);
    Scratch scratch(padded * int64_t(sizeof(Unit)));
    Unit* const a_units = scratch.take<Unit>(padded);
    decode_vector(a.codes, a.column_stride, K, *a.format, a_units);

    in_parallel(parts(N, WIDE), threads, [&](int64_t first, int64_t end) {
        const DefaultFloatMode float_mode;
        for (int64_t n = first * WIDE; n < std::min(N, end * WIDE); n += WIDE) {
            const int columns = int(std::min<int64_t>(WIDE, N - n));
            Floats total[VECTORS] = {};
            alignas(64) Unit units[WIDE] = {};
            for (int64_t k = 0; k < K; ++k) {
                Floats32::along(decode_b, b.codes + k * b.row_stride + n, columns, units);
#pragma GCC unroll 16
                for (int i = 0; i < VECTORS; ++i)
                    total[i] = Floats32::add_product(a_units[k], load<Floats>(units + i * LANES), total[i]);
            }
            float sums[WIDE];
            std::memcpy(sums, total, sizeof sums);
            unscale<To>(sums, columns, inv_scale, out + n);
        }
    });
}

// out[a.rows][b.columns] = a @ b, a column by a row: writing it is the work, and memory takes whole rows fastest.
template <class To>
void multiply_column_by_row(const Matrix& a, const Matrix& b, float inv_scale, typename To::Out* out, int threads) {
    const int64_t M = a.rows, N = b.columns, padded_m = parts(M, CODES) * CODES, padded_n = parts(N, CODES) * CODES;
    Scratch scratch((padded_m + padded_n) * int64_t(sizeof(Unit)));
    Unit* const a_units = scratch.take<Unit>(padded_m);
    Unit* const b_units = scratch.take<Unit>(padded_n);
    decode_vector(a.codes, a.row_stride, M, *a.format, a_units);
    decode_vector(b.codes, b.column_stride, N, *b.format, b_units);

    constexpr int ROWS = 64;
    in_parallel(parts(M, ROWS), threads, [&](int64_t first, int64_t end) {
        const DefaultFloatMode float_mode;
        for (int64_t m = first * ROWS; m < std::min(M, end * ROWS); ++m) {
            const Floats a_value = Floats{} + bit_cast<float>(a_units[m]);
            const Result<To> row{out + m * N, N, inv_scale};
            int64_t n = 0;
            for (; n + LANES <= N; n += LANES) row.put(0, n, a_value * load<Floats>(b_units + n));
            if (n == N) continue;
            float last[LANES];
            Sums{last, LANES}.put(0, 0, a_value * load<Floats>(b_units + n));
            unscale<To>(last, N - n, inv_scale, row.at(0, n));
        }
    });
}

Matrix transposed(const Matrix& x) {
    return {x.codes, x.columns, x.rows, x.column_stride, x.row_stride, x.format};
}

template <class To> void multiply_with(Engine engine, const Matrix& a, const Matrix& b, float inv_scale, void* result, int threads) {
    const auto out = static_cast<typename To::Out*>(result);
    if (a.rows * b.columns == 0) return;
    if (a.columns == 0) {
        std::memset(out, 0, size_t(a.rows * b.columns) * sizeof *out);
        return;
    }
    const int64_t work = a.rows * b.columns * a.columns;
    if (work < WORK_FOR_THREADS) threads = 1;
    if (b.columns == 1 && a.column_stride == 1) return multiply_by_column<To>(a, b, inv_scale, out, threads);
    if (a.rows == 1 && b.row_stride == 1)
        return multiply_by_column<To>(transposed(b), transposed(a), inv_scale, out, threads);
    if (a.columns == 1) return multiply_column_by_row<To>(a, b, inv_scale, out, threads);
    if (engine == TILES && (work < WORK_FOR_TILES || a.columns < DEPTH_FOR_TILES)) engine = FLOATS;
    if (engine == FLOATS && a.rows == 1 && b.column_stride == 1) return multiply_row<To>(a, b, inv_scale, out, threads);
    if (engine == FLOATS && b.columns == 1 && a.row_stride == 1)
        return multiply_row<To>(transposed(b), transposed(a), inv_scale, out, threads);
#if defined(HAS_TILES)
    if (engine == TILES) return multiply<Tiles, To>(a, b, inv_scale, out, threads);
#endif
#if defined(HAS_PAIRS)
    if (engine == PAIRS) return multiply<Vectors<BFloat16Pairs>, To>(a, b, inv_scale, out, threads);
#endif
    multiply<Vectors<Floats32>, To>(a, b, inv_scale, out, threads);
}

}  // namespace

bool can_use(Engine engine) {
#if defined(HAS_TILES)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // Linux's ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
    static const bool permitted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    if (engine == TILES) return permitted;
#endif
#if defined(HAS_PAIRS)
    if (engine == PAIRS) return true;
#endif
    return engine == FLOATS;
}

Engine fastest_engine() {
    if (can_use(TILES)) return TILES;
#if defined(HAS_PAIRS)
    // AMD's multiply pairs in the time of floats; Intel's take twice as long, so that floats are faster.
    if (__builtin_cpu_is("amd")) return PAIRS;
#endif
    return FLOATS;
}

void scaled_mm(const Matrix& a, const Matrix& b, float scale_a, float scale_b, void* out, bool narrow, Engine engine,
               int threads) {
    const DefaultFloatMode float_mode;  // other threads set their own
    const double exact = 1.0 / (double(scale_a) * double(scale_b));
    const float inv_scale = exact > double(FLT_MAX) ? FLT_MAX : float(exact);
    if (!narrow) return multiply_with<ToFloat32>(engine, a, b, inv_scale, out, threads);
#if defined(__AVX512BF16__)
    // Sums are multiples of 2^-34, the product of the smallest subnormals of E5M2FNUZ.
    if (inv_scale >= 0x1p-92f) return multiply_with<ToBFloat16Fast>(engine, a, b, inv_scale, out, threads);
    const int64_t count = a.rows * b.columns;
    Scratch scratch(count * int64_t(sizeof(float)));
    float* const wide = scratch.take<float>(count);
    multiply_with<ToFloat32>(engine, a, b, inv_scale, wide, threads);
    unscale<ToBFloat16>(wide, count, 1, static_cast<uint16_t*>(out));
#else
    multiply_with<ToBFloat16>(engine, a, b, inv_scale, out, threads);
#endif
}
