#include "quantized_matmul.h"

#include <math.h>

#include "activations.h"
#include "epilogue.h"

namespace tiny_llm::TINY_ISA {
namespace {

constexpr int kVectors = kTile / kWidth;  // registers that hold a tile's 16 outputs
constexpr int kLine = 64;                 // bytes
constexpr int kAhead = 1024;              // bytes ahead of use that a line is asked for

#if defined(__AVX512F__)
constexpr int kBlock = 12;  // rows that share one decoding of the weights: 12 sums and what a line needs, of 32 registers
constexpr int kExactBlock = 6;
#else
constexpr int kBlock = 4;
constexpr int kExactBlock = 2;
#endif

inline vu load_words(const uint8_t* p) {
    vu v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline vf load_any(const uint8_t* p, Kind kind, int64_t i) {
    if (kind == Kind::bf16) return load((const bf16*)p + i);
    if (kind == Kind::f16) return load((const f16*)p + i);
    return load((const float*)p + i);
}

// acc + the dot products of each lane's four unsigned bytes with four signed ones. kSmall: bytes are below 16.
template <bool kSmall>
inline vi dot4(vi acc, vu w, const int8_t* x) {
#if defined(__AVX512VNNI__)
    int32_t four;
    memcpy(&four, x, 4);
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
    int32_t four;
    memcpy(&four, x, 4);
    const __m256i xs = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
    // Pairs of full bytes overflow 16 bits; pairs of half bytes do not.
    const vu low = kSmall ? w : w & 0x0f0f0f0f;
    acc += (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)low, xs), ones);
    if (kSmall) return acc;
    const vu high = (w >> 4) & 0x0f0f0f0f;
    return acc + ((vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)high, xs), ones) << 4);
#else
    for (int j = 0; j < 4; ++j) acc += (vi)((w >> (8 * j)) & 0xff) * (int32_t)x[j];
    return acc;
#endif
}

// One group of a tile's dot products with R rows, exact.
template <int Bits, int R>
inline void dot_group(const uint8_t* line, int lines, const int8_t* x, int64_t stride, vi (&dot)[R][kVectors]) {
    for (int l = 0; l < lines; ++l, line += kLine, x += 32 / Bits) {
        __builtin_prefetch(line + kAhead);
        for (int v = 0; v < kVectors; ++v) {
            const vu words = load_words(line + v * 4 * kWidth);
            if constexpr (Bits == 4) {
                const vu low = words & 0x0f0f0f0f, high = (words >> 4) & 0x0f0f0f0f;
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r)
                    dot[r][v] = dot4<true>(dot4<true>(dot[r][v], low, x + r * stride), high, x + r * stride + 4);
            } else {
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) dot[r][v] = dot4<false>(dot[r][v], words, x + r * stride);
            }
        }
    }
}

// A tile times R rows of int8 activations: out [R][16].
template <int Bits, int R>
void multiply(const Matrix& m, const uint8_t* tile, const Activations& x, float* out) {
    vf y[R][kVectors] = {};
    const int64_t head = 2 * kTile * bits_of(m.scales) / 8;
    for (int64_t g = 0; g < x.groups; ++g, tile += group_bytes(m)) {
        vi dot[R][kVectors] = {};
        dot_group<Bits, R>(tile + head, m.group_size * Bits / 32, x.values + g * m.group_size, x.columns, dot);
        for (int v = 0; v < kVectors; ++v) {
            const vf scale = load_any(tile, m.scales, v * kWidth), bias = load_any(tile, m.scales, kTile + v * kWidth);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const vf scaled = __builtin_convertvector(dot[r][v], vf) * splat(x.scales[r * x.groups + g]);
                y[r][v] = fma(bias, splat(x.sums[r * x.groups + g]), fma(scaled, scale, y[r][v]));
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) store(out + r * kTile + v * kWidth, y[r][v]);
}

// One register of a tile times R rows of float activations. Four sums, since one would wait for itself.
template <int Bits, int R>
void multiply_exact(const Matrix& m, const uint8_t* tile, const Activations& x, float* out) {
    constexpr int kInputs = 32 / Bits;
    const int64_t head = 2 * kTile * bits_of(m.scales) / 8;
    for (int v = 0; v < kVectors; ++v) {
        vf y[R] = {};
        const uint8_t* at = tile;
        for (int64_t g = 0; g < x.groups; ++g, at += group_bytes(m)) {
            vf dot[R][4] = {};
            for (int k = 0; k < m.group_size; k += kInputs) {
                const vu words = load_words(at + head + k / kInputs * kLine + v * 4 * kWidth);
                const float* inputs = x.x + g * m.group_size + k;
#pragma GCC unroll 8
                for (int j = 0; j < kInputs; ++j) {
                    const vf q = __builtin_convertvector((vi)((words >> (j * Bits)) & ((1 << Bits) - 1)), vf);
#pragma GCC unroll 6
                    for (int r = 0; r < R; ++r) dot[r][j % 4] = fma(q, splat(inputs[r * x.columns + j]), dot[r][j % 4]);
                }
            }
            const vf scale = load_any(at, m.scales, v * kWidth), bias = load_any(at, m.scales, kTile + v * kWidth);
            for (int r = 0; r < R; ++r) {
                const vf total = (dot[r][0] + dot[r][1]) + (dot[r][2] + dot[r][3]);
                y[r] = fma(bias, splat(x.sums[r * x.groups + g]), fma(total, scale, y[r]));
            }
        }
        for (int r = 0; r < R; ++r) store(out + r * kTile + v * kWidth, y[r]);
    }
}

// Calls the kernel that is made for this number of rows, at most R.
template <int Bits, bool Exact, int R>
void multiply_rows(const Matrix& m, const uint8_t* tile, const Activations& x, int rows, float* out) {
    if constexpr (R > 1) {
        if (rows < R) return multiply_rows<Bits, Exact, R - 1>(m, tile, x, rows, out);
    }
    if constexpr (Exact) {
        multiply_exact<Bits, R>(m, tile, x, out);
    } else {
        multiply<Bits, R>(m, tile, x, out);
    }
}

void multiply_tile(const Matrix& m, int64_t index, const Activations& x, int rows, float* out) {
    const uint8_t* tile = (const uint8_t*)m.data + index * tile_bytes(m);
    if (m.exact && bits_of(m.kind) == 4) return multiply_rows<4, true, kExactBlock>(m, tile, x, rows, out);
    if (m.exact) return multiply_rows<8, true, kExactBlock>(m, tile, x, rows, out);
    if (bits_of(m.kind) == 4) return multiply_rows<4, false, kBlock>(m, tile, x, rows, out);
    multiply_rows<8, false, kBlock>(m, tile, x, rows, out);
}

// Tile `index` of matrix `at` (with its up tile, if gated) times all rows of x.
void run_tile(const Linear& a, int at, int64_t index, const Activations& x, int64_t first, int64_t rows) {
    float tile[kBlock * kTile], other[kBlock * kTile];
    const int block = a.matrices[at].exact ? kExactBlock : kBlock;
    for (int64_t row = 0; row < rows; row += block) {
        const int count = rows - row < block ? (int)(rows - row) : block;
        multiply_tile(a.matrices[at], index, x.from(row), count, tile);
        if (a.gated) multiply_tile(a.matrices[1], index, x.from(row), count, other);
        finish_tile(a, at, index, first + row, count, tile, other);
    }
}

// Rows few enough for x to stay in cache while all tiles pass by. Matrices [begin, end) read x alike.
void run_rows(const Linear& a, int begin, int end, int64_t first, int64_t rows) {
    const Matrix& m = a.matrices[begin];
    const Activations x = read_activations(a.x + first * m.columns, rows, m.columns, m.group_size, bits_of(m.kind), m.exact);
    int64_t count = 0;
    for (int i = begin; i < end; ++i) count += tiles(a.matrices[i]);
    const int64_t work = tile_bytes(m) * (a.gated ? 2 : 1) * (1 + rows / 4);
    parallel_for(count, 1 + 65536 / work, [&](int64_t from, int64_t to) {
        for (int64_t tile = from; tile < to; ++tile) {
            int at = begin;
            int64_t index = tile;
            while (index >= tiles(a.matrices[at])) index -= tiles(a.matrices[at++]);
            run_tile(a, at, index, x, first, rows);
        }
    });
}

}  // namespace

void quantized_matmul(const Linear& a) {
    constexpr int64_t kCache = 512 * 1024;  // bytes
    const int64_t row_bytes = a.matrices[0].columns * (a.matrices[0].exact ? 4 : 1);
    const int64_t most = kCache / row_bytes / kBlock * kBlock;
    const int64_t chunk = most > kBlock ? most : kBlock;
    for (int64_t first = 0; first < a.rows; first += chunk) {
        const int64_t rows = a.rows - first < chunk ? a.rows - first : chunk;
        for (int begin = 0, end = 0; begin < (a.gated ? 1 : a.count); begin = end) {
            // Another width of weights wants the nibbles' order of x otherwise.
            while (end < a.count && a.matrices[end].kind == a.matrices[begin].kind) ++end;
            run_rows(a, begin, a.gated ? 1 : end, first, rows);
        }
    }
}

}  // namespace tiny_llm::TINY_ISA
