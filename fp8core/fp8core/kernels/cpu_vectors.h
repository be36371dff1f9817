// What cpu.cpp and cpu_gemm.cpp are written in: vectors as wide as the processor's registers, and FP8 formats.
//
// GCC's vector types become AVX-512, AVX2, SSE2 or NEON instructions, whatever -march=native says.

#pragma once

#include <cfenv>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// An FP8 format; made by cpu.py from fp8core.formats, field for field.
struct Target {
    int32_t mantissa_bits;
    int32_t smallest_normal;  // float32 bits
    int32_t max;              // float32 bits
    int32_t overflow_above;   // float32 bits: a magnitude beyond them was clipped
    int32_t fnuz;             // no negative zero; its code 0x80 is the NaN
};

namespace {

// A register: GCC takes wider vectors than the processor has apart, element by element.
#if defined(__AVX512BW__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int LANES = VECTOR_BYTES / 4;

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef int16_t Shorts __attribute__((vector_size(VECTOR_BYTES)));
typedef int8_t Bytes __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfRegister __attribute__((vector_size(VECTOR_BYTES / 2)));     // LANES uint16
typedef uint8_t QuarterRegister __attribute__((vector_size(VECTOR_BYTES / 4)));  // LANES uint8

template <class To, class From> inline To load(const From* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

template <class To, class From> inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    return load<To>(&from);
}

template <class V> inline V select(V mask, V yes, V no) { return (mask & yes) | (~mask & no); }

// Between ints and bytes by way of shorts: GCC 12 does it element by element otherwise, except that it knows AVX-512's
// instruction. Narrowing keeps the low bits.
inline QuarterRegister narrow(Ints lanes) {
#if defined(__AVX512F__)
    return __builtin_convertvector(lanes, QuarterRegister);
#else
    return __builtin_convertvector(__builtin_convertvector(lanes, HalfRegister), QuarterRegister);
#endif
}
inline Ints widen(QuarterRegister lanes) {
    return __builtin_convertvector(__builtin_convertvector(lanes, HalfRegister), Ints);
}

// Round to nearest, subnormals kept, whatever the thread is set to (torch.set_flush_denormal). Each thread has its own.
#if defined(__SSE2__)
class DefaultFloatMode {  // <cfenv> sets x87's mode, too, in 15 times the time
public:
    DefaultFloatMode() : saved(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~DefaultFloatMode() { _mm_setcsr(saved); }

private:
    unsigned saved;
};
#else
class DefaultFloatMode {
public:
    DefaultFloatMode() {
        std::fegetenv(&saved);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatMode() { std::fesetenv(&saved); }

private:
    std::fenv_t saved;
};
#endif

template <class Out> inline void store(Out* out, Ints bits);
template <> inline void store(uint32_t* out, Ints bits) { std::memcpy(out, &bits, sizeof bits); }
template <> inline void store(uint16_t* out, Ints bits) {  // bf16: exact, an FP8 value has at most 4 significant bits
    const HalfRegister high = __builtin_convertvector((bits >> 16) & 0xFFFF, HalfRegister);
    std::memcpy(out, &high, sizeof high);
}

template <class Out> void decode_block(const uint8_t* q, Out* out, int n, const Target& target) {
    const int shift = 23 - target.mantissa_bits;
    const int32_t max_code = ((target.max - target.smallest_normal) >> shift) + (1 << target.mantissa_bits);
    const int32_t rebias = target.smallest_normal - (1 << 23);
    const Floats place = bit_cast<Floats>(Ints{} + target.smallest_normal);
    for (int i = 0; i < n; i += LANES) {
        const Ints code = widen(load<QuarterRegister>(q + i));
        const Ints a = code & 0x7F;
        const Ints normal = (a << shift) + rebias;
        const Ints subnormal = bit_cast<Ints>(bit_cast<Floats>((a << shift) + target.smallest_normal) - place);
        Ints bits = select(Ints(a < (1 << target.mantissa_bits)), subnormal, normal);
        if (target.fnuz)
            bits = select(Ints(code == 0x80), Ints{} + 0x7FC00000, bits | ((code & 0x80) << 24));
        else
            bits = select(Ints(a > max_code), (a << shift) | 0x7F800000, bits) | ((code & 0x80) << 24);
        store(out + i, bits);
    }
}

}  // namespace
