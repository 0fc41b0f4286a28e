// The rows of x as the quantized kernels read them. Owns rounding to int8 and the order in memory. Kernel files only.
//
// Rows go in even blocks. A block of R rows is in one of these orders:
//   words   [k / 4][R]  four int8 of a row; within each 8 inputs k = 0 2 4 6, then 1 3 5 7 (matrix.h);
//                       with kLead more [kLead][R] before each piece of a group
//   tiles   [piece][L][k / 4]  the same for tile registers: a row's 64 inputs (or a group of 32) beside the next row's,
//                       L rows in each block, the missing ones 0; blocks are of 16 rows and a rest
//   floats  [k][R]      in their place, where activations are exact
// and with it are scales and sums [group][R], for tiles [group][L].
// A row's numbers depend on that row alone.
#pragma once

#include <math.h>

#include "matrix.h"
#include "pool.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {

enum class Order : uint8_t { words, tiles, floats };

constexpr int kPartsSlot = 3;

// Before the words of each 64 inputs of a row, or of a group of fewer, are so many more: -8 times the sum of each
// word's first two inputs and of its last two, in 16 bits each; and 8 times the sum of all.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr int kLead = 2;
#else
constexpr int kLead = 0;
#endif
constexpr int piece_of(int group) { return group < 64 ? group : 64; }
constexpr int words_of(int group) { return group / 4 + group / piece_of(group) * kLead; }

struct Block {
    const int32_t* words;
    const float* values;
    const float* scales;  // x = scale * int8; NaN for a group with a number that is not finite
    const float* sums;    // of a group's x, as they are after rounding
    int64_t first;        // row
    int rows;             // R
};

struct Activations {
    int64_t rows, columns, groups, blocks;
    int64_t stride;  // bytes of a row's values
    char* values;
    float* scales;
    float* sums;
    Order order;
    int lanes;             // L of tiles, else 0
    int64_t* starts;       // of parts: the first row of each block, and where the last one ends
    int64_t* part_blocks;  // the same of each part's blocks

    // The first row of block b. One row's work is so little that divisions show: they take 20 ns on older machines.
    int64_t begin(int64_t b) const {
        return starts ? starts[b] : b == 0 ? 0 : b == blocks ? rows : lanes ? b * lanes : rows * b / blocks;
    }
    Block block(int64_t b) const {
        const int64_t first = begin(b), place = lanes ? b * lanes : first, part = place * groups;
        const int count = (int)(begin(b + 1) - first);
        const char* at = values + place * stride;
        return {(const int32_t*)at, (const float*)at, scales + part, sums + part, first, count};
    }
};

typedef int8_t Bytes __attribute__((vector_size(16)));

// Sixteen integers of at most 127 in size as bytes; what GCC makes of a conversion takes four times as long.
static inline Bytes narrow(const vi* integers) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)integers[0]);
#elif defined(__SSE2__)
    __m128i part[4];
    memcpy(part, integers, sizeof part);
    return (Bytes)_mm_packs_epi16(_mm_packs_epi32(part[0], part[1]), _mm_packs_epi32(part[2], part[3]));
#else
    Bytes bytes;
    for (int i = 0; i < 16; ++i) bytes[i] = (int8_t)integers[i / kWidth][i % kWidth];
    return bytes;
#endif
}

// In the kernels' order, as four words.
static inline void store_bytes(int32_t* to, Bytes bytes) {
    bytes = __builtin_shufflevector(bytes, bytes, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    memcpy(to, &bytes, 16);
}

static inline float largest_size(const float* x, int count) {
    vi largest = {};
    for (int i = 0; i < count; i += kWidth) {
        const vi bits = (vi)load(x + i) & 0x7fffffff;  // sizes order as integers do, NaN above all
        largest = bits > largest ? bits : largest;
    }
    const int32_t most = max_of(largest);
    float size;
    memcpy(&size, &most, 4);
    return size;
}

// Fills in what lies before the words of each piece of a group.
static inline void lead_pieces([[maybe_unused]] int32_t* words, [[maybe_unused]] int group) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    for (int piece = piece_of(group), k = 0; k < group; k += piece, words += kLead + piece / 4) {
        __m256i pairs = {};
        for (int i = 0; i < piece / 4; i += 8) {
            const __m256i eight = _mm256_loadu_si256((const __m256i*)(words + kLead + i));
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(_mm256_set1_epi8(1), eight));
        }
        __m128i sum = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        sum = _mm_add_epi16(sum, _mm_unpackhi_epi64(sum, sum));
        sum = _mm_slli_epi16(_mm_add_epi16(sum, _mm_srli_epi64(sum, 32)), 3);
        words[0] = _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), sum));
        words[1] = _mm_cvtsi128_si32(_mm_madd_epi16(sum, _mm_set1_epi16(1)));
    }
#endif
}

// One group of a row: x = scale * bytes, each to nearest. Sizes below 1e-30 count as 0.
static inline void round_group(const float* x, int group, int32_t* words, float* scale, float* sum) {
    const float size = largest_size(x, group);
    const bool finite = size <= 3.4028235e38f;
    const float inverse = finite && size > 1e-30f ? 127.0f / size : 0.0f;
    vi total = {};
    for (int i = 0; i < group; i += 16) {
        vi integers[16 / kWidth];
        for (int v = 0; v < 16 / kWidth; ++v) {
            const vf scaled = finite ? load(x + i + v * kWidth) * splat(inverse) : vf{};
            // 1.5 * 2^23 more, and the low bits are the nearest integer.
            integers[v] = (vi)(scaled + splat(12582912.0f)) - 0x4b400000;
            total += integers[v];
        }
        store_bytes(words + i / 4 + (i / piece_of(group) + 1) * kLead, narrow(integers));
    }
    lead_pieces(words, group);
    *scale = finite ? size / 127.0f : (float)NAN;
    *sum = *scale * (float)sum_of(total);
}

// Item `from[i]` of row r goes to to[i][r].
template <class T>
static inline void interleave(const T* from, int count, int rows, T* to) {
    if (rows == 1) {
        memcpy(to, from, count * sizeof(T));
        return;
    }
    for (int i = 0; i < count; ++i) to[(int64_t)i * rows] = from[i];
}

// Group g of all rows of a block: `group` inputs each.
static inline void read_group(const Linear& all, const Activations& a, const Block& to, int64_t g, int group) {
    static constexpr float kNothing[128] = {};
    const int lanes = a.lanes ? a.lanes : to.rows;
    for (int r = 0; r < lanes; ++r) {
        const float* x = r < to.rows ? all.x + source_of(all, to.first + r) * a.columns + g * group : kNothing;
        const int64_t part = g * lanes + r;
        if (a.order == Order::floats) {
            vf total = {};
            for (int i = 0; i < group; i += kWidth) total += load(x + i);
            const_cast<float*>(to.sums)[part] = sum(total);
            interleave(x, group, to.rows, const_cast<float*>(to.values) + g * group * to.rows + r);
        } else {
            int32_t words[words_of(128)];
            round_group(x, group, words, const_cast<float*>(to.scales) + part, const_cast<float*>(to.sums) + part);
            int32_t* const all = const_cast<int32_t*>(to.words);
            if (a.order == Order::tiles) {
                for (int piece = piece_of(group), k = 0; k < group; k += piece)
                    memcpy(all + ((g * group + k) * lanes + r * piece) / 4, words + k / 4 + (k / piece + 1) * kLead, piece);
            } else {
                const int count = words_of(group);
                interleave(words, count, to.rows, all + g * count * to.rows + r);
            }
        }
    }
}

// No block has rows of two parts.
static inline void cut_parts(const Linear& all, Activations& a, int most) {
    a.starts = (int64_t*)scratch(kPartsSlot, (all.rows + all.part_count + 2) * sizeof(int64_t));
    a.part_blocks = a.starts + all.rows + 1;
    a.blocks = 0;
    for (int64_t p = 0; p < all.part_count; ++p) {
        const Part& part = all.parts[p];
        const int64_t count = (part.rows + most - 1) / most;
        a.part_blocks[p] = a.blocks;
        for (int64_t b = 0; b < count; ++b) a.starts[a.blocks++] = part.first + (a.lanes ? b * most : part.rows * b / count);
    }
    a.part_blocks[all.part_count] = a.blocks;
    a.starts[a.blocks] = all.rows;
}

// Reads all rows of x for matrices like the first one, in blocks of at most `most` rows. The result lies in this
// thread's scratch.
static inline Activations read_activations(const Linear& all, Order order, int most) {
    const int64_t rows = all.rows, columns = all.matrices[0].columns;
    const int group = all.matrices[0].group_size;
    const int64_t groups = columns / group, words = order == Order::words ? groups * words_of(group) : columns / 4;
    const int64_t stride = order == Order::floats ? columns * 4 : words * 4;
    const int lanes = order != Order::tiles ? 0 : rows < most ? (int)(rows + 3) / 4 * 4 : most;
    Activations a{rows,    columns, groups, (rows + most - 1) / most, stride, nullptr, nullptr, nullptr, order, lanes,
                  nullptr, nullptr};
    if (all.parts) cut_parts(all, a, most);
    const int64_t places = lanes ? a.blocks * lanes : rows;
    const size_t bytes = (size_t)(places * stride + 63) / 64 * 64;
    a.values = (char*)scratch(0, bytes + 2 * sizeof(float) * places * a.groups);
    a.scales = (float*)(a.values + bytes);
    a.sums = a.scales + places * a.groups;
    constexpr int64_t kGrain = 8192;  // values that are worth another thread
    const int64_t grain = 1 + kGrain / (group * (rows < most ? rows + 1 : most));
    parallel_for(a.blocks * a.groups, grain, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin / a.groups; b * a.groups < end; ++b) {
            const int64_t first = b * a.groups, past = end - first < a.groups ? end - first : a.groups;
            const Block block = a.block(b);
            for (int64_t g = begin > first ? begin - first : 0; g < past; ++g) read_group(all, a, block, g, group);
        }
    });
    return a;
}

}  // namespace tiny_llm::TINY_ISA
