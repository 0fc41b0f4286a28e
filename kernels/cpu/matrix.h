// A weight matrix as the matmul kernels want it, and their arguments. Owns the description of the layout.
//
// W [O, I] is cut into tiles of 16 outputs, each one contiguous run of bytes; O is padded to a multiple of
// 16 with zeros. Every tile begins on a multiple of 64 bytes.
//
// A quantized tile (q4, q8) is its groups along I, in order. A group is 16 scales, 16 biases, then lines of
// 64 bytes, one 32-bit word for each output, in order of k:
//   q4  a word is 8 weights: k = 0, 1 ... 7 from the lowest 4 bits up, as MLX stores them
//   q8  a word is 4 weights, from the lowest byte up: of each 8 first k = 0, 2, 4, 6, then k = 1, 3, 5, 7, as the
//       low and the high halves of a q4 word's bytes are
// The weight is scale * q + bias.
//
// A dense tile is [I][16], or for bf16 [I / 2][16][2], an odd I filled up with a zero; then zeros up to 64 bytes.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace tiny_llm {

enum class Kind : uint8_t { q4, q8, f32, bf16, f16 };

constexpr int kTile = 16;  // outputs of a tile
constexpr int kLine = 64;  // bytes: a word of each

struct Matrix {
    const char* data;       // tiles(*this) * tile_bytes(*this)
    int64_t rows, columns;  // O, I
    Kind kind;              // of the weights
    Kind scales;            // of a quantized matrix's scales and biases: f32, bf16 or f16
    int group_size;         // 32, 64 or 128; 0 where dense
    bool exact;             // activations stay float32, also where quantized
    int64_t count = 1;      // of such matrices, behind each other: experts
};

// Rows of x that meet one expert of each matrix.
struct Part {
    int64_t first, rows, expert;
};

// out[i] = x W_i^T + bias_i for each i; or, gated, out[0] = silu(x W_0^T + bias_0) * (x W_1^T + bias_1).
// All matrices have I columns; all are dense, or all quantized with one group size and `exact`. Parts have no biases.
struct Linear {
    const float* x;              // [T, I]
    int64_t rows;                // T
    int count;                   // of matrices; 2 when gated
    const Matrix* matrices;      // [count]
    const float* const* biases;  // [count], each [O_i] or null
    float* const* out;           // [count], each [T, O_i]; [1] when gated
    bool gated;
    const Part* parts = nullptr;      // [part_count], all rows in order; null: all meet number 0
    int64_t part_count = 0;
    const int32_t* source = nullptr;  // [T], which row of x is row r; null: r itself
};

inline bool is_quantized(Kind kind) { return kind == Kind::q4 || kind == Kind::q8; }
inline int bits_of(Kind kind) {
    return kind == Kind::q4 ? 4 : kind == Kind::q8 ? 8 : kind == Kind::f32 ? 32 : 16;
}
inline int64_t tiles(const Matrix& m) { return (m.rows + kTile - 1) / kTile; }
inline int64_t source_of(const Linear& a, int64_t row) { return a.source ? a.source[row] : row; }

// Of a quantized matrix.
inline int64_t group_bytes(const Matrix& m) {
    return kTile * (m.group_size * bits_of(m.kind) + 2 * bits_of(m.scales)) / 8;
}
inline int64_t tile_bytes(const Matrix& m) {
    if (is_quantized(m.kind)) return m.columns / m.group_size * group_bytes(m);
    const int64_t inputs = m.kind == Kind::bf16 ? m.columns + m.columns % 2 : m.columns;
    return (kTile * inputs * bits_of(m.kind) / 8 + 63) / 64 * 64;
}

}  // namespace tiny_llm
