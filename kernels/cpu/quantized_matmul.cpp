#include "quantized_matmul.h"

#include "epilogue.h"
#include "exact_dot.h"
#include "groups.h"
#include "int8_dot.h"
#include "tile_matmul.h"

namespace tiny_llm::TINY_ISA {
namespace {

constexpr int kExactRows = kWidth == 4 ? 2 : 6, kBlockRows = kMostRows < kExactRows ? kExactRows : kMostRows;

// W registers of a tile's outputs, from number v on, times R rows of int8: to out [R][16].
template <Kind K, int R, int W>
void multiply(const char* tile, const Groups& groups, const Block& x, int v, float* out) {
    vf y[R][W] = {};
    const char* line = tile + groups.lines() + v * 4 * kWidth;
    const int32_t* words = x.words;
    for (int64_t g = 0; g < groups.count; ++g, line += groups.bytes, tile += groups.bytes) {
        vi dot[R][W] = {};
        ask_ahead<R>(tile), ask_ahead<R>(tile + kLine);  // scales and biases, which float32 fills two lines with
        dot_group<K, R, W>(line, groups.size, words, dot);
        words += words_of(groups.size) * R;
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
            const vf scale = load_any(tile, groups.scales, (v + w) * kWidth);
            const vf bias = load_any(tile, groups.scales, kTile + (v + w) * kWidth);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const vf scaled = __builtin_convertvector(dot[r][w], vf) * splat(x.scales[g * R + r]);
                y[r][w] = fma(bias, splat(x.sums[g * R + r]), fma(scaled, scale, y[r][w]));
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) store(out + r * kTile + (v + w) * kWidth, y[r][w]);
}

template <Kind K, int R>
void multiply_exact(const char* tile, const Groups& groups, const Block& x, int v, float* out) {
    vf y[R] = {};
    const char* line = tile + groups.lines() + v * 4 * kWidth;
    for (int64_t g = 0; g < groups.count; ++g, line += groups.bytes, tile += groups.bytes) {
        vf dot[R];
        exact_group<K, R>(line, groups.size, x.values + g * groups.size * R, dot);
        const vf scale = load_any(tile, groups.scales, v * kWidth);
        const vf bias = load_any(tile, groups.scales, kTile + v * kWidth);
        for (int r = 0; r < R; ++r) y[r] = fma(bias, splat(x.sums[g * R + r]), fma(dot[r], scale, y[r]));
    }
    for (int r = 0; r < R; ++r) store(out + r * kTile + v * kWidth, y[r]);
}

// Calls the kernel that is made for the block's number of rows, at most R.
template <Kind K, bool Exact, int R>
void multiply_rows(const char* tile, const Groups& groups, const Block& x, float* out) {
    if constexpr (R > 1) {
        if (x.rows < R) return multiply_rows<K, Exact, R - 1>(tile, groups, x, out);
    }
    constexpr int W = Exact ? 1 : vectors_at_once(R);
    for (int v = 0; v < kTile / kWidth; v += W) {
        if constexpr (Exact) {
            multiply_exact<K, R>(tile, groups, x, v, out);
        } else {
            multiply<K, R, W>(tile, groups, x, v, out);
        }
    }
}

void multiply_tile(const Matrix& m, const Groups& groups, const char* tile, const Block& x, float* out) {
    if (m.exact && m.kind == Kind::q4) return multiply_rows<Kind::q4, true, kExactRows>(tile, groups, x, out);
    if (m.exact) return multiply_rows<Kind::q8, true, kExactRows>(tile, groups, x, out);
    if (m.kind == Kind::q4) return multiply_rows<Kind::q4, false, kMostRows>(tile, groups, x, out);
    multiply_rows<Kind::q8, false, kMostRows>(tile, groups, x, out);
}

// Tile `index` of matrix `at` (with its up tile, if gated) times blocks [begin, end) of x.
void run_tile(const Linear& a, int at, int64_t expert, int64_t index, const Activations& x, int64_t begin, int64_t end) {
    float tile[kBlockRows * kTile], other[kBlockRows * kTile];
    const Matrix &m = a.matrices[at], &other_m = a.matrices[a.gated ? 1 : at];
    const Groups groups = groups_of(m, x.groups), up = groups_of(other_m, x.groups);
    const char *from = tile_of(m, expert, index), *up_from = tile_of(other_m, expert, index);
    for (int64_t b = begin; b < end; ++b) {
        const Block block = x.block(b);
        multiply_tile(m, groups, from, block, tile);
        if (a.gated) multiply_tile(other_m, up, up_from, block, other);
        finish_tile(a, at, index, block.first, block.rows, tile, other);
    }
}

}  // namespace

void quantized_matmul(const Linear& a) {
    const Matrix& m = a.matrices[0];
    if (a.rows == 0) return;
#if defined(TINY_ARM_SETS) && !defined(__ARM_FEATURE_DOTPROD)
    if (isa() == Isa::i8mm) return i8mm::quantized_matmul(a);
    if (isa() == Isa::dotprod) return dotprod::quantized_matmul(a);
#elif defined(__AVX512VNNI__)
    const int64_t together = a.parts ? a.rows / a.part_count : a.rows;  // rows that meet a weight
    if (isa() == Isa::amx && together >= kRowsForTiles && !m.exact) return amx::tile_matmul(a);
#if !defined(__AVX512BF16__)
    if (isa() == Isa::avx512bf16) return avx512bf16::quantized_matmul(a);
#endif
#endif
    const Activations x = read_activations(a, m.exact ? Order::floats : Order::words, m.exact ? kExactRows : kMostRows);
    for_each_tile(a, x, [&](const auto& each) {
        each([&](int at, int64_t expert, int64_t index, int64_t begin, int64_t end) {
            run_tile(a, at, expert, index, x, begin, end);
        });
    });
}

}  // namespace tiny_llm::TINY_ISA
