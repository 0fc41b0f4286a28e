// Dot products of packed weights with float activations, one fma an input. Kernel files only.
#pragma once

#include "matrix.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {

constexpr int kChains = 4;  // sums a row, input k in number k % 4: one sum alone would wait for itself

template <Kind K>
static inline vf weight_at(vu words, int i) {
    if constexpr (K == Kind::q8) return __builtin_convertvector((vi)((words >> (8 * i)) & 0xff), vf);
#if defined(__AVX512F__)
    // A permutation looks at an index's low four bits only: no mask and no conversion.
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (vf)_mm512_permutexvar_ps((__m512i)(words >> (4 * i)), table);
#else
    return __builtin_convertvector((vi)((words >> (4 * i)) & 0xf), vf);
#endif
}

// Adds the 8 inputs of a q4 line, or of two q8 lines, of one register of outputs times R rows; x is [8][R].
template <Kind K, int R>
static inline void multiply_octet(const char* line, const float* x, vf (&sums)[R][kChains]) {
    vu words[2];
    memcpy(&words[0], line, sizeof(vu));
    if (K == Kind::q8) memcpy(&words[1], line + kLine, sizeof(vu));
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
        const vf w = K == Kind::q4 ? weight_at<K>(words[0], k) : weight_at<K>(words[k % 2], k / 2);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) sums[r][k % kChains] = fma(w, splat(x[k * R + r]), sums[r][k % kChains]);
    }
}

// One group of one register of a tile's outputs times R rows, as one number each.
template <Kind K, int R>
static inline void exact_group(const char* line, int group, const float* x, vf (&dot)[R]) {
    vf sums[R][kChains] = {};
    constexpr int kLines = K == Kind::q4 ? 1 : 2;
    for (int k = 0; k < group; k += 8, line += kLines * kLine, x += 8 * R) multiply_octet<K, R>(line, x, sums);
    for (int r = 0; r < R; ++r) dot[r] = (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]);
}

}  // namespace tiny_llm::TINY_ISA
