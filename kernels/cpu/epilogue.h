// What follows a tile's products: bias, gate, and the way to memory. Kernel files only.
#pragma once

#include "matrix.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {

// silu(gate) * up, for 16 values
static inline void gate_tile(float* gate, const float* up) {
    for (int v = 0; v < kTile; v += kWidth) store(gate + v, silu(load(gate + v)) * load(up + v));
}

static inline void add_bias(const float* bias, int64_t first, int64_t outputs, int rows, float* tile) {
    for (int r = 0; bias && r < rows; ++r)
        for (int64_t i = 0; i < outputs; ++i) tile[r * kTile + i] += bias[first + i];
}

// Writes rows [row, row + rows) of tile number `index` of matrix `at`; `tile` is [rows][16], `other` the up tile.
static inline void finish_tile(const Linear& a, int at, int64_t index, int64_t row, int rows, float* tile, float* other) {
    const int64_t first = index * kTile, all = a.matrices[at].rows;
    const int64_t outputs = all - first < kTile ? all - first : kTile;
    add_bias(a.biases[at], first, outputs, rows, tile);
    if (a.gated) {
        add_bias(a.biases[1], first, outputs, rows, other);
        for (int r = 0; r < rows; ++r) gate_tile(tile + r * kTile, other + r * kTile);
    }
    for (int r = 0; r < rows; ++r) {
        float* to = a.out[at] + (row + r) * all + first;
        if (outputs == kTile) {
            memcpy(to, tile + r * kTile, kTile * sizeof(float));
        } else {
            memcpy(to, tile + r * kTile, outputs * sizeof(float));
        }
    }
}

}  // namespace tiny_llm::TINY_ISA
