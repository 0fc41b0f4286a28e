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
constexpr int kMostRows = 6, kRegisters = 16;
#elif defined(__ARM_NEON)
constexpr int kMostRows = 6, kRegisters = 32;
#else
constexpr int kMostRows = 4, kRegisters = 16;
#endif

struct Left {
    const float* data;
    int64_t stride;
};

// c[R, V vectors] (+)= left[R, inner] b[inner, V vectors]
template <int R, int V, bool kAdd, class T>
[[gnu::always_inline]] inline void product_tile(Left left, int64_t inner, const T* b, int64_t b_stride, float* c,
                                                int64_t c_stride) {
    vf sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = kAdd ? load(c + r * c_stride + v * kWidth) : vf{};
    for (int64_t k = 0; k < inner; ++k) {
        vf row[V];
        for (int v = 0; v < V; ++v) row[v] = load(b + k * b_stride + v * kWidth);
        for (int r = 0; r < R; ++r) {
            const vf factor = splat(left.data[r * left.stride + k]);
            for (int v = 0; v < V; ++v) sums[r][v] = fma(factor, row[v], sums[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * c_stride + v * kWidth, sums[r][v]);
}

template <int R, bool kAdd, class T>
void product_rows(Left left, int64_t inner, const T* b, int64_t b_stride, float* c, int64_t c_stride, int64_t columns) {
    constexpr int kWide = R * 4 + 5 <= kRegisters ? 4 : R * 2 + 3 <= kRegisters ? 2 : 1;
    int64_t at = 0;
    for (; at + kWide * kWidth <= columns; at += kWide * kWidth)
        product_tile<R, kWide, kAdd>(left, inner, b + at, b_stride, c + at, c_stride);
    if (kWide > 2 && at + 2 * kWidth <= columns) {
        product_tile<R, 2, kAdd>(left, inner, b + at, b_stride, c + at, c_stride);
        at += 2 * kWidth;
    }
    if (kWide > 1 && at < columns) product_tile<R, 1, kAdd>(left, inner, b + at, b_stride, c + at, c_stride);
}

// rows: 1 ... kMostRows; columns: whole vectors
template <bool kAdd, class T>
inline void product(int64_t rows, Left left, int64_t inner, const T* b, int64_t b_stride, float* c, int64_t c_stride,
                    int64_t columns) {
    using Function = void (*)(Left, int64_t, const T*, int64_t, float*, int64_t, int64_t);
    static constexpr Function kFunctions[] = {
        product_rows<1, kAdd, T>, product_rows<2, kAdd, T>, product_rows<3, kAdd, T>, product_rows<4, kAdd, T>,
#if defined(__AVX2__) || defined(__ARM_NEON)
        product_rows<5, kAdd, T>, product_rows<6, kAdd, T>,
#endif
#if defined(__AVX512F__)
        product_rows<7, kAdd, T>, product_rows<8, kAdd, T>,
#endif
    };
    kFunctions[rows - 1](left, inner, b, b_stride, c, c_stride, columns);
}

}  // namespace tiny_llm::TINY_ISA
