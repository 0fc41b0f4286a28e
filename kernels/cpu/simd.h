// Vectors of float, as wide as the instruction set has them, under one set of names. Kernel files only.
//
// `vf` holds kWidth floats, `vi` as many int32. GCC's vector extensions give + - * / and comparisons;
// here is what they lack. fma() is one rounding where the hardware has it; sums go in a fixed order.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own _mm512_undefined_ps
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace tiny_llm {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

namespace TINY_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kWidth)));
typedef int32_t vi __attribute__((vector_size(4 * kWidth)));
typedef uint32_t vu __attribute__((vector_size(4 * kWidth)));
typedef uint16_t vh __attribute__((vector_size(2 * kWidth)));  // half-width words: bf16 and f16

static inline vf splat(float x) { return x - vf{}; }  // 0 + x would be an addition: it turns -0 into 0
static inline vi splat_int(int32_t x) { return vi{} + x; }

static inline vf load(const float* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// The first n lanes, of fewer than kWidth; `rest` is what the others hold.
static inline vf load_part(const float* p, int64_t n, float rest) {
    vf v = splat(rest);
    memcpy(&v, p, n * sizeof(float));
    return v;
}
static inline void store_part(float* p, vf v, int64_t n) { memcpy(p, &v, n * sizeof(float)); }

static inline vf load(const bf16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    vh half;
    memcpy(&half, p, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
#endif
}

// Round to nearest even; a NaN stays one.
static inline uint16_t round_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)((u >> 16) | 0x40);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline void store(bf16* p, vf v) {
    const vu u = (vu)v;
    const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const vu nan = (vu)((u & 0x7fffffff) > 0x7f800000);
    const vh half = __builtin_convertvector((nan & ((u >> 16) | 0x40)) | (~nan & rounded), vh);
    memcpy(p, &half, sizeof half);
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    const uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline float to_float(f16 x) {
    const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    uint32_t u = (magnitude << 13) + 0x38000000;                       // a normal number
    if (magnitude >= 0x7c00) u = (magnitude << 13) | 0x7f800000;       // infinity, NaN
    float f;
    memcpy(&f, &u, 4);
    if (magnitude < 0x0400) f = (float)magnitude * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
    memcpy(&u, &f, 4);
    u |= sign;
    memcpy(&f, &u, 4);
    return f;
}
static inline vf load(const f16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vh half;
    memcpy(&half, p, sizeof half);
    const vu u = __builtin_convertvector(half, vu), magnitude = (u & 0x7fff) << 13;
    const vu special = (vu)(magnitude >= 0x0f800000) & 0x7f800000;  // infinity, NaN
    const vf number = (vf)magnitude * 5.192296858534828e33f;        // 2^112: right for subnormal ones too
    return (vf)((vu)number | special | (u & 0x8000) << 16);
#endif
}

// Round to nearest even; what is too large becomes infinity, a NaN stays one.
static inline uint16_t round_f16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and more
    if (magnitude < 0x38800000) {                                   // subnormal: adding 0.5 rounds to 2^-24
        float f;
        memcpy(&f, &magnitude, 4);
        f += 0.5f;
        memcpy(&u, &f, 4);
        return (uint16_t)(sign | (u - 0x3f000000));
    }
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}
static inline void store(f16* p, vf v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < kWidth; ++i) p[i].bits = round_f16(v[i]);
#endif
}

// a * b + c
static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// Whether a lane of a comparison's result is set.
static inline bool any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int32_t all = 0;
    for (int i = 0; i < kWidth; ++i) all |= mask[i];
    return all != 0;
#endif
}
static inline vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

// b where one of the two is a NaN.
static inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select(a > b, a, b);
#endif
}
static inline vf min(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return select(a < b, a, b);
#endif
}

// e^x to 2 ulp, subnormal results included; e^-inf is 0, above 88.73 it is infinity, a NaN stays one.
// x = n ln 2 + r with |r| < 0.35; the polynomial is the minimax one for (e^r - 1 - r) / r^2.
static inline vf exp(vf x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
    x = min(splat(89.0f), max(splat(-104.0f), x));
    const vf shifted = fma(x, splat(1.44269504f), splat(kRound));
    const vf n = shifted - kRound;
    vf r = fma(n, splat(-0.693359375f), x);  // ten bits of ln 2: this product is exact, fused or not
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = fma(r, splat(1.381459878757596e-3f), splat(8.368716575205326e-3f));
    p = fma(p, r, splat(4.166838899254799e-2f));
    p = fma(p, r, splat(1.666652113199234e-1f));
    p = fma(p, r, splat(4.999999403953552e-1f));
    p = fma(r * r, p, r) + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const vi power = (vi)shifted - 0x4b400000, half = power >> 1;  // 2^n in two steps: n can be -150 or 128
    return p * (vf)((half + 127) << 23) * (vf)((power - half + 127) << 23);
#endif
}

// 2^(x - most) to 3 ulp in place of x, for x <= most, an integer; what would be less than 2^-126 is 0, a NaN
// stays one. Half the work of exp(), and several at a time: one by one, each would wait for itself.
template <int N>
static inline void exp2_below(vf (&x)[N], float most) {
    // 1.5 * 2^23, as above, and the exponent's bias: what the sum holds is shifted to where an exponent lies.
    const vf round = splat(12582912.0f + 127.0f - most), least = splat(most - 127.0f);
    constexpr float kTerms[] = {9.67150367796421e-3f, 5.550733581185341e-2f, 2.4022242426872253e-1f,
                                6.931470036506653e-1f, 1.0f};
    vf n[N], p[N];
    for (int i = 0; i < N; ++i) x[i] = max(least, x[i]);
    for (int i = 0; i < N; ++i) n[i] = x[i] + round;
    for (int i = 0; i < N; ++i) x[i] -= n[i] - round;
    for (int i = 0; i < N; ++i) p[i] = splat(1.326469937339425e-3f);
    for (const float term : kTerms)
        for (int i = 0; i < N; ++i) p[i] = fma(p[i], x[i], splat(term));
    for (int i = 0; i < N; ++i) x[i] = p[i] * (vf)((vi)n[i] << 23);
}

// ln x to 3 ulp for positive, finite, normal x. x = m 2^n with m from 0.7 to 1.4;
// ln m = 2 artanh t with t = (m - 1) / (m + 1), whose series in t^2 < 0.03 is short.
static inline vf log(vf x) {
    const vi n = ((vi)x - 0x3f3504f3) >> 23;  // 0x3f3504f3 is the square root of 1/2
    const vf m = (vf)((vi)x - (n << 23));
    const vf t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
    vf p = fma(t2, splat(2.0f / 9), splat(2.0f / 7));
    p = fma(p, t2, splat(2.0f / 5));
    p = fma(p, t2, splat(2.0f / 3));
    const vf tail = fma(p * t2, t, t + t);
    return fma(__builtin_convertvector(n, vf), splat(0.69314718f), tail);
}

static inline vf silu(vf x) { return x / (exp(-x) + 1.0f); }

// Halves are folded onto each other: the same order on every call.
static inline float sum(vf v) {
    float lanes[kWidth];
    store(lanes, v);
    for (int half = kWidth / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
static inline float max_of(vf v) {
    float lanes[kWidth];
    store(lanes, v);
    float most = lanes[0];
    for (int i = 1; i < kWidth; ++i) most = lanes[i] > most ? lanes[i] : most;
    return most;
}
static inline int32_t sum_of(vi v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t total = 0;
    for (int i = 0; i < kWidth; ++i) total += v[i];
    return total;
#endif
}
static inline int32_t max_of(vi v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t most = v[0];
    for (int i = 1; i < kWidth; ++i) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

}  // namespace TINY_ISA
}  // namespace tiny_llm
