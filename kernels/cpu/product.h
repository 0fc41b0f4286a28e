// A small matrix product in registers: some rows of floats times a matrix in memory. Kernel files only.
//
// Each element is one chain of fma over the inner index, in order: how many rows or columns are computed
// together does not change its bits.
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

constexpr int kLine = 64;

// ---- c[rows, columns] (+)= left[rows, from ... inner) b[from ... inner), columns]

template <int R, int V, bool kAdd, class T>
[[gnu::always_inline]] inline void product_tile(Left left, int64_t from, int64_t inner, const Right<T>& b, int64_t column,
                                                float* c, int64_t c_stride) {
    const bool begins_line = column * (int64_t)sizeof(T) % kLine == 0;
    vf sums[R][V] = {};
    if (kAdd)
        for (int r = 0; r < R; ++r) load_sums(c + r * c_stride, sums[r], *b.at);
    int64_t block = from / b.unit, place = from % b.unit;
    for (int64_t k = from; k < inner; ++block, place = 0) {
        const int64_t rest = b.unit - place, end = rest < inner - k ? k + rest : inner;
        const T* at = b.at[block] + place * b.stride + column;
        const T* ahead = b.ahead[block] + place * b.stride + column;
        for (; k < end; ++k, at += b.stride, ahead += b.stride) {
            if (begins_line)
                for (int v = 0; v < V * kWidth; v += kLine / (int)sizeof(T)) __builtin_prefetch(ahead + v, 0, 2);
            vf row[V];
            load_row(at, row);
            for (int r = 0; r < R; ++r) {
                const vf factor = splat(left.data[r * left.stride + k]);
                for (int v = 0; v < V; ++v) sums[r][v] = fma(factor, row[v], sums[r][v]);
            }
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
