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
//   a  [panel of ROWS][piece of K][row][unit]       decoded from rows of codes along K
//   b  [panel of COLUMNS][unit][column]             decoded from rows of codes along N
//
// An operand whose codes lie the other way is transposed first, 16 x 16 bytes at a time in registers. A block of the
// result is summed in scratch that stays in the cache, unscaled, rounded and written once. What is beyond K is zero.

#include "cpu_gemm.h"

#include <algorithm>
#include <cfloat>
#include <cstdlib>
#include <new>
#include <optional>
#include <type_traits>

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

typedef uint32_t Unit;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
constexpr int COLUMNS = 2 * LANES;
constexpr int DEPTH = 384;                     // units in a piece: a piece of b's panel is about as large as the L1 cache
constexpr int BLOCK_M = 192, BLOCK_N = 256;    // of the result; with its panels it fits into the L2 cache
constexpr int CODES = 32;                      // are decoded at once
constexpr int STAGE_ROWS = 48, STAGE_COLUMNS = 128;
constexpr int64_t WORK_FOR_THREADS = 1 << 21;  // multiplications; below, one thread is faster than waking the others

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

#if defined(__AVX512BW__)
// By a table: four registers hold the bf16 of all 128 magnitudes.
class Decoder {
public:
    explicit Decoder(const Target& format) {
        alignas(64) uint8_t codes[128];
        alignas(64) uint16_t magnitudes[128];
        for (int code = 0; code < 128; ++code) codes[code] = uint8_t(code);
        decode_block(codes, magnitudes, 128, format);
        for (int i = 0; i < 4; ++i) table[i] = _mm512_load_si512(magnitudes + 32 * i);
        nan_code = _mm512_set1_epi16(format.fnuz ? 0x80 : -1);
    }

    // 32 codes of 16 bits, the upper half clear
    __m512i operator()(__m512i codes) const {
        const __m512i low = _mm512_permutex2var_epi16(table[0], codes, table[1]);
        const __m512i high = _mm512_permutex2var_epi16(table[2], codes, table[3]);
        const __mmask32 is_high = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
        const __m512i magnitude = _mm512_mask_blend_epi16(is_high, low, high);
        const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x80)), 8);
        const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(codes, nan_code);
        return _mm512_mask_mov_epi16(_mm512_or_si512(magnitude, sign), is_nan, _mm512_set1_epi16(0x7FC0));
    }

    // The first n of 32 codes, and zeros
    __m512i operator()(const uint8_t* codes, int n) const { return (*this)(load_codes(codes, n)); }

    static __m512i load_codes(const uint8_t* codes, int n) {
        const __mmask32 there = n >= CODES ? ~__mmask32(0) : (__mmask32(1) << n) - 1;
        return _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(there, codes));
    }

private:
    __m512i table[4], nan_code;
};
#else
class Decoder {
public:
    explicit Decoder(const Target& target) : format(target) {}

    // Float32 of the first n of COUNT codes, and zeros
    template <int COUNT> void to_floats(const uint8_t* codes, int n, Unit* out) const {
        uint8_t padded[COUNT] = {};
        if (n < COUNT) codes = static_cast<const uint8_t*>(std::memcpy(padded, codes, size_t(n)));
        decode_block(codes, out, COUNT, format);
    }

private:
    const Target& format;
};
#endif

struct Floats32 {
    static constexpr int STEPS = 1;  // of K in a unit

    // n codes of a row of a, with zeros up to a multiple of CODES
    static void along(const Decoder& decode, const uint8_t* codes, int n, Unit* out) {
        for (int i = 0; i < n; i += CODES) {
#if defined(__AVX512BW__)
            const __m512i bf16 = decode(codes + i, n - i);
            const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(bf16));
            const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bf16, 1));
            _mm512_storeu_si512(out + i, _mm512_slli_epi32(first, 16));
            _mm512_storeu_si512(out + i + 16, _mm512_slli_epi32(second, 16));
#else
            decode.to_floats<CODES>(codes + i, n - i, out + i);
#endif
        }
    }

    // STEPS rows of b (or as many as there are), n codes each, with zeros up to COLUMNS
    static void across(const Decoder& decode, Rows rows, int, int n, Unit* out) {
#if defined(__AVX512BW__)
        along(decode, rows.codes, n, out);
#else
        decode.to_floats<COLUMNS>(rows.codes, n, out);
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

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
struct BFloat16Pairs {
    static constexpr int STEPS = 2;

    static void along(const Decoder& decode, const uint8_t* codes, int n, Unit* out) {
        for (int i = 0; i < n; i += CODES) _mm512_storeu_si512(out + i / STEPS, decode(codes + i, n - i));
    }

    static void across(const Decoder& decode, Rows rows, int height, int n, Unit* out) {
        const __m512i even = Decoder::load_codes(rows.codes, n);
        const __m512i odd = Decoder::load_codes(rows.codes + (height > 1 ? rows.stride : 0), height > 1 ? n : 0);
        const __m512i in_turns = _mm512_or_si512(even, _mm512_slli_epi16(odd, 8));
        _mm512_storeu_si512(out, decode(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(in_turns))));
        _mm512_storeu_si512(out + 16, decode(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(in_turns, 1))));
    }

#if defined(__AVX512BF16__)
    static Floats add_product(Unit a, Floats b, Floats sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
    }
#endif
};
#endif

// ------------------------------------------------------------------------------------------------- the innermost loop
//
// sum[rows][columns] = a[rows][depth] @ b[depth][COLUMNS], in units; with `add` that is added to what is there. Up to
// ROWS and COLUMNS are written: sum has the room.

template <class Kind> struct Vectors : Kind {
    static constexpr int ROWS = REGISTERS == 32 ? 12 : 6;  // whose sums stay in registers
    static constexpr int PADDED = 1;                       // what depth is a multiple of
    struct Mode {};

    template <int R, int V>
    static void sum_in_registers(const Unit* a, int64_t a_stride, const Unit* b, int64_t depth, float* sum,
                                 int64_t sum_stride, bool add) {
        Floats total[R][V];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) total[r][v] = add ? load<Floats>(sum + r * sum_stride + v * LANES) : Floats{};
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
            for (int v = 0; v < V; ++v) std::memcpy(sum + r * sum_stride + v * LANES, &total[r][v], sizeof(Floats));
    }

    static void multiply(const Unit* a, int64_t a_stride, const Unit* b, int64_t depth, float* sum, int64_t sum_stride,
                         int rows, int columns, bool add) {
        const auto run = [&](auto narrow) {
            constexpr int V = decltype(narrow)::value ? 1 : 2;
            const auto sum_of = rows > 8   ? sum_in_registers<ROWS, V>
                                : rows > 4 ? sum_in_registers<(ROWS < 8 ? ROWS : 8), V>
                                : rows > 2 ? sum_in_registers<4, V>
                                : rows > 1 ? sum_in_registers<2, V>
                                           : sum_in_registers<1, V>;
            sum_of(a, a_stride, b, depth, sum, sum_stride, add);
        };
        if (columns > LANES)
            run(std::false_type());
        else
            run(std::true_type());
    }
};

#if defined(__AMX_BF16__)
struct Tiles : BFloat16Pairs {
    static constexpr int SIDE = 16;  // of a tile: rows, and units in a row
    static constexpr int ROWS = 2 * SIDE;
    static constexpr int PADDED = SIDE;
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
    static void sum_in_tiles(const Unit* a, int64_t a_stride, const Unit* b, int64_t depth, float* sum,
                             int64_t sum_stride, bool add) {
        const int64_t a_bytes = a_stride * 4, sum_bytes = sum_stride * 4;
        const Unit* const a_below = a + SIDE * a_stride;
        float* const sum_below = sum + SIDE * sum_stride;
        if (add) {
            _tile_loadd(0, sum, sum_bytes);
            if (WIDE) _tile_loadd(1, sum + SIDE, sum_bytes);
            if (TALL) _tile_loadd(2, sum_below, sum_bytes);
            if (TALL && WIDE) _tile_loadd(3, sum_below + SIDE, sum_bytes);
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
        _tile_stored(0, sum, sum_bytes);
        if (WIDE) _tile_stored(1, sum + SIDE, sum_bytes);
        if (TALL) _tile_stored(2, sum_below, sum_bytes);
        if (TALL && WIDE) _tile_stored(3, sum_below + SIDE, sum_bytes);
    }

    static void multiply(const Unit* a, int64_t a_stride, const Unit* b, int64_t depth, float* sum, int64_t sum_stride,
                         int rows, int columns, bool add) {
        const bool tall = rows > SIDE, wide = columns > SIDE;
        const auto sum_of = tall && wide ? sum_in_tiles<true, true>
                            : tall       ? sum_in_tiles<true, false>
                            : wide       ? sum_in_tiles<false, true>
                                         : sum_in_tiles<false, false>;
        sum_of(a, a_stride, b, depth, sum, sum_stride, add);
    }
};
#endif

// ------------------------------------------------------------------------------------------------------------ unscale

// To bf16, ties to even; all NaN become one, as in torch. Not by AVX512_BF16's instruction, which flushes subnormals.
inline Ints rounded_to_bf16(Floats y) {
    const Ints bits = bit_cast<Ints>(y);
    const Ints rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    return select(Ints((bits & 0x7FFFFFFF) > 0x7F800000), Ints{} + 0x7FC00000, rounded);
}

inline void store_product(float* out, Floats y) { std::memcpy(out, &y, sizeof y); }
inline void store_product(uint16_t* out, Floats y) {
#if defined(__AVX512F__)  // for the portable way GCC 12 takes two instructions more
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bit_cast<__m512i>(rounded_to_bf16(y)), 16));
    std::memcpy(out, &high, sizeof high);
#else
    store(out, rounded_to_bf16(y));
#endif
}

// Reads whole registers of `sum`.
template <class Out> void unscale(const float* sum, int64_t n, float inv_scale, Out* out) {
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) store_product(out + i, load<Floats>(sum + i) * inv_scale);
    if (whole == n) return;
    Out last[LANES];
    store_product(last, load<Floats>(sum + whole) * inv_scale);
    std::memcpy(out + whole, last, size_t(n - whole) * sizeof *out);
}

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

template <class Kernel, class Out>
void multiply(const Matrix& a, const Matrix& b, float inv_scale, Out* out, int threads) {
    constexpr int ROWS = Kernel::ROWS, STEPS = Kernel::STEPS;
    constexpr int GROUP = STAGE_ROWS / ROWS;  // panels of a that are decoded together: whole squares to transpose
    const int64_t M = a.rows, N = b.columns, K = a.columns;
    const int64_t units = parts(K, STEPS), depth = parts(units, Kernel::PADDED) * Kernel::PADDED;
    const int64_t a_row = parts(K, CODES) * CODES / STEPS;  // units of a row as `along` writes it
    const int64_t stride = std::min<int64_t>(a_row, DEPTH), pieces = parts(a_row, DEPTH);
    const int64_t row_panels = parts(M, ROWS), row_groups = parts(row_panels, GROUP), column_panels = parts(N, COLUMNS);
    const int64_t block_m = std::min<int64_t>(BLOCK_M, parts(parts(M, threads), ROWS) * ROWS);
    const int64_t block_n = std::min<int64_t>(BLOCK_N, column_panels * COLUMNS);
    const int64_t a_count = row_panels * pieces * ROWS * stride, b_count = column_panels * depth * COLUMNS;
    const int64_t sum_count = block_m * block_n;
    const auto bytes = [](int64_t count) { return Scratch::padded(count * 4); };
    Scratch scratch(bytes(a_count) + bytes(b_count) + (threads == 1 ? bytes(sum_count) : 0));
    Unit* const a_units = scratch.take<Unit>(a_count);
    Unit* const b_units = scratch.take<Unit>(b_count);

    in_parallel(row_groups + column_panels, threads, [&](int64_t first, int64_t end) {
        Stage stage;
        const Decoder decode_a(*a.format), decode_b(*b.format);
        for (int64_t group = first; group < std::min(end, row_groups); ++group) {
            const int64_t m0 = group * GROUP * ROWS;
            const int rows = int(std::min<int64_t>(GROUP * ROWS, M - m0));
            for (int64_t k = 0; k < K; k += STAGE_COLUMNS) {
                const int n = int(std::min<int64_t>(STAGE_COLUMNS, K - k));
                const int64_t piece = k / STEPS / DEPTH, unit = k / STEPS % DEPTH;
                const Rows from = rows_of(a, m0, rows, k, n, stage);
                for (int r = 0; r < rows; ++r) {
                    const int64_t panel = (m0 + r) / ROWS, row = (m0 + r) % ROWS;
                    Unit* to = a_units + ((panel * pieces + piece) * ROWS + row) * stride + unit;
                    Kernel::along(decode_a, from.codes + r * from.stride, n, to);
                }
            }
        }
        for (int64_t panel = std::max(first, row_groups) - row_groups; panel < end - row_groups; ++panel) {
            const int columns = int(std::min<int64_t>(COLUMNS, N - panel * COLUMNS));
            Unit* to = b_units + panel * depth * COLUMNS;
            for (int64_t k = 0; k < K; k += STAGE_ROWS) {
                const int height = int(std::min<int64_t>(STAGE_ROWS, K - k));
                Rows from = rows_of(b, k, height, panel * COLUMNS, columns, stage);
                for (int i = 0; i < height; i += STEPS, to += COLUMNS, from.codes += STEPS * from.stride)
                    Kernel::across(decode_b, from, height - i, columns, to);
            }
            std::memset(to, 0, size_t((depth - units) * COLUMNS) * sizeof(Unit));
        }
    });

    const int64_t blocks_m = parts(M, block_m), blocks_n = parts(N, block_n);
    float* const shared_sum = threads == 1 ? scratch.take<float>(sum_count) : nullptr;
    in_parallel(blocks_m * blocks_n, threads, [&](int64_t first, int64_t end) {
        const DefaultFloatMode float_mode;
        [[maybe_unused]] const typename Kernel::Mode mode;
        std::optional<Scratch> own;
        if (!shared_sum) own.emplace(bytes(sum_count));
        float* const sum = shared_sum ? shared_sum : own->take<float>(sum_count);
        for (int64_t block = first; block < end; ++block) {
            const int64_t m0 = block % blocks_m * block_m, m1 = std::min(M, m0 + block_m);
            const int64_t n0 = block / blocks_m * block_n, n1 = std::min(N, n0 + block_n);
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const int64_t piece_depth = std::min<int64_t>(DEPTH, depth - piece * DEPTH);
                for (int64_t n = n0; n < n1; n += COLUMNS) {
                    const Unit* b_panel = b_units + (n / COLUMNS * depth + piece * DEPTH) * COLUMNS;
                    for (int64_t m = m0; m < m1; m += ROWS) {
                        const Unit* a_panel = a_units + (m / ROWS * pieces + piece) * ROWS * stride;
                        Kernel::multiply(a_panel, stride, b_panel, piece_depth, sum + (m - m0) * block_n + n - n0,
                                         block_n, int(std::min<int64_t>(ROWS, m1 - m)),
                                         int(std::min<int64_t>(COLUMNS, n1 - n)), piece > 0);
                    }
                }
            }
            for (int64_t m = m0; m < m1; ++m) unscale(sum + (m - m0) * block_n, n1 - n0, inv_scale, out + m * N + n0);
        }
    });
}

template <class Out>
void multiply_with(Engine engine, const Matrix& a, const Matrix& b, float inv_scale, Out* out, int threads) {
    if (a.rows * b.columns == 0) return;
    if (a.columns == 0) {
        std::memset(out, 0, size_t(a.rows * b.columns) * sizeof *out);
        return;
    }
    if (a.rows * b.columns * a.columns < WORK_FOR_THREADS) threads = 1;
#if defined(__AMX_BF16__)
    if (engine == TILES) return multiply<Tiles>(a, b, inv_scale, out, threads);
#endif
#if defined(__AVX512BF16__)
    if (engine == PAIRS) return multiply<Vectors<BFloat16Pairs>>(a, b, inv_scale, out, threads);
#endif
    multiply<Vectors<Floats32>>(a, b, inv_scale, out, threads);
}

}  // namespace

bool can_use(Engine engine) {
#if defined(__AMX_BF16__)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // Linux's ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
    static const bool permitted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    if (engine == TILES) return permitted;
#endif
#if defined(__AVX512BF16__)
    if (engine == PAIRS) return true;
#endif
    return engine == FLOATS;
}

Engine fastest_engine() {
    if (can_use(TILES)) return TILES;
#if defined(__AVX512BF16__)
    // AMD's multiply pairs in the time of floats; Intel's take twice as long, so that floats are faster.
    if (__builtin_cpu_is("amd")) return PAIRS;
#endif
    return FLOATS;
}

void scaled_mm(const Matrix& a, const Matrix& b, float scale_a, float scale_b, void* out, bool narrow, Engine engine,
               int threads) {
    const double exact = 1.0 / (double(scale_a) * double(scale_b));
    const float inv_scale = exact > double(FLT_MAX) ? FLT_MAX : float(exact);
    if (narrow)
        multiply_with(engine, a, b, inv_scale, static_cast<uint16_t*>(out), threads);
    else
        multiply_with(engine, a, b, inv_scale, static_cast<float*>(out), threads);
}
