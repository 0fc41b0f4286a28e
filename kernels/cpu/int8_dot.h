// Dot products of packed weights with int8 activations, exact in int32. Kernel files only.
//
// dot_group adds one group of W registers of a tile's outputs times R rows: `line` is the group's first 64-byte
// line, at these outputs, and `x` its words, [word][R].
#pragma once

#include "activations.h"
#include "ahead.h"
#include "matrix.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {

static inline vu load_words(const char* p) {
    vu v;
    memcpy(&v, p, sizeof v);
    return v;
}

#if defined(__AVX512VNNI__)

constexpr int kMostRows = 12;  // with as many sums and totals and what a line needs, of 32 registers
constexpr int vectors_at_once(int) { return 1; }

static inline vi dot4(vi sum, vu weights, int32_t x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(x));
}

template <Kind K, int R, int W>
static inline void dot_group(const char* line, int group, const int32_t* x, vi (&dot)[R][W]) {
    constexpr int kWords = K == Kind::q4 ? 2 : 1;  // of x a line
    // Where registers suffice, lines go in pairs, and each product of a pair has a sum of its own: none waits for another.
    constexpr int kLines = R < 5 ? 2 : 1, kSums = R < 5 ? kLines * kWords : 1;
    vi sums[kSums][R] = {};
    for (int k = 0; k < group; k += 4 * kWords * kLines)
#pragma GCC unroll 2
        for (int l = 0; l < kLines; ++l, line += kLine, x += kWords * R) {
            ask_ahead<R>(line);
            const vu words = load_words(line);
            const vu low = K == Kind::q4 ? words & 0x0f0f0f0f : words, high = (words >> 4) & 0x0f0f0f0f;
            vi(&first)[R] = sums[l * kWords % kSums], (&second)[R] = sums[(l * kWords + 1) % kSums];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) first[r] = dot4(first[r], low, x[r]);
            if constexpr (K == Kind::q4) {
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) second[r] = dot4(second[r], high, x[R + r]);
            }
        }
#pragma GCC unroll 4
    for (const auto& some : sums)
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) dot[r][0] += some[r];
}

#elif defined(__AVX2__)

constexpr int kMostRows = 4;  // with as many sums of two registers of outputs, and what a line needs
constexpr int vectors_at_once(int) { return 2; }

// Pairs of products of half bytes, in 16 bits. Sixteen such sums may be too much for those, but would fit if each weight
// had 8 less: so a sum begins with what that takes off (activations.h), and what passes 16 bits meanwhile comes back.
static inline __m256i dot2(__m256i sum, vu weights, __m256i x) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16((__m256i)weights, x));
    asm("" : "+x"(sum));  // GCC would put off all additions, and run out of registers
    return sum;
}
static inline vi widen(__m256i pairs, int16_t factor) {
    return (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(factor));
}
static inline __m256i word_of(const int32_t* x) { return _mm256_set1_epi32(*x); }

// 32 inputs: four lines of W registers, times R rows' eight words of x.
template <int R, int W>
[[gnu::always_inline]] inline void dot_q4_lines(const char* line, const int32_t* x, __m256i (&sums)[R][W]) {
    for (int l = 0; l < 4; ++l, line += kLine, x += 2 * R) {
        ask_ahead<R>(line);
        vu low[W], high[W];
        for (int w = 0; w < W; ++w) {
            const vu words = load_words(line + w * 4 * kWidth);
            low[w] = words & 0x0f0f0f0f, high[w] = (words >> 4) & 0x0f0f0f0f;
        }
        for (int r = 0; r < R; ++r) {
            const __m256i first = word_of(x + r), second = word_of(x + R + r);
            for (int w = 0; w < W; ++w) sums[r][w] = dot2(dot2(sums[r][w], low[w], first), high[w], second);
        }
    }
}

// The same for eight lines of one register.
template <int R>
[[gnu::always_inline]] inline void dot_q8_lines(const char* line, const int32_t* x, bool asks, __m256i (&lows)[R],
                                                __m256i (&highs)[R]) {
    for (int l = 0; l < 8; ++l, line += kLine, x += R) {
        if (asks) ask_ahead<R>(line);
        const vu words = load_words(line), low = words & 0x0f0f0f0f, high = (words >> 4) & 0x0f0f0f0f;
        for (int r = 0; r < R; ++r) {
            const __m256i word = word_of(x + r);
            lows[r] = dot2(lows[r], low, word), highs[r] = dot2(highs[r], high, word);
        }
    }
}

// One piece of a group.
template <Kind K, int R, int W>
[[gnu::always_inline]] inline void dot_piece(const char* line, int piece, const int32_t* x, vi (&dot)[R][W]) {
    const int32_t *totals = x + R, *words = x + kLead * R;
    if constexpr (K == Kind::q4) {
        __m256i sums[R][W];
        for (int r = 0; r < R; ++r)
            for (int w = 0; w < W; ++w) sums[r][w] = word_of(x + r);
#pragma GCC unroll 1
        for (int k = 0; k < piece; k += 32) dot_q4_lines(line + k / 8 * kLine, words + k / 4 * R, sums);
        for (int r = 0; r < R; ++r)
            for (int w = 0; w < W; ++w) dot[r][w] = widen(sums[r][w], 1) + totals[r];
    } else {
        for (int w = 0; w < W; ++w) {
            __m256i lows[R], highs[R];
            for (int r = 0; r < R; ++r) lows[r] = highs[r] = word_of(x + r);
            for (int k = 0; k < piece; k += 32)
                dot_q8_lines(line + k / 4 * kLine + w * 4 * kWidth, words + k / 4 * R, w == 0, lows, highs);
            for (int r = 0; r < R; ++r) dot[r][w] = widen(lows[r], 1) + widen(highs[r], 16) + 17 * totals[r];
        }
    }
}

template <Kind K, int R, int W>
[[gnu::always_inline]] inline void dot_group(const char* line, int group, const int32_t* x, vi (&dot)[R][W]) {
    constexpr int kLines = K == Kind::q4 ? 8 : 16;  // of 64 inputs
    dot_piece<K, R, W>(line, piece_of(group), x, dot);
    if (group <= 64) return;
    vi more[R][W];
    dot_piece<K, R, W>(line + kLines * kLine, 64, x + words_of(64) * R, more);
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) dot[r][w] += more[r][w];
}

#else

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kMostRows = 8;
#else
constexpr int kMostRows = 4;
#endif
#if defined(__ARM_NEON)  // 32 registers; of totals, what finds no room is fetched and put back once a group
constexpr int vectors_at_once(int rows) { return rows > 6 ? 2 : 4; }
#else
constexpr int vectors_at_once(int rows) { return rows > 2 ? 1 : 2; }
#endif

// Weights of K bits.
template <Kind K>
static inline vi dot4(vi sum, vu weights, int32_t x) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return (vi)vusdotq_s32((int32x4_t)sum, (uint8x16_t)weights, vreinterpretq_s8_s32(vdupq_n_s32(x)));
#elif defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t words = vreinterpretq_s8_s32(vdupq_n_s32(x));
    if (K == Kind::q4) return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)weights, words);
    // A weight of 8 bits is 128, as 127 and 1, and what with its upper bit turned over is a number with a sign.
    const int32x4_t most = vdotq_s32(vdotq_s32((int32x4_t)sum, words, vdupq_n_s8(127)), words, vdupq_n_s8(1));
    return (vi)vdotq_s32(most, (int8x16_t)(weights ^ 0x80808080), words);
#elif defined(__SSE2__)
    const __m128i all = _mm_set1_epi32(x), even = _mm_srai_epi16(_mm_slli_epi16(all, 8), 8);
    sum += (vi)_mm_madd_epi16((__m128i)(weights & 0x00ff00ff), even);
    return sum + (vi)_mm_madd_epi16((__m128i)((weights >> 8) & 0x00ff00ff), _mm_srai_epi16(all, 8));
#else
    for (int j = 0; j < 4; ++j) sum += (vi)((weights >> (8 * j)) & 0xff) * (int32_t)(int8_t)(x >> (8 * j));
    return sum;
#endif
}

// The upper half of each byte. Words moved by four bits would bring some of the next byte's with them.
static inline vu high_halves(vu words) {
    typedef uint8_t Halves __attribute__((vector_size(sizeof(vu))));
    return (vu)((Halves)words >> 4);
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

// One instruction multiplies two outputs by two rows, [output][8 inputs] by [row][8 inputs], into [output][row].
static inline vi dot8(vi sum, vu weights, vi x) {
    return (vi)vusmmlaq_s32((int32x4_t)sum, (uint8x16_t)weights, (int8x16_t)x);
}

// Two of R rows' next two words.
template <int R>
static inline vi two_rows(const int32_t* x) {
    typedef int32_t Two __attribute__((vector_size(8)));
    Two low, high;
    memcpy(&low, x, sizeof low), memcpy(&high, x + R, sizeof high);
    return __builtin_shufflevector(low, high, 0, 2, 1, 3);
}

// R rows in pairs; where R is odd, the last row but one is in two of them.
template <Kind K, int R, int W>
static inline void dot_pairs(const char* line, int group, const int32_t* x, vi (&dot)[R][W]) {
    constexpr int kPairs = (R + 1) / 2, kLines = K == Kind::q4 ? 1 : 2;  // of 8 inputs
    constexpr auto row_of = [](int pair) { return 2 * pair + 1 < R ? 2 * pair : R - 2; };
    vi front[kPairs][W] = {}, back[kPairs][W] = {};  // of the first two outputs of a register, and of the others
    for (int k = 0; k < group; k += 8, line += kLines * kLine, x += 2 * R) {
        for (int l = 0; l < kLines; ++l) ask_ahead<R>(line + l * kLine);
        vi rows[kPairs];
        for (int p = 0; p < kPairs; ++p) rows[p] = two_rows<R>(x + row_of(p));
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            const vu words = load_words(line + w * 4 * kWidth);
            const vu low = K == Kind::q4 ? words & 0x0f0f0f0f : words;
            const vu high = K == Kind::q4 ? high_halves(words) : load_words(line + kLine + w * 4 * kWidth);
            const vu first = __builtin_shufflevector(low, high, 0, 4, 1, 5);
            const vu second = __builtin_shufflevector(low, high, 2, 6, 3, 7);
#pragma GCC unroll 4
            for (int p = 0; p < kPairs; ++p) {
                front[p][w] = dot8(front[p][w], first, rows[p]);
                back[p][w] = dot8(back[p][w], second, rows[p]);
            }
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            dot[row_of(p)][w] = __builtin_shufflevector(front[p][w], back[p][w], 0, 2, 4, 6);
            dot[row_of(p) + 1][w] = __builtin_shufflevector(front[p][w], back[p][w], 1, 3, 5, 7);
        }
}

#endif

template <Kind K, int R, int W>
static inline void dot_group(const char* line, int group, const int32_t* x, vi (&dot)[R][W]) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    if constexpr (R > 1) return dot_pairs<K>(line, group, x, dot);
#endif
    constexpr int kWords = K == Kind::q4 ? 2 : 1;
    for (int k = 0; k < group; k += 4 * kWords, line += kLine, x += kWords * R) {
        ask_ahead<R>(line);
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            const vu words = load_words(line + w * 4 * kWidth);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                if constexpr (K == Kind::q4) {
                    dot[r][w] = dot4<K>(dot[r][w], words & 0x0f0f0f0f, x[r]);
                    dot[r][w] = dot4<K>(dot[r][w], high_halves(words), x[R + r]);
                } else {
                    dot[r][w] = dot4<K>(dot[r][w], words, x[r]);
                }
            }
        }
    }
}

#endif

}  // namespace tiny_llm::TINY_ISA
