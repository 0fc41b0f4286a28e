// A small matrix product in registers: some rows of floats times a matrix in memory. Kernel files only.
//
// Each element is one chain of fma over the inner index, in order: how many rows or columns are computed
// together does not change its bits. With AVX512-BF16 the same chain goes by pairs, over a left side that was rounded
// to bf16: an instruction adds one product and then the other, each sum rounded by itself. What is less than 2^-126
// counts as 0 there.
#pragma once

#include "simd.h"

namespace tiny_llm::TINY_ISA {

#if defined(__AVX512F__)
constexpr int kMostRows = 8, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kMostRows = 7, kRegisters = 16;
#elif defined(__ARM_NEON)
constexpr int kMostRows = 6, kRegisters = 32;
#else
constexpr int kMostRows = 4, kRegisters = 16;
#endif

struct Left {
    const float* data;
    int64_t stride;
};

// A matrix of floats or of what is widened to them: rows [i * unit, (i + 1) * unit) lie at at[i], `stride` apart.
// With each row, what lies as much further from ahead[i] is brought near, for whoever reads it next: to the second
// cache, since in the first it would be in the way for as long.
template <class T>
struct Right {
    const T* const* at;
    int64_t unit, stride;
    const T* const* ahead;
};

static inline float to_float(int8_t x) { return x; }
static inline vf load(const int8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#elif defined(__ARM_NEON)
    int32_t four;
    memcpy(&four, p, sizeof four);
    return (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
#else
    vf v;
    for (int i = 0; i < kWidth; ++i) v[i] = p[i];
    return v;
#endif
}

// ---- bf16 is widened two vectors at once: the even columns by a shift, the odd ones by a mask, where in
// ---- order it would take twice the work. Sums are put in that order when they are loaded, and back.

#if defined(__AVX512F__)
#define TINY_SHUFFLE(a, b, f)                                                                                      \
    __builtin_shufflevector(a, b, f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), \
                            f(13), f(14), f(15))
#elif defined(__AVX2__)
#define TINY_SHUFFLE(a, b, f) __builtin_shufflevector(a, b, f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7))
#else
#define TINY_SHUFFLE(a, b, f) __builtin_shufflevector(a, b, f(0), f(1), f(2), f(3))
#endif
#define TINY_EVEN(i) 2 * (i)
#define TINY_ODD(i) 2 * (i) + 1
#define TINY_LOW(i) (i) / 2 + (i) % 2 * kWidth
#define TINY_HIGH(i) (kWidth + (i)) / 2 + (i) % 2 * kWidth

template <int V, class T>
[[gnu::always_inline]] inline void load_row(const T* from, vf (&row)[V]) {
    for (int v = 0; v < V; ++v) row[v] = load(from + v * kWidth);
}
template <int V, class T>
[[gnu::always_inline]] inline void load_sums(const float* from, vf (&sums)[V], const T*) {
    load_row(from, sums);
}
template <int V, class T>
[[gnu::always_inline]] inline void store_sums(float* to, const vf (&sums)[V], const T*) {
    for (int v = 0; v < V; ++v) store(to + v * kWidth, sums[v]);
}

#if !defined(__AVX512BF16__)
template <int V>
[[gnu::always_inline]] inline void load_row(const bf16* from, vf (&row)[V]) {
    if constexpr (V == 1) {
        row[0] = load(from);
    } else {
        for (int v = 0; v < V; v += 2) {
            vu words;
            memcpy(&words, from + v * kWidth, sizeof words);
            row[v] = (vf)(words << 16), row[v + 1] = (vf)(words & 0xffff0000u);
        }
    }
}
template <int V>
[[gnu::always_inline]] inline void load_sums(const float* from, vf (&sums)[V], const bf16*) {
    load_row(from, sums);
    if constexpr (V > 1)
        for (int v = 0; v < V; v += 2) {
            const vf first = sums[v], second = sums[v + 1];
            sums[v] = TINY_SHUFFLE(first, second, TINY_EVEN), sums[v + 1] = TINY_SHUFFLE(first, second, TINY_ODD);
        }
}
template <int V>
[[gnu::always_inline]] inline void store_sums(float* to, const vf (&sums)[V], const bf16*) {
    if constexpr (V == 1) {
        store(to, sums[0]);
    } else {
        for (int v = 0; v < V; v += 2) {
            store(to + v * kWidth, TINY_SHUFFLE(sums[v], sums[v + 1], TINY_LOW));
            store(to + (v + 1) * kWidth, TINY_SHUFFLE(sums[v], sums[v + 1], TINY_HIGH));
        }
    }
}

#endif

constexpr int kLine = 64;

// ---- what is multiplied at once: a number of the left side by a row of the right, or a pair by two rows. Of a pair's
// ---- word the upper half holds the even one, which is added first.

#if defined(__AVX512BF16__)
constexpr int kTogether = 2;

// Two rows' columns as pairs.
static inline vf join(const bf16* even, const bf16* odd) {
    const vu lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, order = lane * 0x10001u + kWidth;
    const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)even));
    const __m512i both = _mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i*)odd), 1);
    return (vf)_mm512_permutexvar_epi16((__m512i)order, both);
}
template <int V>
[[gnu::always_inline]] inline void load_rows(const bf16* at, int64_t stride, vf (&rows)[V]) {
    for (int v = 0; v < V; ++v) rows[v] = join(at + v * kWidth, at + stride + v * kWidth);
}
template <int V>
[[gnu::always_inline]] inline void load_rows(const float* at, int64_t, vf (&rows)[V]) {
    load_row(at, rows);
}
// A row of two that counts for nothing, a NaN there too.
template <int V>
[[gnu::always_inline]] inline void leave_out(bool even, bool odd, vf (&rows)[V]) {
    for (int v = 0; v < V; ++v) rows[v] = (vf)((vu)rows[v] & (even ? 0xffffu : ~0u) & (odd ? 0xffff0000u : ~0u));
}
// x [n] times `factor` as pairs, to (n + 1) / 2 words, which may lie where x begins; their sum.
static inline float write_left(const float* x, int64_t n, float factor, float* to) {
    vf total = {};
    for (int64_t i = 0; i < n; i += 2 * kWidth) {
        const int64_t rest = n - i;
        const vf first = rest < kWidth ? load_part(x + i, rest, 0.0f) : load(x + i);
        vf second = {};
        if (rest > kWidth) second = rest < 2 * kWidth ? load_part(x + i + kWidth, rest - kWidth, 0.0f) : load(x + i + kWidth);
        const __m512 low = (__m512)(first * splat(factor)), high = (__m512)(second * splat(factor));
        const __m512i words = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        const vf pairs = (vf)_mm512_rol_epi32(words, 16);
        total = (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)pairs, (__m512bh)_mm512_set1_epi16(0x3f80));
        if (rest < 2 * kWidth) {
            store_part(to + i / 2, pairs, (rest + 1) / 2);
        } else {
            store(to + i / 2, pairs);
        }
    }
    return sum(total);
}
[[gnu::always_inline]] inline vf multiply_add(const float* pair, vf rows, vf sum) {
    int word;
    memcpy(&word, pair, sizeof word);
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(word), (__m512bh)rows);
}
#else
constexpr int kTogether = 1;  // a pool's rows are widened, and the left side stays as it is
template <int V, class T>
[[gnu::always_inline]] inline void load_rows(const T* at, int64_t, vf (&rows)[V]) {
    load_row(at, rows);
}
template <int V>
[[gnu::always_inline]] inline void leave_out(bool, bool, vf (&)[V]) {}
static inline float write_left(const float* x, int64_t n, float factor, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = x[i] * factor;
    return 0;
}
[[gnu::always_inline]] inline vf multiply_add(const float* factor, vf row, vf sum) { return fma(splat(*factor), row, sum); }
#endif

// ---- c[rows, columns] (+)= left[rows, from ... inner) b[from ... inner), columns]

template <int R, int V, bool kAdd, class T>
[[gnu::always_inline]] inline void product_tile(Left left, int64_t from, int64_t inner, const Right<T>& b, int64_t column,
                                                float* c, int64_t c_stride) {
    constexpr int kApart = sizeof(T) < sizeof(float) ? kTogether : 1;  // pairs that were packed are one row
    bool begins_line[kApart];
    for (int i = 0; i < kApart; ++i) begins_line[i] = (column + i * b.stride) * (int64_t)sizeof(T) % kLine == 0;
    vf sums[R][V] = {};
    if (kAdd)
        for (int r = 0; r < R; ++r) load_sums(c + r * c_stride, sums[r], *b.at);
    int64_t block = from / b.unit, place = from % b.unit / kTogether * kTogether;
    for (int64_t k = from < inner ? from / kTogether * kTogether : inner; k < inner; ++block, place = 0) {
        const int64_t rest = b.unit - place, end = rest < inner - k ? k + rest : inner;
        const T* at = b.at[block] + place * b.stride + column;
        const T* ahead = b.ahead[block] + place * b.stride + column;
        for (; k < end; k += kTogether, at += kTogether * b.stride, ahead += kTogether * b.stride) {
            for (int i = 0; i < kApart; ++i)
                if (begins_line[i])
                    for (int v = 0; v < V * kWidth; v += kLine / (int)sizeof(T))
                        __builtin_prefetch(ahead + i * b.stride + v, 0, 2);
            vf rows[V];
            load_rows(at, b.stride, rows);
            if (k < from || k + kTogether > inner) leave_out(k < from, k + kTogether > inner, rows);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v)
                    sums[r][v] = multiply_add(left.data + r * left.stride + k / kTogether, rows[v], sums[r][v]);
        }
    }
    for (int r = 0; r < R; ++r) store_sums(c + r * c_stride, sums[r], *b.at);
}

// Vectors of columns that `rows` rows are computed for at once.
constexpr int vectors_of(int rows) { return rows * 4 + 4 <= kRegisters ? 4 : rows * 2 + 2 <= kRegisters ? 2 : 1; }

// Rows that are computed at once. Seven query heads to a key head are common, and what is widened is best
// widened once for all; but seven rows' sums leave floats one register too few.
template <class T>
constexpr int most_rows = sizeof(T) == sizeof(float) && kMostRows == 7 ? 6 : kMostRows;

template <int R, bool kAdd, class T>
void product_rows(Left left, int64_t from, int64_t inner, const Right<T>& b, float* c, int64_t c_stride, int64_t columns) {
    constexpr int kWide = vectors_of(R);
    int64_t at = 0;
    for (; at + kWide * kWidth <= columns; at += kWide * kWidth)
        product_tile<R, kWide, kAdd>(left, from, inner, b, at, c + at, c_stride);
    if (kWide > 2 && at + 2 * kWidth <= columns) {
        product_tile<R, 2, kAdd>(left, from, inner, b, at, c + at, c_stride);
        at += 2 * kWidth;
    }
    if (kWide > 1 && at < columns) product_tile<R, 1, kAdd>(left, from, inner, b, at, c + at, c_stride);
}

// rows: 1 ... most_rows<T>; columns: whole vectors
template <bool kAdd, class T>
inline void product(int64_t rows, Left left, int64_t from, int64_t inner, const Right<T>& b, float* c, int64_t c_stride,
                    int64_t columns) {
    using Function = void (*)(Left, int64_t, int64_t, const Right<T>&, float*, int64_t, int64_t);
    static constexpr Function kFunctions[] = {
        product_rows<1, kAdd, T>, product_rows<2, kAdd, T>, product_rows<3, kAdd, T>, product_rows<4, kAdd, T>,
#if defined(__AVX2__) || defined(__ARM_NEON)
        product_rows<5, kAdd, T>, product_rows<6, kAdd, T>,
#endif
#if defined(__AVX2__)
        product_rows<7, kAdd, T>,
#endif
#if defined(__AVX512F__)
        product_rows<8, kAdd, T>,
#endif
    };
    kFunctions[rows - 1](left, from, inner, b, c, c_stride, columns);
}

}  // namespace tiny_llm::TINY_ISA
