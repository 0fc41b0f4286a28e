#include "embedding.h"

#include "pool.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {
namespace {

// `Together` inputs of an output lie side by side.
template <class T, int Together>
void dense_row(const char* tile, int64_t lane, int64_t columns, float* out) {
    const T* at = (const T*)tile + lane * Together;
    for (int64_t k = 0; k < columns; ++k)
        out[k] = to_float(at[k / Together * Together * kTile + k % Together]);
}

float number(const char* at, Kind kind, int64_t i) {
    if (kind == Kind::bf16) return to_float(((const bf16*)at)[i]);
    if (kind == Kind::f16) return to_float(((const f16*)at)[i]);
    return ((const float*)at)[i];
}

template <int Bits>
void quantized_row(const Matrix& m, const char* group, int64_t lane, float* out) {
    constexpr int kWeights = 32 / Bits;  // in a word
    const int64_t head = 2 * kTile * bits_of(m.scales) / 8;
    for (int64_t g = 0; g < m.columns / m.group_size; ++g, group += group_bytes(m)) {
        const float scale = number(group, m.scales, lane), bias = number(group, m.scales, kTile + lane);
        const uint32_t* words = (const uint32_t*)(group + head) + lane;
        for (int w = 0; w < m.group_size / kWeights; ++w)
            for (int i = 0; i < kWeights; ++i) {
                const int k = Bits == 4 ? 8 * w + i : 8 * (w / 2) + 2 * i + w % 2;
                out[k] = scale * (float)(words[w * kTile] >> (i * Bits) & ((1 << Bits) - 1)) + bias;
            }
        out += m.group_size;
    }
}

void read_row(const Matrix& m, int64_t row, float* out) {
    const char* tile = m.data + row / kTile * tile_bytes(m);
    const int64_t lane = row % kTile;
    switch (m.kind) {
        case Kind::q4: return quantized_row<4>(m, tile, lane, out);
        case Kind::q8: return quantized_row<8>(m, tile, lane, out);
        case Kind::f32: return dense_row<float, 1>(tile, lane, m.columns, out);
        case Kind::bf16: return dense_row<bf16, 2>(tile, lane, m.columns, out);
        case Kind::f16: return dense_row<f16, 1>(tile, lane, m.columns, out);
    }
}

}  // namespace

void embedding(const Embedding& a) {
    const Matrix& m = a.table;
    parallel_for(a.count, 1 + 8192 / (m.columns + 1), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t token = a.tokens[i];
            const int64_t row = token < 0 ? 0 : token < m.rows ? token : m.rows - 1;
            read_row(m, row, a.out + i * m.columns);
        }
    });
}

}  // namespace tiny_llm::TINY_ISA
