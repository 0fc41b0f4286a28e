#include "tile_matmul.h"

#include "amx.h"
#include "epilogue.h"
#include "groups.h"

namespace tiny_llm::TINY_ISA {
namespace {

constexpr int kWeightSlot = 1, kUpSlot = 2;

// A tile of outputs, as tile registers take it.
struct Weights {
    const char* lines;   // of the first group
    int64_t stride;      // bytes from a group's lines to the next one's
    const char* scales;  // of the first group; they lie groups.bytes apart
    Groups groups;
};

// Halves of bytes become bytes, once for all rows.
const char* widen(const char* tile, const Groups& groups, int slot) {
    char* const all = (char*)scratch(slot, groups.count * groups.size * kTile);
    char* to = all;
    for (int64_t g = 0; g < groups.count; ++g, tile += groups.bytes) {
        const char* line = tile + groups.lines();
        for (int k = 0; k < groups.size; k += 8, line += kLine, to += 2 * kLine)
            for (int v = 0; v < kLine; v += 4 * kWidth) {
                vu words;
                memcpy(&words, line + v, sizeof words);
                const vu low = words & 0x0f0f0f0f, high = (words >> 4) & 0x0f0f0f0f;
                memcpy(to + v, &low, sizeof low);
                memcpy(to + kLine + v, &high, sizeof high);
            }
    }
    return all;
}

Weights weights_of(const Matrix& m, int64_t expert, int64_t index, int64_t count, int slot) {
    const Groups groups = groups_of(m, count);
    const char* tile = tile_of(m, expert, index);
    if (m.kind == Kind::q4) return {widen(tile, groups, slot), int64_t(groups.size) * kTile, tile, groups};
    return {tile + groups.lines(), groups.bytes, tile, groups};
}

// Adds group g to y [R][16].
void add_group(const int32_t* dot, const Weights& w, int64_t g, const Block& x, float* y) {
    const char* numbers = w.scales + g * w.groups.bytes;
    for (int v = 0; v < kTile; v += kWidth) {
        const vf scale = load_any(numbers, w.groups.scales, v), bias = load_any(numbers, w.groups.scales, kTile + v);
        for (int r = 0; r < x.rows; ++r) {
            vi sums;
            memcpy(&sums, dot + r * kTile + v, sizeof sums);
            const vf scaled = __builtin_convertvector(sums, vf) * splat(x.scales[g * x.rows + r]);
            float* const at = y + r * kTile + v;
            store(at, fma(bias, splat(x.sums[g * x.rows + r]), fma(scaled, scale, load(at))));
        }
    }
}

// A tile of outputs times the rows of a block: to y [R][16].
void multiply(const Weights& w, const Block& x, float* y) {
    const int step = w.groups.size < 64 ? w.groups.size : 64;
    const int64_t stride = w.groups.count * w.groups.size;
    alignas(64) int32_t dot[kMostTileRows * kTile];
    Tiles tiles(x.rows, step);
    memset(y, 0, x.rows * kTile * sizeof(float));
    for (int64_t g = 0; g < w.groups.count; ++g) {
        tiles.clear();
        for (int k = 0; k < w.groups.size; k += step)
            tiles.add((const char*)x.words + g * w.groups.size + k, stride, w.lines + g * w.stride + k * kTile);
        tiles.store(dot);
        add_group(dot, w, g, x, y);
    }
}

}  // namespace

void tile_matmul(const Linear& a) {
    if (a.rows == 0) return;
    const Activations x = read_activations(a, Order::rows, kMostTileRows);
    for_each_tile(a, x, [&](int at, int64_t expert, int64_t index, int64_t begin, int64_t end) {
        alignas(64) float tile[kMostTileRows * kTile], other[kMostTileRows * kTile];
        const Weights weights = weights_of(a.matrices[at], expert, index, x.groups, kWeightSlot);
        const Weights up = a.gated ? weights_of(a.matrices[1], expert, index, x.groups, kUpSlot) : Weights{};
        for (int64_t b = begin; b < end; ++b) {
            const Block block = x.block(b);
            multiply(weights, block, tile);
            if (a.gated) multiply(up, block, other);
            finish_tile(a, at, index, block.first, block.rows, tile, other);
        }
    });
}

}  // namespace tiny_llm::TINY_ISA
