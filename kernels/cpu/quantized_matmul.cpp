#include "quantized_matmul.h"

#include "activations.h"
#include "epilogue.h"
#include "exact_dot.h"
#include "int8_dot.h"

namespace tiny_llm::TINY_ISA {
namespace {

constexpr int kExactRows = kMostRows < 6 ? 2 : 6;

// Registers of outputs that a kernel of R rows takes at a time: all of a tile's, if there are registers enough.
constexpr int vectors_at_once(int rows) { return kWidth == kTile || rows > 2 ? 1 : 2; }

struct Groups {
    int64_t count, bytes;  // of a tile; of one group
    int size;              // inputs
    Kind scales;
};

inline vf load_any(const char* p, Kind kind, int64_t i) {
    if (kind == Kind::bf16) return load((const bf16*)p + i);
    if (kind == Kind::f16) return load((const f16*)p + i);
    return load((const float*)p + i);
}

// W registers of a tile's outputs, from number v on, times R rows of int8: to out [R][16].
template <Kind K, int R, int W>
void multiply(const char* tile, const Groups& groups, const Block& x, int v, float* out) {
    vf y[R][W];
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) y[r][w] = vf{};
    const char* line = tile + 2 * kTile * bits_of(groups.scales) / 8 + v * 4 * kWidth;
    const int32_t* words = x.words;
    for (int64_t g = 0; g < groups.count; ++g, line += groups.bytes, tile += groups.bytes) {
        vi dot[R][W] = {};
        dot_group<K, R, W>(line, groups.size, words, dot);
        words += groups.size / 4 * R;
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
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) store(out + r * kTile + (v + w) * kWidth, y[r][w]);
}

template <Kind K, int R>
void multiply_exact(const char* tile, const Groups& groups, const Block& x, int v, float* out) {
    vf y[R] = {};
    const char* line = tile + 2 * kTile * bits_of(groups.scales) / 8 + v * 4 * kWidth;
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

void multiply_tile(const Matrix& m, const Groups& groups, int64_t index, const Block& x, float* out) {
    const char* tile = m.data + index * groups.count * groups.bytes;
    if (m.exact && m.kind == Kind::q4) return multiply_rows<Kind::q4, true, kExactRows>(tile, groups, x, out);
    if (m.exact) return multiply_rows<Kind::q8, true, kExactRows>(tile, groups, x, out);
    if (m.kind == Kind::q4) return multiply_rows<Kind::q4, false, kMostRows>(tile, groups, x, out);
    multiply_rows<Kind::q8, false, kMostRows>(tile, groups, x, out);
}

Groups groups_of(const Matrix& m) {
    return {m.columns / m.group_size, group_bytes(m), m.group_size, m.scales};
}

// Tile `index` of matrix `at` (with its up tile, if gated) times blocks [begin, end) of x.
void run_tile(const Linear& a, int at, int64_t index, const Activations& x, int64_t begin, int64_t end) {
    float tile[kMostRows * kTile], other[kMostRows * kTile];
    const Groups groups = groups_of(a.matrices[at]), up = groups_of(a.matrices[a.gated ? 1 : at]);
    for (int64_t b = begin; b < end; ++b) {
        const Block block = x.block(b);
        multiply_tile(a.matrices[at], groups, index, block, tile);
        if (a.gated) multiply_tile(a.matrices[1], up, index, block, other);
        finish_tile(a, at, index, block.first, block.rows, tile, other);
    }
}

}  // namespace

void quantized_matmul(const Linear& a) {
    constexpr int64_t kCache = 256 * 1024;   // bytes of x that stay near while tiles pass by
    constexpr int64_t kStep = 64 * 1024;     // bytes of weights that one row takes at a time
    const Matrix& m = a.matrices[0];
    if (a.rows == 0) return;
    const Activations x = read_activations(a.x, a.rows, m.columns, m.group_size, m.exact, m.exact ? kExactRows : kMostRows);
    const int64_t block_bytes = m.columns * (m.exact ? 4 : 1) * a.rows / x.blocks;
    const int64_t some = kCache / block_bytes > 1 ? kCache / block_bytes : 1, chunks = (x.blocks + some - 1) / some;
    int64_t count = 0;
    for (int i = 0; i < (a.gated ? 1 : a.count); ++i) count += tiles(a.matrices[i]);
    const int64_t work = tile_bytes(m) * (a.gated ? 2 : 1) * (1 + a.rows / chunks / 4);
    parallel_for(count * chunks, 1 + kStep / work, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const int64_t chunk = i / count;
            int64_t index = i % count;
            int at = 0;
            while (index >= tiles(a.matrices[at])) index -= tiles(a.matrices[at++]);
            run_tile(a, at, index, x, x.blocks * chunk / chunks, x.blocks * (chunk + 1) / chunks);
        }
    });
}

}  // namespace tiny_llm::TINY_ISA
